"""TUPE: positions untied from words (Ke, He, Liu, ICLR 2021, arXiv 2006.15595).

With head size d, x the input of a layer and p the normalized position embeddings,

    TUPE-A  a_ij = (x_i Wq)(x_j Wk)^T / sqrt(2d) + reset( (p_i Uq)(p_j Uk)^T / sqrt(2d) )
    TUPE-R  a_ij = (x_i Wq)(x_j Wk)^T / sqrt(2d) + reset( (p_i Uq)(p_j Uk)^T / sqrt(2d) + b_bucket(j-i) )
    reset(v)_ij = theta1 where i is [CLS], theta2 where only j is [CLS], v_ij elsewhere

theta1 and theta2, one value each per head, come from two extra rows of the position table. The second term is the same
for all layers. `cls_attention: tied` omits the reset. Positions beyond the table have the p of its last position; the
distances of b have no limit.
"""

import torch
from torch import Tensor, nn

from fastbert.model.config import EncoderConfig
from fastbert.model.positions.encoding import PositionEncoding
from fastbert.model.positions.relative import RelativeBias, gather_pairs


class TupeAbsolute(PositionEncoding):
    token_types = 0  # as in the paper
    extrapolates = True

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.heads, self.max_positions = config.heads, config.max_positions
        self.untied = config.cls_attention == "untied"
        self.score_scale = (2 * config.head_size) ** -0.5
        # Rows: the positions, then, if untied, those of theta1 ([CLS] to all) and theta2 (all to [CLS]).
        self.table = nn.Embedding(config.max_positions + 2 * self.untied, config.width)
        self.register_buffer("indices", torch.arange(self.table.num_embeddings), persistent=False)
        self.norm = nn.LayerNorm(config.width, eps=1e-5, bias=config.bias)
        self.query = nn.Linear(config.width, config.width, bias=config.bias)
        self.key = nn.Linear(config.width, config.width, bias=config.bias)

    def bias(self, length: int, position_ids: Tensor | None) -> Tensor:
        if position_ids is None:
            return self._bias(length)[None]
        return gather_pairs(self._bias(torch.sym_max(length, self.max_positions)), position_ids)

    def _relative(self, length: int) -> Tensor | None:
        return None

    def _bias(self, length: int) -> Tensor:
        """[H, T, T] for positions 0 to T - 1."""
        rows = torch.arange(length, device=self.indices.device).clamp(max=self.max_positions - 1)
        if self.untied:
            rows = torch.cat([rows, self.indices[-2:]])
        p = self.norm(self.table(rows))
        # [H, T or T + 2, d]
        q = self.query(p).unflatten(-1, (self.heads, -1)).transpose(0, 1) * self.score_scale
        k = self.key(p).unflatten(-1, (self.heads, -1)).transpose(0, 1)
        bias = q[:, :length] @ k[:, :length].transpose(-1, -2)
        relative = self._relative(length)
        if relative is not None:
            bias = bias + relative
        if not self.untied:
            return bias
        theta1, theta2 = (q[:, length:] * k[:, length:]).sum(-1).to(bias.dtype).T  # [H] each
        first = torch.arange(length, device=bias.device) == 0
        bias = torch.where(first, theta2[:, None, None], bias)
        return torch.where(first[:, None], theta1[:, None, None], bias)

    @staticmethod
    def flops(config: EncoderConfig, length: int) -> int:
        rows = length + 2 * (config.cls_attention == "untied")
        return 2 * (2 * rows * config.width**2) + 2 * length**2 * config.width


class TupeRelative(TupeAbsolute):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.relative = RelativeBias(config)

    def _relative(self, length: int) -> Tensor:
        return self.relative(length, self.indices.device)
