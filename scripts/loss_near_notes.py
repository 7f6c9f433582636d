"""Masked loss near words with notes, for runs with a note dictionary and one without:

    python scripts/loss_near_notes.py BASELINE RUN [RUN ...] [--sequences 12000] [--distance 16]

All runs have the same data, length and masks of the validation. About 1 % of the tokens have a note, so a mean over all
masked positions hardly changes. Here they are in three groups, for each RUN by its own words with notes:

    near       at most `distance` tokens from a word that reads its note, in the same row
    matched    as near to a word of the same range of counts that was not selected for a note, and not near a note:
               selection is by a hash, so these positions differ from the others in the note alone
    elsewhere  neither

Positions within such words are in no group. The effect of the notes is the difference between near and matched of the
change from BASELINE, with its standard error (rows are independent, positions of a row are not). The other columns
change the notes that a trained model reads, near them: shuffled among the words, their mean for every word, off. What
shuffling changes is due to what is specific to a word. `cosine` is the mean cosine of two notes.
"""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.config import load_yaml
from fastbert.data.batches import validation_batches
from fastbert.data.note_words import NoteWords, choose_words
from fastbert.errors import UserError
from fastbert.hub.load import find_checkpoint
from fastbert.objectives.mlm import MLM
from fastbert.pretraining.evaluation import MASK_SEED
from fastbert.pretraining.options import PretrainOptions
from fastbert.pretraining.setup import PretrainSetup, prepare_setup
from fastbert.report.page import Table
from fastbert.training.hardware import autocast


@dataclass(frozen=True)
class Losses:
    """Masked positions of the validation, [rows, masked positions]."""

    rows: np.ndarray
    """int64 [rows], indices in the split."""
    positions: np.ndarray
    masked: np.ndarray
    """bool, true for positions that are masked."""
    values: np.ndarray
    """-log p of the masked word, 0 where nothing is masked."""


def load(run: str) -> tuple[PretrainSetup, MLM]:
    """A trained objective with its note dictionary, in evaluation mode."""
    checkpoint = find_checkpoint(Path(run))
    if checkpoint is None:
        raise UserError(f"{run} is no run with a checkpoint")
    setup = prepare_setup(load_yaml(PretrainOptions, Path(run) / "config.yaml"))
    objective = setup.objective()
    if not isinstance(objective, MLM):
        raise UserError(f"{run} is no run of masked language modeling")
    objective.load_state_dict(checkpoint.tensors["model"])
    return setup, objective.eval()


@torch.no_grad()
def measure(setup: PretrainSetup, objective: MLM, sequences: int) -> Losses:
    """The loss at every masked position of evenly spread rows of the validation."""
    found = []
    for batch in validation_batches(setup.rows("validation"), sequences, 64, setup.device):
        inputs = objective.sample(batch, MASK_SEED, 0, "validation-mask")
        with autocast(setup.device, setup.precision):
            logits = objective.logits(inputs)
        values = F.cross_entropy(logits.float(), inputs.targets.flatten(), reduction="none", ignore_index=-100)
        parts = batch.row_indices, inputs.positions, inputs.targets != -100, values.view_as(inputs.targets)
        found.append([part.cpu().numpy() for part in parts])
    return Losses(*map(np.concatenate, zip(*found, strict=True)))


