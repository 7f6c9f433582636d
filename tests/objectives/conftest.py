"""Tiny objectives of every kind, and rows for them."""

from typing import Any

import torch

from fastbert.data.batches import Batch
from fastbert.data.tokenizer import WordPiece
from fastbert.model.encoder import initialize
from fastbert.model.options import EncoderOptions
from fastbert.objectives import OBJECTIVES
from fastbert.objectives.options import ElectraOptions, MLMOptions, MultipleChoiceOptions
from fastbert.objectives.replacement import Replacement

V = 40
VOCABULARY = WordPiece(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(V - 5))))
OPTIONS = {"electra": ElectraOptions, "multiple-choice": MultipleChoiceOptions}
MLM = {"mlm": MLMOptions}


def batch(rows: int = 4, length: int = 16, first_row: int = 0) -> Batch:
    ids = torch.randint(5, V, (64, length), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 2
    indices = torch.arange(first_row, first_row + rows)
    return Batch(ids[indices], indices)


def build(
    name: str,
    position: str = "absolute",
    dropout: float = 0.0,
    options: Any = None,
    vocabulary: WordPiece = VOCABULARY,
    vocab_size: int = V,
    **changes,
) -> Replacement:
    config = EncoderOptions(
        layers=2, width=32, heads=2, position=position, dropout=dropout, attention_dropout=dropout, **changes
    ).resolve(vocab_size, 16)
    objective = OBJECTIVES[name](config, options or (OPTIONS | MLM)[name](), vocabulary)
    initialize(objective, 0, 0.05)
    return objective.train()


def loss_of(objective: Replacement, inputs: Any) -> torch.Tensor:
    sums = objective(inputs)
    return sum(weight * sums[name] / inputs.counts[name] for name, weight in objective.loss_weights.items())
