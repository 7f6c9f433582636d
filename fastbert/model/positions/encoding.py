"""Interface of position encodings. An encoding subclasses `PositionEncoding` and overrides the methods it needs.

The source of an encoding is part of its exports. Therefore its module imports only torch, the standard library,
`fastbert.model.positions`, `fastbert_kernels`, and `EncoderConfig` for annotations, and reads only fields of the
configuration and `head_size`. A buffer that is not saved belongs to the encoding itself, not to a submodule, and holds
integers if casts must not round it. Tables are read by calling their module, never by its weight, because in an
offloaded export the call loads them. The device is that of a buffer.

Shapes: B batch, T tokens, D width, H heads, K head size.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from fastbert.model.config import EncoderConfig


class PositionEncoding(nn.Module):
    """Base class: no positions, scores scaled as in BERT.

    `position_ids` is an integer [1 or B, T], each below T or `max_positions`, whichever is larger; or None for 0 to
    T - 1 in every row. Position 0 belongs to [CLS] alone.
    """

    head_multiple: ClassVar[int] = 1
    """Number that must divide the head size."""
    token_types: ClassVar[int] = 2
    """Default of `type_vocab_size`."""
    extrapolates: ClassVar[bool] = False
    """True if all methods are defined for positions from `max_positions` on; without it longer sequences are
    refused."""
    shared: ClassVar[tuple[str, ...]] = ()
    """Submodules that `embed` uses. ELECTRA's generator uses the main encoder's, as it does with the
    embeddings."""
    bert_weights: ClassVar[dict[str, str] | None] = None
    """Names of the encoding's weights -> names in transformers' BERT, if BERT computes the same."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.score_scale = config.head_size**-0.5
        """Factor of q k^T."""

    def embed(self, length: int, position_ids: Tensor | None) -> Tensor | None:
        """[1 or B, T, D], added to the word embeddings."""
        return None

    def bias(self, length: int, position_ids: Tensor | None) -> Tensor | None:
        """[1 or B, H, T, T], added to the scaled scores of every layer."""
        return None

    def rotation(self, length: int, position_ids: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """cos and sin, each [1 or B, 1, T, K / 2], by which `rotate` rotates queries and keys of every layer."""
        return None

    def forward(
        self, length: int, position_ids: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, tuple[Tensor, Tensor] | None]:
        """Results of the three methods. An export calls the module, so that hooks that load its weights run first."""
        return self.embed(length, position_ids), self.bias(length, position_ids), self.rotation(length, position_ids)

    @classmethod
    def parameters_of(cls, config: EncoderConfig) -> int:
        """Number of parameters."""
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in cls(config).parameters())

    @staticmethod
    def flops(config: EncoderConfig, length: int) -> int:
        """FLOPs of one forward pass in closed form, a multiply and an add counted as two."""
        return 0


def rotate(x_BHTK: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates queries or keys: elements n and n + K/2 are a point in a plane, rotated by the angle whose cos and sin
    [1 or B, 1, T, K / 2] are `rotation`."""
    cos, sin = rotation
    a, b = x_BHTK.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x_BHTK.dtype)
