"""Base of the parts of scripts/gpu/on_gpu.py: results that are written at once, jobs on random text, times."""

import argparse
import itertools
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastbert.config import from_dict
from fastbert.data.batches import InMemory
from fastbert.data.tokenizer import SPECIAL_TOKENS, WordPiece
from fastbert.files import atomic_file
from fastbert.pretraining.loop import Trainer
from fastbert.pretraining.options import PretrainOptions
from fastbert.pretraining.setup import PretrainSetup
from fastbert.records import write_json
from fastbert.streams import echo
from fastbert.training.checkpoints import Checkpointer
from fastbert.training.hardware import resolve_device, resolve_precision, synchronize
from fastbert.training.logbook import Logbook

LATE, NEEDS_CUDA = "not measured: time was up", "not measured: needs CUDA"
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


class Part:
    """A part: its results, which are written after each of them, its device, and its jobs."""

    def __init__(self, work: Callable[["Part"], None], args: argparse.Namespace, header: dict, folder: Path) -> None:
        self.name, self.args, self.toy, self.header = work.__name__, args, args.toy, {**header, "note": work.__doc__}
        self.folders = (folder / f"{self.name}-{number}" for number in itertools.count())  # outputs of runs
        self.rows, self.deadline = [], time.monotonic() + args.seconds
        self.device, self.cuda = resolve_device("auto"), torch.cuda.is_available()
        self.precision = resolve_precision("auto", self.device)[0] if self.cuda else "fp32"

    def add(self, **row: Any) -> None:
        self.rows.append({k: str(v) if isinstance(v, float) and not np.isfinite(v) else v for k, v in row.items()})
        print(table(self.rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
        write_json(self.args.out / f"{self.name}.json", {**self.header, "rows": self.rows})
        with atomic_file(self.args.out / f"{self.name}.md", "w") as file:
            header = [f"- {name}: {value}" for name, value in self.header.items()]
            file.write("\n".join([f"# {self.name}", "", *header, "", table(self.rows), ""]))

    def attempt(self, check: Callable[..., Iterable[dict[str, Any]]], *options: Any, **what: Any) -> None:
        """Adds the rows of `check`, or a row if there is no time left or it fails."""
        try:
            if time.monotonic() > self.deadline:
                raise KeyboardInterrupt
            for row in check(self, *options) or ():
                self.add(**what, **row)
        except KeyboardInterrupt:
            self.add(**what, result=LATE)
        except Exception as error:  # with its traceback in the report: one failure must not end the part
            self.add(**what, **failure(error))

    def setup(self, options: dict[str, Any], device: str = "", precision: str = "") -> PretrainSetup:
        """A pretraining job on random text; a dry run shrinks it."""
        text, words = random_text(96 if self.toy else 8192 if "layers" in options else 32768)
        whole = {"machine": {"micro_batch_size": None}}
        options = whole | {"eval_sequences": 8, "attention_dropout": options.get("dropout", 0.1), **options}
        options = from_dict(PretrainOptions, options | (TOY if self.toy else {}), "on_gpu.py")
        config = options.encoder.resolve(len(words.tokens), options.length)
        return PretrainSetup(
            options, text, words, config, torch.device(device or self.device), precision or self.precision
        )

    def trainer(self, setup: PretrainSetup, steps: int, log_every: int) -> Trainer:
        """Builds the trainer as a run does."""
        options, folder, objective = setup.options, next(self.folders), setup.objective().train()
        parts = {"updater": setup.updater(objective), "batches": setup.batches()}
        rate = options.optimizer.learning_rate
        settings = {"seed": options.seed, "learning_rate": rate, "schedule": options.schedule}
        every = {"steps": steps, "eval_every": steps, "checkpoint_every": 5, "log_every": log_every}
        books = {"checkpointer": Checkpointer(folder, 3, echo), "logbook": Logbook(folder, steps, quiet=True)}
        checks = {"validate": lambda length: setup.validate(objective, length), "peak_flops": 1.0}
        return Trainer(**parts, **settings, **every, **books, **checks, state={})

    def seconds(self, step: Callable[[], None], count: int) -> float:
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(count):
            step()
        synchronize(self.device)
        return time.perf_counter() - start


def failure(error: Exception) -> dict[str, Any]:
    traceback.print_exception(error)
    short = "out of memory" if isinstance(error, torch.OutOfMemoryError) else f"error: {type(error).__name__}: {error}"
    return {"result": short, "traceback": traceback.format_exception(error)}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown table; lists and mappings are in the JSON only."""
    names = dict.fromkeys(name for row in rows for name, value in row.items() if not isinstance(value, list | dict))
    cells = [[row.get(name, "") for name in names] for row in rows]
    texts = [[f"{x:.4g}" if isinstance(x, float) else str(x).partition("\n")[0] for x in line] for line in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in [list(names), ["---"] * len(names), *texts])
