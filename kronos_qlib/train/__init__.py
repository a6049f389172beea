"""Windows → checkpoint. The way of a training, with the file of each part:

1. `settings`: what a workflow's `finetune` mapping says, checked; `adapters`: freezing and LoRA, which it may ask for.
2. `job`: networks, windows and settings, ready to run; it specifies its two `stages` and trains one after the other.
3. `preview` prints what a job would do; `launch` runs it in several processes, each of which is a `worker`.
4. `distributed`: the group of these processes, the device and the cores of each.
5. `loop`: a stage from its first step to its last. `fingerprint` decides whether its folder may be resumed,
   `memory_estimate` how large its micro-batches are; `code_cache` encodes all windows beforehand, if asked to.
6. `batches`: a seed draws the windows of each batch, a thread loads this process's micro-batches of it.
7. `step`: forward and backward by micro-batch, one sum over all processes, clipping, AdamW under OneCycleLR.
8. `stages`: what the forward pass computes, the losses of tokenizer and predictor, and what specifies a stage.
9. `metrics` go to history.csv and the recorder, `checkpoints` are written and read, `signals` stop the loop.

A reader who follows one step opens `job`, `loop`, `batches`, `step` and `stages`. This room imports neither pandas nor
Qlib: its processes stay small.

Letters of shapes: B windows of a batch or micro-batch, T bars of a window (lookback + future), W windows of a segment,
V codes of a vocabulary.
"""

from kronos_qlib.train.job import Job
from kronos_qlib.train.loop import train_stage
from kronos_qlib.train.settings import FinetuneSettings
from kronos_qlib.train.stages import PredictorStage, StageSpecification, TokenizerStage

__all__ = ["FinetuneSettings", "Job", "PredictorStage", "StageSpecification", "TokenizerStage", "train_stage"]
