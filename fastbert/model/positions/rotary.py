"""RoPE: queries and keys of every layer are rotated by their positions (RoFormer: Su et al., arXiv 2104.09864).

With d the head size, elements n and n + d/2 of a query or key at position p are a point in a plane that is rotated:

    (x_n, x_n+d/2) -> (x_n cos a - x_n+d/2 sin a, x_n+d/2 cos a + x_n sin a)    a = p base^(-2n/d), n = 0 .. d/2 - 1

so that the score of tokens i and j depends on their content and on i - j alone. The paper pairs neighbors, 2n and
2n + 1; transformers' models pair the halves, as here. The two differ by the order of the rows of Wq and Wk.

Shapes: B batch, T tokens, H heads, K head size.
"""

import torch
from torch import Tensor

from fastbert.model.config import EncoderConfig
from fastbert.model.positions.encoding import PositionEncoding


class Rotary(PositionEncoding):
    """Rotation without parameters; the angles are computed in float32, regardless of the encoder's precision."""

    head_multiple = 2
    extrapolates = True

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.base, self.head_size = config.rope_base, config.head_size
        # Integers, which casts of the module do not round.
        self.register_buffer("evens", torch.arange(0, config.head_size, 2), persistent=False)

    def rotation(self, length: int, position_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        positions = torch.arange(length, device=self.evens.device)[None] if position_ids is None else position_ids
        frequencies = 1.0 / self.base ** (self.evens.float() / self.head_size)
        angles = (positions.float()[..., None] * frequencies)[:, None]  # [1 or B, 1, T, K / 2]
        return angles.cos(), angles.sin()
