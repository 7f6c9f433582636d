"""Jobs of a study: a round of a learner, and its final training anew on the labels of the last round.

run/ of a job, of which round.json is written last:

    selected.jsonl          the texts of the round: index in the task's file, text, label, value of the query
    metrics.jsonl           loss of the training, and metrics on dev after its last epoch
    dev_scores.safetensors
    memory.safetensors      all labelled texts, and their logits at the end of the round in which each was labelled
    model/                  the model after the last epoch, until the next round is finished
    round.json              figures and cost

A final training writes no memory, and its model only where people have labelled.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fastbert.config import from_dict
from fastbert.errors import UserError
from fastbert.files import atomic_file, disk_errors, remove
from fastbert.finetuning.build import build_updater
from fastbert.finetuning.continual.memory import Memory, read_memory, write_memory
from fastbert.finetuning.continual.options import METHODS, Method
from fastbert.finetuning.continual.outputs import outputs_of
from fastbert.finetuning.continual.tuner import ContinualTuner, Cost, NewRows
from fastbert.finetuning.dev_ensemble import write_dev_scores
from fastbert.finetuning.dev_scores import dev_figures
from fastbert.finetuning.loop import ADVICE, Tuner
from fastbert.finetuning.options import FinetuneOptions
from fastbert.finetuning.saved import load_task_model, save_task_model
from fastbert.finetuning.scoring import BATCH, predict_scores
from fastbert.finetuning.setup import task_record
from fastbert.finetuning.stream import SingleTaskStream
from fastbert.records import COUNT, check, json_text, read_sealed, write_sealed
from fastbert.studies.active.acquire import acquire
from fastbert.studies.active.pool import Texts, open_texts, permuted, round_seed
from fastbert.studies.active.submodular import ALL_CHOICES
from fastbert.studies.engine.outcomes import RUN, ended, failure
from fastbert.studies.engine.store import ResultRow
from fastbert.training.finite import all_finite
from fastbert.training.interrupts import Interrupts
from fastbert.training.logbook import Logbook
from fastbert.training.step import Updater

ROUND, FINAL = "round", "final"  # the kinds of these jobs
RECORD, MODEL, MEMORY, SELECTED = "round.json", "model", "memory.safetensors", "selected.jsonl"
_RESULT = {
    **{"round": COUNT, "metrics": [str], "precision": str, "dev": {str: {str: float}}, "skipped_updates": COUNT},
    "cost": dict.fromkeys(Cost().to_dict(), COUNT),
    **{"seconds_training": float, "seconds_query": float},
}


@dataclass
class Round:
    """A job in progress."""

    job: dict[str, Any]
    out: Path
    texts: Texts
    memory: Memory
    """Texts of the rounds before."""
    previous: Path | None
    """Run of the round before; None for the first one."""
    interrupts: Interrupts
    cost: Cost = field(default_factory=Cost)
    seconds_training: float = 0.0
    seconds_query: float = 0.0
    skipped: int = 0

    @property
    def options(self) -> dict[str, Any]:
        return self.job["options"]

    @property
    def method(self) -> Method:
        return METHODS["anew" if self.job["kind"] == FINAL else self.options["method"]]

    @property
    def number(self) -> int:
        """1 for the first round."""
        return len(self.options["rounds"])

    @property
    def seed(self) -> int:
        return self.job["seed"]

    @property
    def task(self) -> str:
        return self.texts.setup.task.name

    @property
    def batch_size(self) -> int:
        """Number of texts in a forward pass."""
        return self.texts.setup.options.machine.micro_batch_size or BATCH


def round_job(job: dict[str, Any], out: Path) -> dict[str, Any]:
    """`JobRunner` of rounds and final trainings. Files of an attempt that did not finish are removed."""
    (previous,) = [out.parents[1] / before / RUN for before in job["after"]] or [None]
    record = finished(out, job)
    if record is None:
        texts = open_texts_of(job["options"])
        if changed := texts.changed(job["identity"], job["options"]["texts"]):
            return failure(f"the {changed} changed after the study had started", "run it again once nothing changes it")
        with disk_errors(out):
            remove(out)
            out.mkdir(parents=True)
        outputs = texts.outputs
        memory = Memory.empty(outputs)
        if previous is not None:
            memory = read_memory(previous / MEMORY, len(texts.examples), outputs)
        with Interrupts() as interrupts:
            its = Round(job, out, texts, memory, previous, interrupts)
            record = run_final(its) if job["kind"] == FINAL else run_round(its)
        if record is None:
            return ended(interrupts.exit_code)
    if previous is not None and job["kind"] == ROUND:
        with disk_errors(previous):
            remove(previous / MODEL)
    return {
        "status": "done",
        "precision": record["precision"],
        "metrics": record["metrics"],
        "result": {key: value for key, value in record.items() if key not in ("id", "precision", "metrics")},
    }


def finished(out: Path, job: dict[str, Any]) -> dict[str, Any] | None:
    """Record of a job that an earlier attempt finished; None if there is none, or if its model, from which the next
    round starts, was removed."""
    if not (out / RECORD).is_file() or (job["kind"] == ROUND and not (out / MODEL).is_dir()):
        return None
    record = read_sealed(out / RECORD, "the record of a round", {"id": str, **_RESULT}, f"remove {out}")
    return record if record["id"] == job["id"] else None


def open_texts_of(options: dict[str, Any]) -> Texts:
    """The texts that a job reads."""
    finetune = from_dict(FinetuneOptions, options["finetune"], where="the study's job")
    files = None if options["files"] is None else [Path(path) for path in options["files"]]
    return open_texts(finetune, options["pool"], files)


def run_round(its: Round) -> dict[str, Any] | None:
    """Selects the texts of the round, trains on them and scores; returns the record, None after a signal."""
    setup, updater = its.texts.setup, new_updater(its)
    last = None
    if its.previous is not None:
        last = load_task_model(its.previous, setup.options.machine.kernels).model.to(setup.device)
    new, values = select(its, last)
    if its.method.from_last and last is not None:
        updater.module.load_state_dict(last.state_dict())
    rows = np.concatenate([its.memory.rows, new])
    figures = train(its, updater, rows)
    if figures is None:
        return None
    start = time.perf_counter()
    data = its.texts.encoded(new)
    every = np.arange(len(new))
    logits = outputs_of(updater.module, its.task, data, every, setup.precision, its.batch_size).logits
    if "alpha" in its.method.uses:  # other methods do not read them
        its.cost.forwards += len(new)
        its.seconds_training += time.perf_counter() - start
    write_selected(its, new, values)
    write_memory(its.out / MEMORY, its.memory.extended(new, logits))
    save_model(its, updater.module, figures)
    return write_record(its, figures)


def run_final(its: Round) -> dict[str, Any] | None:
    """Trains anew on all labels of the last round; returns the record, None after a signal."""
    updater = new_updater(its)
    figures = train(its, updater, its.memory.rows)
    if figures is None:
        return None
    if its.options["files"] is not None:
        save_model(its, updater.module, figures)
    return write_record(its, figures)


def new_updater(its: Round) -> Updater:
    """The pretrained encoder with a new head, and an optimizer without moments."""
    setup = its.texts.setup
    kinds = {its.task: setup.task.kind}
    return build_updater(setup.options, setup.pretrained, kinds, its.seed, setup.device, setup.precision)


def select(its: Round, last: nn.Module | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Rows of the texts to label in this round, and the value of the query for each.

    Args:
        last: model of the round before.
    """
    rounds, setup = its.options["rounds"], its.texts.setup
    count = rounds[-1] - len(its.memory)
    if its.options["query"] is None:  # people have chosen
        return np.arange(len(its.memory), rounds[-1]), None
    start, order = time.perf_counter(), permuted(len(its.texts.examples), its.seed)
    query = "random" if last is None else its.options["query"]
    data = None if query == "random" else its.texts.encoded()

    def outputs(rows: np.ndarray) -> Any:
        its.cost.pool += len(rows)
        return outputs_of(last, its.task, data, rows, setup.precision, its.batch_size)

    found = acquire(query, setup.task.kind, order, its.memory.rows, count, outputs)
    its.seconds_query = time.perf_counter() - start
    return found