def neighbors(words: NoteWords, losses: Losses, distance: int) -> tuple[np.ndarray, np.ndarray]:
    """bool [rows, masked positions]: positions near an occurrence without masked pieces, and those in an occurrence."""
    length = words.width + 1
    masked, near, inside = (np.zeros((len(losses.rows), length), bool) for _ in range(3))
    np.put_along_axis(masked, losses.positions, losses.masked, axis=1)
    order = np.argsort(losses.rows)
    row = np.searchsorted(losses.rows, words.index.positions // words.width, sorter=order)
    row = order[np.minimum(row, len(order) - 1)]
    here = losses.rows[row] == words.index.positions // words.width
    firsts = words.index.positions % words.width + 1
    for number, first, size in zip(row[here], firsts[here], words.index.lengths[here].astype(int), strict=True):
        inside[number, first : first + size] = True
        if not masked[number, first : first + size].any():
            near[number, max(0, first - distance) : first + size + distance] = True
    near, inside = (np.take_along_axis(part, losses.positions, axis=1) for part in (near, inside))
    return near, inside


def groups(setup: PretrainSetup, losses: Losses, distance: int) -> dict[str, np.ndarray]:
    """Name -> bool [rows, masked positions]."""
    options, dataset, stream = setup.options.notes, setup.dataset, setup.dataset.split("validation")
    selected = choose_words(dataset, options.min_count, options.max_count, options.fraction)
    in_range = (dataset.rare_counts >= options.min_count) & (dataset.rare_counts <= options.max_count)
    others = np.where(in_range & (selected < 0), 0, -1).astype(np.int32)
    length, window = setup.options.length, options.half_window
    found = [neighbors(NoteWords(stream, words, length, window), losses, distance) for words in (selected, others)]
    (near, inside), (matched, inside_other) = found
    free = losses.masked & ~inside & ~inside_other
    return {"near": free & near, "matched": free & matched & ~near, "elsewhere": free & ~matched & ~near}


def mean_change(change: np.ndarray, group: np.ndarray) -> tuple[float, float]:
    """Mean of `change` over a group, and its standard error with rows as the independent units; NaN if it is empty."""
    if not (count := group.sum()):
        return math.nan, math.nan
    mean = np.where(group, change, 0.0).sum() / count
    residuals = (np.where(group, change, 0.0) - np.where(group, mean, 0.0)).sum(1)
    return float(mean), float(np.sqrt(np.square(residuals).sum()) / count)


def altered(objective: MLM) -> dict[str, Callable[[Tensor], Tensor]]:
    """Name -> notes that replace those of a trained model."""
    written = objective.notes.writes > 0
    order = torch.randperm(len(written), generator=torch.Generator().manual_seed(0)).to(written.device)
    return {
        "shuffled": lambda notes: notes[order],
        "mean": lambda notes: notes[written].mean(0).expand_as(notes),
    }


def similarity(objective: MLM) -> float:
    """Mean cosine of the notes of two different words; NaN if fewer than two have been written."""
    notes = F.normalize(objective.notes.table[objective.notes.writes > 0].double(), dim=1)
    if (count := len(notes)) < 2:
        return math.nan
    return float((notes.sum(0).square().sum() - count) / (count * (count - 1)))


def compare(baseline: Losses, run: str, sequences: int, distance: int) -> list[str]:
    """The row of a run in the table."""
    setup, objective = load(run)
    if objective.notes is None:
        raise UserError(f"{run} has no note dictionary")
    losses = measure(setup, objective, sequences)
    if not np.array_equal(losses.positions, baseline.positions):
        raise UserError(f"{run} has other validation data, lengths or masks than the baseline")
    where = groups(setup, losses, distance)
    changes = {name: mean_change(losses.values - baseline.values, group) for name, group in where.items()}
    effect = changes["near"][0] - changes["matched"][0], np.hypot(changes["near"][1], changes["matched"][1])
    notes = objective.notes.table.clone()
    for name, change in altered(objective).items():
        objective.notes.table.copy_(change(notes))
        changes[name] = mean_change(measure(setup, objective, sequences).values - losses.values, where["near"])
        objective.notes.table.copy_(notes)
    objective.notes.options = replace(objective.notes.options, mix=0.0)
    changes["none"] = mean_change(measure(setup, objective, sequences).values - losses.values, where["near"])
    pairs = (effect, *changes.values())
    shown = ("–" if math.isnan(mean) else f"{mean:+.4f} ± {error:.4f}" for mean, error in pairs)
    cosine = similarity(objective)
    return [run, str(where["near"].sum()), *shown, "–" if math.isnan(cosine) else f"{cosine:.3f}"]


def positive(text: str) -> int:
    """A number of the command line that is at least 1."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("baseline", help="run without notes")
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--sequences", type=positive, default=12000, help="rows of the validation (12000)")
    parser.add_argument("--distance", type=positive, default=16, help="tokens (16)")
    given = parser.parse_args()
    setup, objective = load(given.baseline)
    if objective.notes is not None:
        raise UserError(f"the baseline {given.baseline} has a note dictionary; give a run without one first")
    baseline = measure(setup, objective, given.sequences)
    rows = [compare(baseline, run, given.sequences, given.distance) for run in given.runs]
    print("Change of the masked loss in nats (negative: better), with standard errors: from the baseline (effect to")
    print("elsewhere), and near words with notes from the run itself if its notes are changed (shuffled to off).")
    head = ["run", "positions", "effect", "near", "matched", "elsewhere", "shuffled", "mean", "off", "cosine"]
    print(Table(head, rows).plain())


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
