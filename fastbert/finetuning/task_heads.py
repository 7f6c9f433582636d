"""What is trained on top of the encoder for one task. A head says which hidden states it reads, and what transformers
calls its weights."""

from typing import ClassVar

import torch
from fastbert_kernels import combine, hash_dropout
from torch import Tensor, nn

SITE = -1  # of dropout; those of the encoder count from 0


class PooledHead(nn.Module):
    """BERT's: [CLS] -> dense, tanh (the pooler) -> dropout -> linear.

    Args:
        outputs: logits for each example.
        dropout: probability, where row keys are given.
    """

    reads: slice | None = slice(1)
    """The tokens whose hidden states it reads, from the last block; None for all."""
    bert_names: ClassVar = {"pooler": "bert.pooler.dense", "classifier": "classifier"}
    """Its layers -> their names in transformers' BERT; our own class for transformers has ours."""

    def __init__(self, width: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.pooler = nn.Linear(width, width)
        self.classifier = nn.Linear(width, outputs)
        self.dropout = dropout

    def forward(self, hidden: Tensor, row_keys: Tensor | None) -> Tensor:
        """Logits [B, L] of hidden states [B, 1, D]; dropout where `row_keys` (int32 [B]) are given."""
        pooled = torch.tanh(self.pooler(hidden[:, 0]))
        if row_keys is not None:
            pooled = hash_dropout(pooled, combine(row_keys, SITE), self.dropout)
        return self.classifier(pooled)


class TokenHead(nn.Module):
    """BERT's for tokens: dropout -> linear at each.

    Args:
        outputs: logits for each token.
        dropout: probability, where row keys are given.
    """

    reads: slice | None = None
    bert_names: ClassVar = {"classifier": "classifier"}

    def __init__(self, width: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.classifier = nn.Linear(width, outputs)
        self.dropout = dropout

    def forward(self, hidden: Tensor, row_keys: Tensor | None) -> Tensor:
        """Logits [B, T, L] of hidden states [B, T, D]; dropout where `row_keys` (int32 [B]) are given."""
        if row_keys is not None:
            index = torch.arange(hidden.shape[1], dtype=torch.int32, device=hidden.device)
            hidden = hash_dropout(hidden, combine(combine(row_keys, SITE)[:, None], index), self.dropout)
        return self.classifier(hidden)