def train(its: Round, updater: Updater, rows: np.ndarray) -> dict[str, dict[str, float]] | None:
    """Trains on the labelled texts `rows`, of which the last are new; returns the metrics on dev by split, None after a
    signal.

    Raises:
        UserError: training diverged.
    """
    setup, method, old = its.texts.setup, its.method, len(its.memory)
    options = setup.options
    data = its.texts.encoded(rows)
    seed = round_seed(its.seed, its.number) if method.from_last else its.seed
    replays = method.continual and old > 0
    if replays:
        stream = NewRows(its.task, data, old, options.batch_size, seed)
    else:
        stream = SingleTaskStream(its.task, [data], options.batch_size, seed)
    with Logbook(its.out, options.epochs * stream.batches, options=its.job["identity"]["options"]) as logbook:
        common = (updater, stream, options, seed, logbook)
        if replays:
            tuner = ContinualTuner(
                *common,
                loss=method.loss,
                choose=ALL_CHOICES[method.choice],
                stored=its.memory.logits,
                settings=its.options["replay"],
                cost=its.cost,
            )
        else:
            tuner = Tuner(*common)
        if not tuner.run(its.interrupts, lambda: None):
            return None
        if not replays:
            its.cost.gradients += options.epochs * len(rows)
        its.seconds_training, its.skipped = tuner.progress.seconds, tuner.progress.skipped
        return score(its, updater.module, logbook, tuner.progress.step)


