"""Heads on top of the encoder. A head declares which hidden states it reads, and the names of its weights in
transformers."""

from typing import ClassVar

import torch
from fastbert_kernels import combine, hash_dropout
from torch import Tensor, nn

SITE = -1  # dropout site of the head; the sites of the encoder count from 0


class PooledHead(nn.Module):
    """BERT's head for texts: [CLS] -> dense, tanh (the pooler) -> dropout -> linear.

    Args:
        outputs: number of logits for each example.
        dropout: probability, applied if row keys are given.
    """

    reads: slice | None = slice(1)
    """Tokens whose hidden states the head reads; None for all."""
    bert_names: ClassVar = {"pooler": "bert.pooler.dense", "classifier": "classifier"}
    """Names of its layers in transformers' BERT; the exported FastBert classes use the names here."""

    def __init__(self, width: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.pooler = nn.Linear(width, width)
        self.classifier = nn.Linear(width, outputs)
        self.dropout = dropout

    def forward(self, hidden: Tensor, row_keys: Tensor | None = None) -> Tensor:
        """Logits [B, L] from hidden states [B, 1, D]; with dropout if `row_keys` (int32 [B]) are given."""
        pooled = self.features(hidden)
        if row_keys is not None:
            pooled = hash_dropout(pooled, combine(row_keys, SITE), self.dropout)
        return self.classifier(pooled)

    def features(self, hidden: Tensor) -> Tensor:
        """Input of the classifier without dropout, [B, D], from hidden states [B, 1, D]."""
        return torch.tanh(self.pooler(hidden[:, 0]))


class TokenHead(nn.Module):
    """BERT's head for tokens: dropout -> linear at each token.

    Args:
        outputs: number of logits for each token.
        dropout: probability, applied if row keys are given.
    """

    reads: slice | None = None
    bert_names: ClassVar = {"classifier": "classifier"}

    def __init__(self, width: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.classifier = nn.Linear(width, outputs)
        self.dropout = dropout

    def forward(self, hidden: Tensor, row_keys: Tensor | None = None) -> Tensor:
        """Logits [B, T, L] from hidden states [B, T, D]; with dropout if `row_keys` (int32 [B]) are given."""
        if row_keys is not None:
            index = torch.arange(hidden.shape[1], dtype=torch.int32, device=hidden.device)
            hidden = hash_dropout(hidden, combine(combine(row_keys, SITE)[:, None], index), self.dropout)
        return self.classifier(hidden)

    def features(self, hidden: Tensor) -> Tensor:
        """Input of the classifier without dropout, [B, T, D]: the hidden states."""
        return hidden
