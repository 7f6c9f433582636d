"""Logits and pooled states of a fine-tuned model, for replay, memory and queries."""

from typing import NamedTuple

import numpy as np
import torch

from fastbert.finetuning.batches import EncodedSplit, reading_order
from fastbert.finetuning.model import TaskModel
from fastbert.finetuning.scoring import BATCH
from fastbert.training.hardware import autocast


class Outputs(NamedTuple):
    """Outputs for n texts without dropout."""

    logits: np.ndarray
    """float32 [n, L]."""
    states: np.ndarray
    """float32 [n, D], the input of the last layer: tanh of the pooler at [CLS]."""


@torch.no_grad()
def outputs_of(
    model: TaskModel, head: str, data: EncodedSplit, rows: np.ndarray, precision: str, batch_size: int = BATCH
) -> Outputs:
    """Outputs for the texts `rows` (int64 [n]) of `data`, in that order.

    Args:
        head: of a task with a label for each text (`task_heads.PooledHead`).
    """
    layer, device = model.head(head), next(model.parameters()).device
    logits = np.zeros((len(rows), layer.classifier.out_features), np.float32)
    states = np.zeros((len(rows), layer.pooler.out_features), np.float32)
    for part in reading_order(data.lengths[rows], batch_size):
        batch = data.batch(rows[part], device)
        with autocast(device, precision):
            pooled = layer.features(model.hidden(batch, layer.reads))
            found = layer.classifier(pooled)
        logits[part], states[part] = (tensor.float().cpu().numpy() for tensor in (found, pooled))
    return Outputs(logits, states)