def score(its: Round, model: nn.Module, logbook: Logbook, step: int) -> dict[str, dict[str, float]]:
    """Scores dev after the last epoch: no epoch is selected on it, which a person who has few labels cannot do."""
    setup, scores, figures = its.texts.setup, {}, {}
    finite = bool(all_finite(model.state_dict().values()))
    for split, inputs in setup.dev.items():
        scores[split] = predict_scores(model, its.task, inputs, precision=setup.precision, batch_size=its.batch_size)
        figures[split] = dev_figures(setup.task, scores[split], inputs.examples)
        logbook.log(step, split, {**figures[split], "epoch": setup.options.epochs})
        finite = finite and None not in figures[split].values()
    if not finite:
        raise UserError(f"{its.task}: weights or scores on dev were not finite after round {its.number}{ADVICE}")
    write_dev_scores(its.out, scores)
    return figures


def write_selected(its: Round, rows: np.ndarray, values: np.ndarray | None) -> None:
    """Writes the texts of the round in the order of their selection."""
    kind = its.texts.setup.task.kind
    with atomic_file(its.out / SELECTED, "w") as file:
        for number, row in enumerate(rows):
            example = its.texts.examples[row]
            line = {"index": example.index, "text": example.text}
            line |= {} if example.pair is None else {"pair": example.pair}
            line |= {"label": kind.file_label(example)}
            line |= {} if values is None else {"value": float(values[number])}
            file.write(json_text(line, ensure_ascii=False) + "\n")


def save_model(its: Round, model: nn.Module, figures: dict[str, dict[str, float]]) -> None:
    setup = its.texts.setup
    record = task_record(setup.options, setup.task, its.seed, figures)
    save_task_model(model, record, setup.pretrained.tokenizer, its.out / MODEL)


def write_record(its: Round, figures: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Writes round.json and returns its content."""
    record = {
        "id": its.job["id"],
        "round": its.number,
        "metrics": list(its.texts.setup.task.metrics),
        "precision": its.texts.setup.precision,
        "dev": figures,
        "cost": its.cost.to_dict(),
        "seconds_training": round(its.seconds_training, 3),
        "seconds_query": round(its.seconds_query, 3),
        "skipped_updates": its.skipped,
    }
    write_sealed(its.out / RECORD, record)
    return record


def check_round_row(row: ResultRow, where: str) -> None:
    """`RowCheck` of a study's jobs."""
    check(row, {"kind": str, "model": str, "task": str, "seed": int, "labels": COUNT, "seconds": float}, where)
    check(row, _RESULT, where)
    if not row["metrics"] or not row["dev"]:
        raise UserError(f"{where} is damaged: it holds no metrics on dev")
    for split, figures in row["dev"].items():
        check(figures, dict.fromkeys(row["metrics"], float), where, f"dev.{split}")
