"""ALiBi: attention scores decrease linearly with distance (Press, Smith, Lewis, ICLR 2022, arXiv 2108.12409).

    scores_ij = q_i k_j / sqrt(d) - slope_h |i - j|

The paper has causal attention; |i - j| is symmetric in both directions, as in MosaicBERT (arXiv 2312.17482). With m
heads, m a power of two, the slopes are 2^(-8/m), 2^(-16/m), ..., 2^-8. For other numbers of heads, as in the released
code, they are the slopes of the next lower power of two m, then every second slope of 2m, from the first: 2^(-4/m),
2^(-12/m), ...

Shapes: B batch, T tokens, H heads.
"""

import torch
from torch import Tensor

from fastbert.model.config import EncoderConfig
from fastbert.model.positions.encoding import PositionEncoding


class Alibi(PositionEncoding):
    """Linear biases without parameters."""

    extrapolates = True

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.power = 2 ** (config.heads.bit_length() - 1)  # m
        steps = [*range(2, 2 * self.power + 1, 2), *range(1, 2 * self.power, 2)][: config.heads]
        # Exponents in units of -4/m: integers, which casts of the module do not round.
        self.register_buffer("steps", torch.tensor(steps), persistent=False)

    def slopes(self) -> Tensor:
        """Slopes of the heads, [H]."""
        return torch.exp2(self.steps.float() * (-4 / self.power))

    def bias(self, length: int, position_ids: Tensor | None) -> Tensor:
        positions = torch.arange(length, device=self.steps.device)[None] if position_ids is None else position_ids
        distances = (positions[:, None, :, None] - positions[:, None, None, :]).abs()  # [1 or B, 1, T, T]
        return -self.slopes()[:, None, None] * distances
