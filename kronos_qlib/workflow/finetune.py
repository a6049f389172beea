"""A workflow's two stages of fine-tuning without its forecasts: what `kronos-qlib finetune` runs and previews."""

import tempfile
from contextlib import ExitStack
from pathlib import Path

from qlib.config import C
from qlib.data.dataset.weight import Reweighter
from qlib.log import get_module_logger
from qlib.workflow import R

from kronos_qlib.data.dataset import KLineDataset
from kronos_qlib.hardware.device import process_count
from kronos_qlib.train.job import Job
from kronos_qlib.train.preview import preview, titled_line
from kronos_qlib.workflow.check import WorkflowCheck
from kronos_qlib.workflow.model import KronosModel
from kronos_qlib.workflow.recording import end_as_failed, record_run

logger = get_module_logger("KronosModel")
# What an error in makes a training impossible; other errors are of what comes after it.
_NEEDED = (
    *("file", "qlib_init", "recorder", "task.model", "task.dataset", "task.reweighter", "train", "valid", "finetune"),
    "calibration",
    "finetune.output_dir",
)


class Finetuning:
    """The fine-tuning of a workflow file, with Qlib initialised and the data loaded.

    Raises:
        ValueError, FileNotFoundError: one line, for a file that is no workflow with a KronosModel to fine-tune, and
            for what the model, the handler and the dataset refuse.
    """

    def __init__(self, workflow: Path) -> None:
        check = WorkflowCheck(workflow)
        for finding in check.findings():
            if finding.level == "error" and finding.subject in _NEEDED:
                raise ValueError(finding.text)
            if finding.level != "ok":  # `qrun` would meet it after the training
                logger.warning(f"{finding.subject}: {finding.text}")
        self.name = check.config.get("experiment_name", workflow.stem)
        if not isinstance(check.model, KronosModel):
            raise ValueError(f"{workflow}: task.model is a {type(check.model).__name__}, not a KronosModel")
        if check.model.settings.finetune is None:
            raise ValueError(f"{workflow}: finetune is null: there is nothing to train")
        self.model: KronosModel = check.model
        self.dataset: KLineDataset = check.dataset
        self.reweighter: Reweighter | None = check.reweighter
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
