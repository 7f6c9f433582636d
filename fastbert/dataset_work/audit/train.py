"""The fine-tunings of an audit: for each fold and each fraction of its training examples, one that resumes exactly.

out/folds/fold-0/             result.json and scores.safetensors (written last); until then metrics and checkpoints
out/folds/fraction-0.25/fold-0/     the same for a fraction below 1
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastbert.data.foreign_tokenizer import AnyTokenizer
from fastbert.dataset_work.audit.options import AuditOptions
from fastbert.dataset_work.audit.pool import Pool, open_pool
from fastbert.errors import UserError
from fastbert.files import atomic_file, disk_errors, remove, remove_leftovers
from fastbert.finetuning.build import build_updater
from fastbert.finetuning.loop import ADVICE, STATE, Tuner
from fastbert.finetuning.options import FinetuneOptions
from fastbert.finetuning.saved import fine_tuned_folder, load_encoder, read_task_record
from fastbert.finetuning.scoring import BATCH, Inputs, encode_inputs, predict_scores
from fastbert.finetuning.seed import check_disk
from fastbert.finetuning.setup import task_record
from fastbert.finetuning.stream import SingleTaskStream
from fastbert.hub.load import Pretrained, tokenizer_of
from fastbert.records import COUNT, check, read_sealed, write_sealed
from fastbert.streams import echo
from fastbert.training.apex import check_apex
from fastbert.training.checkpoints import Checkpoint, Checkpointer, read_newest
from fastbert.training.hardware import resolve_device, resolve_precision, setup_machine
from fastbert.training.interrupts import Interrupts
from fastbert.training.logbook import Logbook
from fastbert.training.schedules import learning_rate_factor
from fastbert.training.tensors import read_tensors, serialized

CHECKPOINTS, RESULT, SCORES = "checkpoints", "result.json", "scores.safetensors"
LONGEST = 2**20  # tokens, so that nothing is cut when lengths are measured
_RESULT = {"fold": COUNT, "fraction": float, "train_examples": COUNT, "seconds": float}


@dataclass(frozen=True)
class AuditSetup:
    """Everything that the fine-tunings have in common."""

    options: AuditOptions
    tuning: FinetuneOptions
    """Options of the trainings, with learning rate, epochs and length resolved."""
    pool: Pool
    pretrained: Pretrained
    vocabulary: AnyTokenizer
    truncated: np.ndarray
    """bool [N], the examples that are longer than the maximum length."""
    device: torch.device
    precision: str
    warnings: list[str]
    """Printed before training starts."""

    def encode(self, rows: Sequence[int]) -> Inputs:
        """The examples `rows` as ids."""
        record = task_record(self.tuning, self.pool.task, self.options.seed, {})
        return encode_inputs([self.pool.examples[row] for row in rows], self.vocabulary, record)


@dataclass(frozen=True)
class FoldScores:
    """Scores of the model of a fold."""

    rows: np.ndarray
    """int64 [n]: the held-out examples, or all examples if the labels of a fraction are flipped."""
    scores: np.ndarray
    """float64 [n, ...], see `TaskKind.scores`."""
    train_examples: int
    seconds: float
    """Seconds in the training steps."""


def prepare_audit(requested: AuditOptions) -> AuditSetup:
    """Opens machine, task and encoder, and checks everything that can be checked before training.

    Raises:
        UserError: see `open_pool`; the model cannot be opened; a length or a warm-up does not fit.
    """
    device = resolve_device(requested.machine.device)
    precision, warning = resolve_precision(requested.machine.precision, device)
    if requested.machine.apex:
        check_apex("adamw", device)
    setup_machine(requested.machine, device)
    pool = open_pool(requested)
    check_unseen(requested.model, pool.task.name)
    pretrained = load_encoder(requested.model)
    vocabulary = tokenizer_of(pretrained)
    tuning = requested.tuning().resolved(pool.task, pretrained.config.max_positions)
    for fraction in requested.fractions():
        count = min(len(pool.training_rows(fold, fraction)) for fold in range(requested.folds))
        steps = tuning.epochs * -(-count // tuning.batch_size)
        learning_rate_factor(tuning.schedule, 0, steps)  # refuses a warm-up that is too long
    lengths = pool.task.kind.encode(pool.examples, vocabulary, LONGEST).lengths
    truncated = lengths > tuning.max_length
    warnings = [*([warning] if warning else []), *pool.task.warnings]
    return AuditSetup(requested, tuning, pool, pretrained, vocabulary, truncated, device, precision, warnings)


def check_unseen(model: str, task: str) -> None:
    """Raises a UserError if the model was fine-tuned on the task, so that its encoder has seen the labels."""
    folder = fine_tuned_folder(model)
    if folder is not None and read_task_record(folder)[0].task == task:
        raise UserError(
            f"{model} was fine-tuned on {task}, so it has seen the labels, and no score would be out of fold; give the "
            "pretrained encoder with --model"
        )


def fold_folder(out: Path, fraction: float, fold: int) -> Path:
    folder = out / "folds"
    return (folder if fraction == 1.0 else folder / f"fraction-{fraction}") / f"fold-{fold}"


def train_fold(
    setup: AuditSetup, folder: Path, fold: int, fraction: float, interrupts: Interrupts
) -> FoldScores | None:
    """Trains the model of a fold in its folder and scores the examples, unless it is finished; continues from the
    newest checkpoint.

    Returns:
        The scores; None if a signal ended the training.

    Raises:
        UserError: training diverged; the disk is full; a file in the folder is damaged.
    """
    if (found := finished(folder, setup)) is not None:
        return found
    checkpoint = open_fold_folder(folder)
    pool, tuning, seed = setup.pool, setup.tuning, setup.options.seed
    rows = pool.training_rows(fold, fraction)
    task = pool.task
    updater = build_updater(tuning, setup.pretrained, {task.name: task.kind}, seed, setup.device, setup.precision)
    check_disk(folder, updater.module, 0, checkpoint is not None)
    stream = SingleTaskStream(task.name, setup.encode(rows).orders, tuning.batch_size, seed)
    steps = tuning.epochs * stream.batches
    which = "" if fraction == 1.0 else f", fraction {fraction:g}"
    echo(
        f"{task.name}, fold {fold + 1} of {setup.options.folds}{which}: {len(rows):,} examples, {steps} steps; "
        f"{setup.device} {setup.precision}"
    )
    resumed = {"start_step": checkpoint.step, "expected": checkpoint.state["metrics"]} if checkpoint else {}
    with Logbook(folder, steps, **resumed) as logbook:
        tuner = Tuner(updater, stream, tuning, seed, logbook)
        checkpointer = Checkpointer(folder / CHECKPOINTS, 1, echo)
        if checkpoint is not None:
            tuner.restore(checkpoint)
            echo(f"continues after epoch {tuner.progress.epoch} of {tuning.epochs}")
        if not tuner.run(interrupts, lambda: checkpointer.save(tuner.progress.step, tuner.tensors(), tuner.state())):
            return None
    scored = np.arange(len(pool)) if setup.options.flip and fraction == 1.0 else pool.held_out(fold)
    scores = predict_scores(
        updater.module,
        task.name,
        setup.encode(scored),
        precision=setup.precision,
        batch_size=tuning.machine.micro_batch_size or BATCH,
    )
    if not np.isfinite(scores).all():
        raise UserError(f"{task.name}, fold {fold + 1}: training diverged: scores are not finite{ADVICE}")
    result = FoldScores(scored, scores, len(rows), tuner.progress.seconds)
    write_fold(folder, result, fold, fraction)
    return result


def open_fold_folder(folder: Path) -> Checkpoint | None:
    """Creates the folder of a fold, or cleans it; returns the checkpoint from which it continues.

    Raises:
        UserError: there are checkpoints, and all of them are damaged.
    """
    checkpoint = read_newest(folder / CHECKPOINTS, echo)
    if checkpoint is not None:
        check(checkpoint.state, STATE, f"the checkpoint's state {checkpoint.path / 'state.json'}")
        if missing := {"model", "optimizer"} - checkpoint.tensors.keys():
            raise UserError(f"the checkpoint {checkpoint.path} is damaged: it has no {min(missing)}.safetensors")
    with disk_errors(folder):
        if checkpoint is None:
            remove(folder)  # files of an attempt without a checkpoint
            folder.mkdir(parents=True, exist_ok=True)
        else:
            remove_leftovers(folder)
    return checkpoint


def write_fold(folder: Path, result: FoldScores, fold: int, fraction: float) -> None:
    """Writes the scores, then the result, and removes the checkpoints."""
    tensors = {"rows": torch.from_numpy(result.rows), "scores": torch.from_numpy(result.scores)}
    with atomic_file(folder / SCORES) as file:
        file.write(serialized(tensors, {}))
    record = {"fold": fold, "fraction": fraction, "train_examples": result.train_examples}
    write_sealed(folder / RESULT, {**record, "seconds": round(result.seconds, 2)})
    with disk_errors(folder):
        remove(folder / CHECKPOINTS)


def finished(folder: Path, setup: AuditSetup) -> FoldScores | None:
    """The scores of a finished fold; None if it is not finished.

    Raises:
        UserError: they are damaged.
    """
    if not (folder / RESULT).is_file():
        return None
    fix = f"remove {folder} to train the fold again"
    result = read_sealed(folder / RESULT, "the fold's result", _RESULT, fix)
    try:
        tensors = read_tensors(folder / SCORES)[0]
        rows, scores = (tensors[name].numpy() for name in ("rows", "scores"))
    except (UserError, KeyError) as error:
        raise UserError(f"the scores of {folder} are damaged ({error}); {fix}") from None
    if scores.shape != (len(rows), *setup.pool.task.kind.score_shape()) or rows.max(initial=-1) >= len(setup.pool):
        raise UserError(f"{folder / SCORES} holds scores of other examples; {fix}")
    with disk_errors(folder):
        remove(folder / CHECKPOINTS)  # of a process that was killed right after the result was written
    return FoldScores(rows, scores, result["train_examples"], result["seconds"])
