"""What an encoder is made of: the user's options, the presets they start from, and the numbers that result."""

import math
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any

from fastbert.errors import UserError, brief, choose, nearest
from fastbert.records import check

# The sizes of BERT's own releases (Devlin et al. 2019; the small ones Turc et al. 2019): layers, width.
SIZES = {"tiny": (2, 128), "mini": (4, 256), "small": (4, 512), "base": (12, 768), "large": (24, 1024)}
# Of each number the most that an encoder can be built with, far beyond those in use: what a file claims has a bound.
LARGEST = {
    "vocab_size": 2**28,
    "layers": 2**12,
    "width": 2**20,
    "heads": 2**20,
    "ffn": 2**24,
    "max_positions": 2**28,
    "type_vocab_size": 2**20,
    "relative_buckets": 2**16,
    "relative_max_distance": 2**28,
    "norm_eps": 10**6,
    "initializer_std": 10**6,
    "rope_base": 10**12,
}
# Position schemes without a table of positions.
TABLELESS = ("rope", "alibi")
CLS, NORM, FEED_FORWARD = ("untied", "tied"), ("post", "pre"), ("gelu", "geglu")


@dataclass(frozen=True)
class EncoderConfig:
    """Every number of an encoder; enough, with the weights, to rebuild it."""

    vocab_size: int
    layers: int
    width: int
    heads: int
    ffn: int
    max_positions: int
    type_vocab_size: int = 2
    position: str = "absolute"
    cls: str = "untied"
    norm: str = "post"
    dropout: float = 0.1
    attention_dropout: float = 0.1
    norm_eps: float = 1e-12
    initializer_std: float = 0.02
    relative_buckets: int = 32
    relative_max_distance: int = 128
    feed_forward: str = "gelu"
    bias: bool = True
    rope_base: float = 10000.0

    def __post_init__(self) -> None:
        choose("cls", self.cls, CLS)
        choose("norm", self.norm, NORM)
        choose("feed_forward", self.feed_forward, FEED_FORWARD)
        for name, most in LARGEST.items():
            if getattr(self, name) < 1 and name in ("vocab_size", "layers", "width", "heads", "ffn", "max_positions"):
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
            if getattr(self, name) > most:
                raise UserError(f"{name} must be at most {most}, not {getattr(self, name)}")
        if self.type_vocab_size < 0:
            raise UserError(f"type_vocab_size cannot be negative, as {self.type_vocab_size} is")
        for name in ("norm_eps", "initializer_std"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} must be a number from 0, not {getattr(self, name)}")
        if self.width % self.heads:
            raise UserError(
                f"heads {self.heads} do not divide width {self.width}; choose heads among the divisors of the width"
            )
        for name in ("dropout", "attention_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UserError(f"{name} must lie in [0, 1), not {getattr(self, name)}")
        if not 0.0 <= self.initializer_std < math.inf:
            raise UserError(f"initializer_std must be a number from 0, not {self.initializer_std}")
        if self.relative_buckets < 4 or self.relative_buckets % 4:
            raise UserError(f"relative_buckets must be a multiple of 4, not {self.relative_buckets}")
        if self.relative_max_distance <= self.relative_buckets // 4:
            raise UserError(f"relative_max_distance must exceed {self.relative_buckets // 4}, a quarter of the buckets")

        if not 1.0 < self.rope_base < math.inf:
            raise UserError(f"rope_base must be a number greater than 1, not {self.rope_base}")
        if self.position == "rope" and self.head_size % 2:
            raise UserError(
                f"position rope turns pairs of numbers, so it takes heads of even size, and width {self.width} with "
                f"heads {self.heads} makes {self.head_size}; choose another width or other heads"
            )

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    def linear_parameters(self, inputs: int, outputs: int) -> int:
        """Of a linear layer, with biases if the encoder has them."""
        return inputs * outputs + (outputs if self.bias else 0)

    def norm_parameters(self) -> int:
        """Of a LayerNorm over the width."""
        return self.width * (2 if self.bias else 1)

    def small(self, width: int, layers: int | None = None) -> "EncoderConfig":
        """The numbers of a second network beside this one, of `width`: as many layers unless `layers` are given, the
        inner width in proportion, and the head size as near to this one's as a divisor of the width allows (with rope
        an even one).

        Raises:
            UserError: with rope, an odd width.
        """
        wanted = width * self.heads / self.width
        divisors = [heads for heads in range(1, width + 1) if width % heads == 0]
        if self.position == "rope":
            divisors = [heads for heads in divisors if width // heads % 2 == 0] or divisors
        heads = min(divisors, key=lambda heads: (abs(heads - wanted), heads))
        ffn = max(1, round(width * self.ffn / self.width))
        return replace(self, width=width, layers=layers or self.layers, heads=heads, ffn=ffn)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "EncoderConfig":
        """
        Raises:
            UserError: an option is unknown, missing, or has another type or an impossible value.
        """
        known = {field.name for field in fields(cls)}
        for name in values:
            if name not in known:
                raise UserError(f"unknown encoder option {brief(name)}; {nearest(name, known)}")
        shape = {f.name if f.default is MISSING else f"{f.name}?": f.type for f in fields(cls)}
        return cls(**check(values, shape, "the encoder's configuration"))
