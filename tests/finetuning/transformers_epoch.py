"""The training of transformers' models, step by step, with which fine-tunings are compared."""

from typing import Any

import torch
from torch import nn

from fastbert.finetuning.batches import training_order


def losses_of_an_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any, data: Any) -> list[float]:
    """Trains on batches of 16 in the order of seed 0, with the norm of the gradient clipped at 1."""
    losses = []
    for rows in training_order(data.lengths, 16, 0, 0):
        batch = data.batch(rows)
        loss = model(batch.input_ids, attention_mask=batch.attention_mask.long(), labels=batch.labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
