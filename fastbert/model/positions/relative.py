"""BERT-R: absolute positions and, in every layer, T5's learned bias by the distance of tokens (arXiv 1910.10683).

Positions beyond the table have its last row. The bias has no limit: all large distances have the same bucket.
"""

import torch
from fastbert_kernels.attention.distances import from_diagonals, relative_bucket
from torch import Tensor, nn

from fastbert.model.config import EncoderConfig
from fastbert.model.positions.absolute import Absolute


class RelativeBias(nn.Module):
    """b_bucket(j - i) for each head: one table for all layers."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.buckets, self.max_distance = config.relative_buckets, config.relative_max_distance
        self.table = nn.Embedding(config.relative_buckets, config.heads)

    def forward(self, length: int, device: torch.device) -> Tensor:
        """[H, T, T] for positions 0 to T - 1."""
        distance = torch.arange(1 - length, length, device=device)
        by_distance = self.table(relative_bucket(distance, self.buckets, self.max_distance)).T  # [H, 2T - 1]
        return from_diagonals(by_distance, 0, length, length)


def gather_pairs(bias: Tensor, position_ids: Tensor) -> Tensor:
    """Gathers from [H, P, P], over positions, to [1 or B, H, T, T], over the tokens at `position_ids`."""
    return bias[:, position_ids[:, :, None], position_ids[:, None, :]].transpose(0, 1)


class Relative(Absolute):
    extrapolates = True
    bert_weights = None

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.max_positions = config.max_positions
        self.relative = RelativeBias(config)

    def embed(self, length: int, position_ids: Tensor | None) -> Tensor:
        positions = torch.arange(length, device=self.indices.device)[None] if position_ids is None else position_ids
        return self.table(positions.clamp(max=self.max_positions - 1))

    def bias(self, length: int, position_ids: Tensor | None) -> Tensor:
        if position_ids is None:
            return self.relative(length, self.indices.device)[None]
        longest = torch.sym_max(length, self.max_positions)
        return gather_pairs(self.relative(longest, self.indices.device), position_ids)
