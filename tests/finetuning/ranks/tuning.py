"""Program for several processes: fine-tunes each case on all ranks and, on the first one, in one process; writes the
exit codes of all ranks. Started by tests/finetuning/test_several_processes.py with torchrun.

    tuning.py CASES.json CODES.json
"""

import json
import os
import shutil
import signal
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from fastbert.finetuning.finetune import finetune
from fastbert.finetuning.loop import Tuner
from fastbert.finetuning.options import FinetuneOptions
from fastbert.finetuning.stream import SingleTaskStream, StreamBatch
from fastbert.flags import parse
from fastbert.training.parallel import start
from fastbert.training.world import ONE_PROCESS, World


@contextmanager
def soft_labels(world: World):
    """Weighted batches with soft labels of two classes."""
    real = SingleTaskStream.at

    def at(stream: SingleTaskStream, epoch: int, index: int) -> StreamBatch:
        batch = real(stream, epoch, index)
        first = (batch.rows % 5 / 5).astype(np.float32)
        return replace(batch, weight=0.3, soft_labels=np.stack([first, 1 - first], 1))

    with patch.object(SingleTaskStream, "at", at):
        yield


@contextmanager
def local_means(world: World):
    """Negative control: each rank divides by the number of its own units, and the ranks take the mean."""

    def units(batch: StreamBatch) -> int:
        rows = batch.rows[world.rows(len(batch.rows))]
        return world.size * max(1, len(batch.data.units_in(rows)))

    with patch.object(StreamBatch, "units", property(units)):
        yield


@contextmanager
def terminated(world: World):
    """The last rank receives SIGTERM before the first batch of epoch 2, and all stop after the second, of 3."""
    real = Tuner.train_step

    def train_step(tuner: Tuner, batch: StreamBatch) -> None:
        if tuner.progress.step == 3 and world.rank == world.size - 1 and world.size > 1:
            os.kill(os.getpid(), signal.SIGTERM)
        real(tuner, batch)

    with patch.object(Tuner, "train_step", train_step):
        yield


CHANGES = {"soft labels": soft_labels, "local means": local_means, "terminated": terminated}


def main() -> None:
    torch.set_num_threads(1)
    cases, codes = json.loads(Path(sys.argv[1]).read_text()), {}
    with start(60.0) as world:
        for name, case in cases.items():
            options = parse(FinetuneOptions, case["flags"], "finetune")
            for change in case["changes"]:
                with CHANGES[change](world) if change else nullcontext():
                    code = finetune(options, world)
                codes.setdefault(name, []).append(world.gather(torch.tensor([code])).tolist())
                if code and world.first:
                    shutil.copytree(options.out, f"{options.out}-stopped")
            if world.first and case["alone"]:
                with CHANGES[change](ONE_PROCESS) if change else nullcontext():
                    assert finetune(replace(options, out=f"{options.out}-alone"), ONE_PROCESS) == 0
    if world.first:
        Path(sys.argv[2]).write_text(json.dumps(codes))


main()
