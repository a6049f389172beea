"""Memory that the processes of a training add: the nano workflow's windows, some steps of both stages.

    QLIB_DATA=/path/to/cn_data python benchmarks/processes.py
    QLIB_DATA=/path/to/cn_data python benchmarks/processes.py --processes 2

The processes are started as by `qrun`, record into MLflow and validate. Of each, its largest sizes: resident, all that
it has in memory; proportional, where a page that several share, such as torch's library or the mapped bars, is divided
among them; own, its pages that nobody shares. state is what every one needs for weights, gradients and moments.
"""

import argparse
import os
import tempfile
import threading
from collections import defaultdict
from pathlib import Path

import psutil
import qlib
import torch
from machine import describe
from qlib.utils import init_instance_by_config
from qlib.workflow import R
from table import print_row
from trained import WORKFLOW

from kronos_qlib.train.distributed import open_compute
from kronos_qlib.train.memory_estimate import bytes_of_state
from kronos_qlib.workflow.workflow_file import read_workflow

MIB = 2**20
SIZES = {"resident": "rss", "proportional": "pss", "own": "uss"}  # psutil's names
SHORT = {"epochs": 1, "windows_per_epoch": 800, "valid_windows": 200}
EVERY = 0.05  # seconds


def watch(ended: threading.Event, largest: dict[int, dict[str, int]]) -> None:
    """Note the largest sizes of this process's training processes, by their ids, until `ended`."""
    while not ended.wait(EVERY):
        for child in psutil.Process().children(recursive=True):
            try:
                if "kronos_qlib.train.worker" in child.cmdline():
                    sizes = child.memory_full_info()
                    for name, key in SIZES.items():
                        largest[child.pid][name] = max(largest[child.pid][name], getattr(sizes, key))
            except psutil.Error:
                continue  # it has just ended


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=4, help="2 or more (default: %(default)s)")
    options = parser.parse_args()
    print(describe())
    config = read_workflow(WORKFLOW)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # for the recorder's files
        qlib.init(**config["qlib_init"])
        kwargs = config["task"]["model"]["kwargs"]
        stages = {name: kwargs["finetune"][name] | SHORT for name in ("tokenizer", "predictor")}
        kwargs["finetune"] |= {"output_dir": folder, "processes": options.processes, **stages}
        model = init_instance_by_config(config["task"]["model"])
        dataset = init_instance_by_config(config["task"]["dataset"])
        windows = dataset.training_windows("train")
        print(f"training  {len(windows):,} windows of {len(windows.bars):,} bars, {options.processes} processes\n")

        largest: dict[int, dict[str, int]] = defaultdict(lambda: dict.fromkeys(SIZES, 0))
        ended = threading.Event()
        watcher = threading.Thread(target=watch, args=(ended, largest))
        watcher.start()
        try:
            with R.start(experiment_name="memory"):
                model.fit(dataset)
        finally:
            ended.set()
            watcher.join()
        with open_compute(torch.device("cpu"), torch.float32) as compute:
            specifications = model.job(dataset, extra_dir=Path(folder)).specifications()
            state = max(bytes_of_state(specification.stage, compute) for specification in specifications)
        os.chdir(Path(folder).parent)

    for number, (_pid, sizes) in enumerate(sorted(largest.items())):
        row = {"process": number, **{f"{name} MiB": f"{size / MIB:.0f}" for name, size in sizes.items()}}
        print_row(row | {"state MiB": f"{state / MIB:.0f}"}, with_heading=number == 0)


if __name__ == "__main__":
    main()
