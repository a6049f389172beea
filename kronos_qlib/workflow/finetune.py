"""A workflow's two stages of fine-tuning without its forecasts: what `kronos-qlib finetune` runs and previews."""

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import qlib
from qlib.cli.run import render_template, sys_config
from qlib.config import C
from qlib.data.dataset.weight import Reweighter
from qlib.utils import init_instance_by_config
from qlib.utils.data import update_config
from qlib.workflow import R
from ruamel.yaml import YAML, YAMLError

from kronos_qlib.data.dataset import KLineDataset
from kronos_qlib.hardware.device import process_count
from kronos_qlib.train.job import Job
from kronos_qlib.train.preview import preview, titled_line
from kronos_qlib.workflow.model import KronosModel
from kronos_qlib.workflow.recording import end_as_failed, record_run


class Finetuning:
    """The fine-tuning of a workflow file, with Qlib initialised and the data loaded.

    Raises:
        ValueError, FileNotFoundError: one line, for a file that is no workflow with a KronosModel to fine-tune, and
            for what the model, the handler and the dataset refuse.
    """

    def __init__(self, workflow: Path) -> None:
        config = read_workflow(workflow)
        self.name = config.get("experiment_name", workflow.stem)
        qlib.init(**config["qlib_init"])
        self.model = init_instance_by_config(config["task"]["model"], accept_types=KronosModel)
        if not isinstance(self.model, KronosModel):
            raise ValueError(f"{workflow}: task.model is a {type(self.model).__name__}, not a KronosModel")
        if self.model.settings.finetune is None:
            raise ValueError(f"{workflow}: finetune is null: there is nothing to train")
        self.dataset: KLineDataset = init_instance_by_config(config["task"]["dataset"])
        reweighter = config["task"].get("reweighter")
        self.reweighter = reweighter and init_instance_by_config(reweighter, accept_types=Reweighter)
        self._recording, self._saved = ExitStack(), ExitStack()
        self._job: Job | None = None

    @property
    def experiment(self) -> str:
        """The recorder's experiment: not the workflow's own, whose newest run should have scores."""
        return f"{self.name}_finetune"

    def run(self) -> None:
        """Train as `qrun` would."""
        with R.start(experiment_name=self.experiment):
            self.model.fit(self.dataset, self.reweighter)

    def prepare(self) -> Path:
        """Save the job for the processes that torchrun has started, and return its folder."""
        self._recording.enter_context(R.start(experiment_name=self.experiment))
        record_run(self.model.settings, self.dataset)
        self._job = self.model.job(self.dataset, self.reweighter)
        return self._saved.enter_context(self._job.scratch_copy())

    def conclude(self) -> None:
        """Record the results of the job."""
        assert self._job is not None, "prepare comes first"
        self._job.load_best()
        self._saved.close()
        self.model.conclude(self._job)
        self._recording.close()

    def record_failure(self) -> None:
        """Record that the job has failed or was stopped."""
        self._saved.close()
        end_as_failed()

    def preview(self) -> str:
        """Describe what `run` would do; nothing is trained and nothing is written."""
        handler, dataset = self.dataset.handler, self.dataset
        lines = [
            f"{self.name}: dry run, nothing is trained and nothing is written",
            "",
            titled_line("data", f"{C.dpm.get_data_uri(handler.freq)}, universe {handler.instruments}"),
        ]
        if "test" in dataset.segments:
            lines.append(
                titled_line("test", f"{len(dataset.score_windows('test')):,} windows, which are not trained on")
            )
        with tempfile.TemporaryDirectory() as scratch:
            job = self.model.job(dataset, self.reweighter, extra_dir=Path(scratch))
            processes = process_count("finetune", job.settings.processes, job.device)
            return "\n".join([*lines, *preview(job, processes)])


def read_workflow(path: Path) -> dict[str, Any]:
    """Read a workflow file as `qrun` does: templates filled from the environment, laid over its BASE_CONFIG_PATH.

    Raises:
        FileNotFoundError: there is no such file, or not the base that it names. ValueError: it is no workflow.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such workflow file")
    yaml = YAML(typ="safe", pure=True)
    try:
        config = yaml.load(render_template(str(path)))
        base = config.get("BASE_CONFIG_PATH") if isinstance(config, dict) else None
        if base is not None:
            places = [Path(base), path.absolute().parent / base]
            found = next((place for place in places if place.is_file()), None)
            if found is None:
                raise FileNotFoundError(f"{path}: BASE_CONFIG_PATH {base} is neither here nor beside the workflow")
            config = update_config(yaml.load(found.read_text()), config)
    except YAMLError as error:
        raise ValueError(f"{path}: not valid YAML ({error})") from error
    task = config.get("task") if isinstance(config, dict) else None
    if not isinstance(task, dict) or not {"model", "dataset"} <= task.keys() or "qlib_init" not in config:
        raise ValueError(f"{path}: no workflow: it needs qlib_init, task.model and task.dataset")
    sys_config(config, str(path))
    return config
