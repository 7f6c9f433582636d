"""Functions for `run_ranks`: each case is fine-tuned on all ranks and, on the first one, in one process."""

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

from fastbert import cli
from fastbert.finetuning.finetune import finetune
from fastbert.finetuning.loop import Tuner
from fastbert.finetuning.options import FinetuneOptions
from fastbert.finetuning.stream import SingleTaskStream, StreamBatch
from fastbert.flags import parse
from fastbert.training.launch import join
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


CHANGES = {None: nullcontext, "soft labels": soft_labels, "local means": local_means, "terminated": terminated}


def tune(cases: str, codes: str) -> None:
    """Trains the cases in a JSON file; writes the exit codes of all ranks."""
    found: dict[str, list[list[int]]] = {}
    with join(60.0) as world:
        for name, case in json.loads(Path(cases).read_text()).items():
            options = parse(FinetuneOptions, case["flags"], "finetune")
            for change in case["changes"]:
                with CHANGES[change](world):
                    code = finetune(options, world)
                found.setdefault(name, []).append(world.gather(torch.tensor([code])).tolist())
                if code and world.first:
                    shutil.copytree(options.out, f"{options.out}-stopped")
            if world.first and case["alone"]:
                with CHANGES[change](ONE_PROCESS):
                    assert finetune(replace(options, out=f"{options.out}-alone"), ONE_PROCESS) == 0
    if world.first:
        Path(codes).write_text(json.dumps(found))


def command(*arguments: str) -> None:
    """`fastbert` with these arguments."""
    sys.exit(cli.main(list(arguments)))
