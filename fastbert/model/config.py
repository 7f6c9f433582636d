"""Configuration of an encoder, and presets of its size."""

from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Annotated, Any

from fastbert.config import choice
from fastbert.errors import UserError, brief, nearest
from fastbert.model.positions import POSITIONS
from fastbert.ranges import Range, Rate, check_values, plain
from fastbert.records import check

# The sizes of BERT's own releases (Devlin et al. 2019; the small ones Turc et al. 2019): layers, width.
SIZES = {"tiny": (2, 128), "mini": (4, 256), "small": (4, 512), "base": (12, 768), "large": (24, 1024)}
CLS_ATTENTION, NORM, FEED_FORWARD = ("untied", "tied"), ("post", "pre"), ("gelu", "geglu")


@dataclass(frozen=True)
class EncoderConfig:
    """All hyperparameters of an encoder, enough to rebuild it from its weights. The ranges are wide: they only
    reject values of damaged files."""

    vocab_size: Annotated[int, Range(1, 2**28)]
    layers: Annotated[int, Range(1, 2**12)]
    width: Annotated[int, Range(1, 2**20)]
    heads: Annotated[int, Range(1, 2**20)]
    ffn: Annotated[int, Range(1, 2**24)]
    max_positions: Annotated[int, Range(1, 2**28)]
    type_vocab_size: Annotated[int, Range(0, 2**20)] = 2
    position: str = choice("absolute", POSITIONS, "position encoding")
    cls_attention: str = choice("untied", CLS_ATTENTION)
    norm: str = choice("post", NORM)
    dropout: Rate = 0.1
    attention_dropout: Rate = 0.1
    norm_eps: Annotated[float, Range(0, 10**6)] = 1e-12
    initializer_std: Annotated[float, Range(0, 10**6)] = 0.02
    relative_buckets: Annotated[int, Range(4, 2**16)] = 32
    relative_max_distance: Annotated[int, Range(1, 2**28)] = 128
    feed_forward: str = choice("gelu", FEED_FORWARD)
    bias: bool = True
    rope_base: Annotated[float, Range(above=1, most=10**12)] = 10000.0

    def __post_init__(self) -> None:
        check_values(self)
        if self.width % self.heads:
            raise UserError(
                f"heads {self.heads} do not divide width {self.width}; choose heads among the divisors of the width"
            )
        if self.relative_buckets % 4:
            raise UserError(f"relative_buckets must be a multiple of 4, not {self.relative_buckets}")
        if self.relative_max_distance <= self.relative_buckets // 4:
            raise UserError(f"relative_max_distance must exceed {self.relative_buckets // 4}, a quarter of the buckets")
        if self.head_size % (multiple := POSITIONS[self.position].head_multiple):
            raise UserError(
                f"position {self.position} needs a head size that is a multiple of {multiple}, and width {self.width} "
                f"with heads {self.heads} gives {self.head_size}; choose another width or number of heads"
            )

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    def has_position_table(self) -> bool:
        """True if the number of position parameters depends on `max_positions`."""
        count = POSITIONS[self.position].parameters_of
        return count(self) != count(replace(self, max_positions=self.max_positions + 1))

    def scaled(self, width: int, layers: int | None = None) -> "EncoderConfig":
        """Configuration of a generator or meta controller of `width`: the same number of layers unless `layers` is
        given, a proportional inner width, and the head size nearest to this one's that divides the width and that the
        position encoding allows.

        Raises:
            UserError: the position encoding allows no head size.
        """
        target = width * self.heads / self.width
        divisors = [heads for heads in range(1, width + 1) if width % heads == 0]
        multiple = POSITIONS[self.position].head_multiple
        divisors = [heads for heads in divisors if width // heads % multiple == 0] or divisors
        heads = min(divisors, key=lambda heads: (abs(heads - target), heads))
        ffn = max(1, round(width * self.ffn / self.width))
        return replace(self, width=width, layers=layers or self.layers, heads=heads, ffn=ffn)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "EncoderConfig":
        """Builds a configuration.

        Raises:
            UserError: an option is unknown, missing, or has a wrong type or value.
        """
        if "cls" in values:  # renamed to cls_attention
            raise UserError(
                "the encoder's configuration was written by an older version of fastbert, which had the option cls; "
                "give the export of that run, the folder model/ in it, or use that version"
            )
        known = {field.name for field in fields(cls)}
        for name in values:
            if name not in known:
                raise UserError(f"unknown encoder option {brief(name)}; {nearest(name, known)}")
        shape = {f.name if f.default is MISSING else f"{f.name}?": plain(f.type) for f in fields(cls)}
        return cls(**check(values, shape, "the encoder's configuration"))


def check_length(config: EncoderConfig, length: int, what: str) -> str | None:
    """Checks that an encoder can read sequences of `length` tokens, which `what` names in messages: "length 64".

    Returns:
        A warning if they are longer than the positions and the position encoding extrapolates, else None.

    Raises:
        UserError: they are longer than the positions, and the position encoding defines none beyond.
    """
    if length <= config.max_positions:
        return None
    problem = f"{what} is longer than the {config.max_positions} positions of the model"
    if POSITIONS[config.position].extrapolates:
        return f"{problem}; position encoding {config.position} extrapolates, often with a higher loss"
    others = ", ".join(name for name in POSITIONS if POSITIONS[name].extrapolates)
    raise UserError(
        f"{problem}, and position encoding {config.position} defines none beyond; shorten it, or use a model with an "
        f"encoding that extrapolates: {others}"
    )
