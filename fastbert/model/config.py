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
}
# Position schemes without a table of positions.
TABLELESS = ("rope", "alibi")


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
        choose("cls", self.cls, ("untied", "tied"))
        choose("norm", self.norm, ("post", "pre"))
        choose("feed_forward", self.feed_forward, ("gelu", "geglu"))
        for name, most in LARGEST.items():
            if getattr(self, name) < 1 and name != "type_vocab_size":
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


@dataclass(frozen=True)
class EncoderOptions:
    """The encoder."""

    size: str = "base"
    """Preset of layers and width: tiny 2x128, mini 4x256, small 4x512, base 12x768, large 24x1024."""
    layers: int | None = None
    """Transformer blocks (default: the preset's)."""
    width: int | None = None
    """Hidden size (default: the preset's)."""
    heads: int | None = None
    """Attention heads (default: one for every 64 of width)."""
    ffn: int | None = None
    """Inner size of the feed-forward layers (default: 4 times the width; with geglu, whose third matrix would make it
    half as large again, 8/3 of the width, rounded up to a multiple of 64, or of 8 where the width is less than 64)."""
    feed_forward: str = "gelu"
    """Inner layer: gelu(x W) (gelu, as BERT) or gelu(x W) * x V (geglu, arXiv 2002.05202)."""
    bias: bool = True
    """Biases in linear layers and LayerNorms. Without, as in ModernBERT, the outputs of heads alone keep theirs."""
    position: str = "absolute"
    """Where word order enters: absolute (BERT), relative (BERT with T5's bias, arXiv 1910.10683), tupe-a or tupe-r
    (positions untied from words, arXiv 2006.15595), rope (queries and keys rotated, arXiv 2104.09864) or alibi (scores
    lowered by distance, arXiv 2108.12409)."""
    rope_base: float = 10000.0
    """With rope: the base of its wavelengths, from 2 pi to about 2 pi times it; ModernBERT takes 160000."""
    cls: str = "untied"
    """With TUPE: untied gives [CLS] its own two attention values (the paper's reset), tied treats it as a word."""
    norm: str = "post"
    """LayerNorm after each residual sum (post, as BERT) or before each sublayer (pre)."""
    max_positions: int | None = None
    """Longest sequence the encoder takes (default: the run's length; what lies beyond is never trained). With rope and
    alibi no weight depends on it."""
    type_vocab_size: int | None = None
    """Token types (segments) for pairs (default: 2, with TUPE 0, as in its paper)."""
    dropout: float = 0.1
    """Dropout on embeddings and sublayer outputs."""
    attention_dropout: float = 0.1
    """Dropout on attention probabilities."""
    initializer_std: float = 0.02
    """Standard deviation of the initial weights."""

    def like(self, given: EncoderConfig) -> "EncoderOptions":
        """These options with the shape of `given`, an encoder whose weights are to be taken.

        Raises:
            UserError: an option was set to something else.
        """
        if self.size != EncoderOptions.size and SIZES.get(self.size) != (given.layers, given.width):
            raise UserError(f"size {self.size} is not that of the given weights: leave it out with --init-from")
        shape = {}
        for field in fields(self):
            if field.name in ("size", "dropout", "attention_dropout", "initializer_std"):
                continue
            if field.name == "max_positions" and given.position in TABLELESS and self.max_positions is not None:
                continue  # no weight depends on it
            asked, shape[field.name] = getattr(self, field.name), getattr(given, field.name)
            if asked not in (field.default, shape[field.name]):
                raise UserError(
                    f"{field.name} {asked} does not fit the given weights, which have {shape[field.name]}; "
                    "leave it out with --init-from"
                )
        return replace(self, size=EncoderOptions.size, **shape)

    def resolve(self, vocab_size: int, length: int) -> EncoderConfig:
        """All numbers, for a vocabulary and the longest sequence of a run.

        Raises:
            UserError: an unknown preset or variant, heads that do not divide the width, a length over the positions.
        """
        layers, width = SIZES[choose("size", self.size, SIZES)]
        width = self.width if self.width is not None else width
        tupe = self.position.startswith("tupe")
        max_positions = self.max_positions if self.max_positions is not None else length
        if length > max_positions:
            raise UserError(
                f"length {length} is longer than the {max_positions} positions; raise --max-positions or lower --length"
            )
        return EncoderConfig(
            vocab_size=vocab_size,
            layers=self.layers if self.layers is not None else layers,
            width=width,
            heads=self.heads if self.heads is not None else max(1, width // 64),
            ffn=self.ffn if self.ffn is not None else default_ffn(width, self.feed_forward),
            max_positions=max_positions,
            type_vocab_size=self.type_vocab_size if self.type_vocab_size is not None else (0 if tupe else 2),
            position=self.position,
            cls=self.cls,
            norm=self.norm,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            initializer_std=self.initializer_std,
            feed_forward=self.feed_forward,
            bias=self.bias,
            rope_base=self.rope_base,
        )


def default_ffn(width: int, feed_forward: str) -> int:
    """The inner size that makes about 8 width^2 weights: of two matrices with gelu, of three with geglu."""
    if feed_forward != "geglu":
        return 4 * width
    step = 64 if width >= 64 else 8
    return -(-8 * width // (3 * step)) * step
