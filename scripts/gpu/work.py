"""Base of the steps of scripts/gpu/measure.py: results that are printed at once, jobs on random text, their device."""

import itertools
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import PREPARED, ROW

from fastbert.config import from_dict
from fastbert.data.batches import InMemory
from fastbert.data.tokenizer import SPECIAL_TOKENS, WordPiece
from fastbert.pretraining.loop import Trainer
from fastbert.pretraining.options import PretrainOptions
from fastbert.pretraining.setup import PretrainSetup
from fastbert.records import json_text
from fastbert.streams import echo
from fastbert.training.checkpoints import Checkpointer
from fastbert.training.hardware import resolve_device, resolve_precision
from fastbert.training.logbook import Logbook

NEEDS_CUDA = "not measured: needs CUDA"
STARTED = time.monotonic()
TOY = {"layers": 1, "width": 16, "heads": 2, "length": 24, "batch_size": 4}


def random_text(vocab_size: int) -> tuple[InMemory, WordPiece]:
    """Random words in documents of about 40, with the interface of a prepared dataset and of its splits."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(len(SPECIAL_TOKENS), vocab_size, 64 * vocab_size)
    tokens[generator.random(len(tokens)) < 1 / 40] = SPECIAL_TOKENS.index("[SEP]")
    text = InMemory(tokens)
    text.split = lambda name: text
    pieces = (f"##w{i}" if i % 3 == 0 else f"w{i}" for i in range(vocab_size - len(SPECIAL_TOKENS)))
    return text, WordPiece((*SPECIAL_TOKENS, *pieces))


def emit(**row: Any) -> None:
    """Print a row of the results. Numbers that are not finite become text: JSON has none."""
    row = {k: str(v) if isinstance(v, float) and not np.isfinite(v) else v for k, v in row.items()}
    print(ROW + json_text(row), flush=True)


class Work:
    """A step: its device, and its jobs on random text.

    Args:
        toy: a dry run with tiny encoders.
        folder: for the outputs of runs.
    """

    def __init__(self, toy: bool, folder: Path) -> None:
        self.toy, self.folders = toy, (folder / f"run-{number}" for number in itertools.count())
        self.device, self.cuda = resolve_device("auto"), torch.cuda.is_available()
        self.precision = resolve_precision("auto", self.device)[0] if self.cuda else "fp32"

    def attempt(self, check: Callable[..., Iterable[dict[str, Any]]], *options: Any, **what: Any) -> None:
        """Print the rows of `check`, or its error as a row: the other checks continue."""
        try:
            for row in check(self, *options):
                emit(**what, **row)
        except Exception as error:  # a row with its traceback; the other checks still run
            emit(**what, **failure(error))

    def options(self, values: dict[str, Any]) -> PretrainOptions:
        """Options of a job; a dry run shrinks it."""
        whole = {"machine": {"micro_batch_size": None}}
        values = whole | {"eval_sequences": 8, "attention_dropout": values.get("dropout", 0.1), **values}
        return from_dict(PretrainOptions, values | (TOY if self.toy else {}), "scripts/gpu")

    def setup(self, values: dict[str, Any] | PretrainOptions, device: str = "", precision: str = "") -> PretrainSetup:
        """A pretraining job on random text."""
        options = values if isinstance(values, PretrainOptions) else self.options(values)
        text, words = random_text(96 if self.toy else 32768 if options.encoder.width is None else 8192)
        config = options.encoder.resolve(len(words.tokens), options.length)
        where = torch.device(device or self.device)
        return PretrainSetup(options, text, words, config, where, precision or self.precision)

    def trainer(self, setup: PretrainSetup, steps: int, log_every: int) -> Trainer:
        """Build the trainer as a run does."""
        options, folder, objective = setup.options, next(self.folders), setup.objective().train()
        parts = {"updater": setup.updater(objective), "batches": setup.batches()}
        rate = options.optimizer.learning_rate
        settings = {"seed": options.seed, "learning_rate": rate, "schedule": options.schedule}
        every = {"steps": steps, "eval_every": steps, "checkpoint_every": 5, "log_every": log_every}
        books = {"checkpointer": Checkpointer(folder, 3, echo), "logbook": Logbook(folder, steps, quiet=True)}
        checks = {"validate": lambda length: setup.validate(objective, length), "peak_flops": 1.0}
        return Trainer(**parts, **settings, **every, **books, **checks, state={})


def failure(error: Exception) -> dict[str, Any]:
    """Result of a check that raised an error; its traceback goes to the log."""
    traceback.print_exception(error)
    short = "out of memory" if isinstance(error, torch.OutOfMemoryError) else f"{type(error).__name__}: {error}"
    return {"result": f"error: {short.partition(chr(10))[0][:300]}"}


def wait_for_gpu() -> None:
    """Return when the other steps have ended: measure.py then writes a line to standard input."""
    emit(part=PREPARED, seconds=round(time.monotonic() - STARTED), result="measured")
    sys.stdin.readline()
