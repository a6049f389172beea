"""Windows → checkpoint: the settings, the two stages, the loop, its processes, and checkpoints that survive a kill."""

from kronos_qlib.train.job import Job
from kronos_qlib.train.loop import train_stage
from kronos_qlib.train.settings import FinetuneSettings
from kronos_qlib.train.stages import PredictorStage, TokenizerStage

__all__ = ["FinetuneSettings", "Job", "PredictorStage", "TokenizerStage", "train_stage"]
