"""Scores of a model for the examples of a split."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastbert.data.foreign_tokenizer import AnyTokenizer
from fastbert.errors import UserError
from fastbert.finetuning.batches import EncodedSplit, reading_order
from fastbert.finetuning.model import TaskModel
from fastbert.finetuning.rows import Example
from fastbert.finetuning.saved import TaskRecord
from fastbert.progress import progress
from fastbert.training.hardware import autocast
from fastbert.training.world import ONE_PROCESS, World

BATCH = 64  # default number of examples in one forward pass


@dataclass(frozen=True)
class Inputs:
    """The examples of a split with their ids: once, or in both orders of the pairs."""

    examples: Sequence[Example]
    orders: tuple[EncodedSplit, ...]

    @property
    def truncated(self) -> int:
        return self.orders[0].truncated

    @property
    def labels(self) -> list[Any]:
        """Label of each example."""
        return [example.label for example in self.examples]

    def scored(self, scores: np.ndarray) -> Iterator[tuple[Example, np.ndarray]]:
        """Pairs of an example and its part of `scores` [U, ...]."""
        return zip(self.examples, self.orders[0].by_example(scores), strict=True)


@progress("tokenizing")
def encode_inputs(examples: Sequence[Example], vocabulary: AnyTokenizer, record: TaskRecord) -> Inputs:
    settings = (vocabulary, record.max_length)
    orders = [record.kind.encode(examples, *settings)]
    if record.both_orders:
        orders.append(record.kind.encode([replace(e, text=e.pair, pair=e.text) for e in examples], *settings))
    return Inputs(examples, tuple(orders))


@torch.no_grad()
def predict_scores(
    model: TaskModel,
    head: str,
    inputs: Inputs,
    *,
    precision: str,
    batch_size: int = BATCH,
    world: World = ONE_PROCESS,
) -> np.ndarray:
    """Scores of a head, float64 [U, ...], the mean over the orders of the pairs.

    With several ranks, each scores a part of the batches that one process would have, so the scores are equal to the
    bit.
    """
    kind, device = model.kinds[head], next(model.parameters()).device
    out = np.zeros((len(inputs.orders[0].units_in(np.arange(len(inputs.orders[0])))), *kind.score_shape()))
    # One context for all batches: it casts each weight once.
    with autocast(device, precision), progress("scoring", sum(map(len, inputs.orders)), "inputs") as shown:
        for encoded in inputs.orders:
            for index, rows in enumerate(reading_order(encoded.lengths, batch_size)):
                if index % world.size == world.rank:
                    batch = encoded.batch(rows, device)
                    (logits,) = model(batch, [head])
                    scores = kind.scores(logits if batch.scored is None else logits[batch.scored])
                    out[encoded.units_in(rows)] += scores.cpu().numpy() / len(inputs.orders)
                shown.update(shown.done + len(rows))
    # A batch of both orders may be scored by different ranks; all others have zeros there.
    return out if world.size == 1 else world.sum(torch.from_numpy(out).to(device)).cpu().numpy()


def check_finite(values: np.ndarray, model: str | Path, precision: str) -> None:
    """Raises a UserError if not all scores [U, ...] are finite."""
    bad = int((~np.isfinite(values)).any(axis=tuple(range(1, values.ndim))).sum())
    if bad:
        remedy = "use another model" if precision == "fp32" else "try --machine.precision fp32"
        raise UserError(f"{bad} of {len(values)} scores of {model} are not finite; {remedy}")
