"""The networks that `qrun workflows/kronos_csi300_nano.yaml` trains, and forecasts with them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import qlib
import torch

from kronos_qlib import KLineDataset, Kronos, KronosTokenizer
from kronos_qlib.data.windows import Windows
from kronos_qlib.forecast.engine.sampling import Sampling
from kronos_qlib.forecast.forecaster import choose_batch_size
from kronos_qlib.forecast.task import Task, future_stamps
from kronos_qlib.workflow.workflow_file import read_workflow

WORKFLOW = Path(__file__).parents[1] / "workflows" / "kronos_csi300_nano.yaml"
RUN = Path("runs/kronos_csi300_nano")  # the workflow's output_dir


@dataclass(frozen=True)
class Trained:
    """The workflow's dataset, its best checkpoints and its keyword arguments of KronosModel."""

    dataset: KLineDataset
    tokenizer: KronosTokenizer
    model: Kronos
    settings: dict[str, Any]

    @classmethod
    def load(cls, run: Path) -> "Trained":
        """Point Qlib at the workflow's store, load its bars, and the networks from a run's folder."""
        from qlib.utils import init_instance_by_config

        config = read_workflow(WORKFLOW)
        qlib.init(provider_uri=config["qlib_init"]["provider_uri"], region="cn", logging_level=30)
        return cls(
            init_instance_by_config(config["task"]["dataset"]),
            KronosTokenizer.from_pretrained(run / "tokenizer" / "best"),
            Kronos.from_pretrained(run / "predictor" / "best"),
            config["task"]["model"]["kwargs"],
        )

    def task(
        self, windows: Windows, dtype: torch.dtype = torch.float32, keep_paths: bool = False, **sampling: Any
    ) -> Task:
        """The forecast of some windows with the workflow's settings, but for those of `Sampling` given."""
        options = self.settings["forecast"]
        usual = {key: options[key] for key in ("sample_count", "temperature", "top_k", "top_p", "s2_rotation")}
        sampling = {**usual, "seed": self.settings["seed"], **sampling}
        shape = windows.lookback, self.dataset.horizon, sampling["sample_count"]
        return Task(
            tokenizer=self.tokenizer,
            model=self.model,
            windows=windows,
            future_stamp=future_stamps(windows, self.dataset.horizon, self.dataset.calendar.stamps_after),
            sampling=Sampling(**sampling),
            max_context=self.settings["max_context"],
            batch_size=choose_batch_size(self.model.config, *shape, torch.device("cpu")),
            dtype=dtype,
            keep_paths=keep_paths,
        )
