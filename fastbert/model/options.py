"""Options of an encoder and of its note dictionary, as the user sets them."""

from dataclasses import dataclass, fields, replace
from typing import Annotated

from fastbert.config import choice
from fastbert.errors import OptionError, UserError
from fastbert.model.config import CLS_ATTENTION, FEED_FORWARD, NORM, SIZES, EncoderConfig
from fastbert.model.positions import POSITIONS
from fastbert.ranges import Count, Layers, NotNegative, Part, Probability, Range, Rate, Width, check_values


@dataclass(frozen=True)
class EncoderOptions:
    """Encoder architecture."""

    size: str = choice("base", SIZES)
    """Preset of layers and width: tiny 2x128, mini 4x256, small 4x512, base 12x768, large 24x1024."""
    layers: Layers | None = None
    """Transformer blocks (default: the preset's)."""
    width: Width | None = None
    """Hidden size (default: the preset's)."""
    heads: Count | None = None
    """Attention heads (default: one for every 64 of width)."""
    ffn: Annotated[int, Range(1, 2**20)] | None = None
    """Inner size of the feed-forward layers (default: 4 times the width; with geglu, which has a third matrix, 8/3 of
    the width, rounded up to a multiple of 64, or of 8 for widths below 64)."""
    feed_forward: str = choice("gelu", FEED_FORWARD)
    """Feed-forward layer: gelu(x W) (gelu, as BERT) or gelu(x W) * x V (geglu, arXiv 2002.05202)."""
    bias: bool = True
    """Biases in linear layers and LayerNorms. Without them, as in ModernBERT, only the outputs of heads have biases."""
    position: str = choice("tupe-r", POSITIONS, "position encoding")
    """Position encoding; docs/methods.md has the equations and papers."""
    rope_base: Annotated[float, Range(above=1)] = 10000.0
    """Base of rope's wavelengths, which range from 2 pi to about 2 pi times the base; ModernBERT uses 160000."""
    cls_attention: str = choice("untied", CLS_ATTENTION)
    """Attention of [CLS] with TUPE: untied gives it two learned values (the paper's reset), tied treats it as a
    word."""
    norm: str = choice("post", NORM)
    """LayerNorm after each residual sum (post, as BERT) or before each sublayer (pre)."""
    max_positions: Annotated[int, Range(1, 2**20)] | None = None
    """Positions of the encoder; no sequence of the training is longer (default: the run's length; positions beyond it
    are never trained)."""
    type_vocab_size: Annotated[int, Range(0, 2**16)] | None = None
    """Token types (segments) for pairs (default: 2, or 0 where the paper of the position encoding has none)."""
    dropout: Rate = 0.1
    """Dropout on embeddings and sublayer outputs."""
    attention_dropout: Rate = 0.1
    """Dropout on attention probabilities."""
    initializer_std: NotNegative = 0.02
    """Standard deviation of the initial weights."""

    def __post_init__(self) -> None:
        check_values(self)

    def inactive(self) -> set[str]:
        """Options without effect in this combination. Features that BERT lacks count only if they are used."""
        plain = {"feed_forward": self.feed_forward == "gelu", "bias": self.bias}
        return POSITIONS.unused(self.position) | {name for name, is_plain in plain.items() if is_plain}

    def like(self, given: EncoderConfig) -> "EncoderOptions":
        """Replaces the shape by that of `given`, a pretrained encoder that training starts from.

        Raises:
            UserError: an option was set to another value.
        """
        if self.size != EncoderOptions.size and SIZES.get(self.size) != (given.layers, given.width):
            raise UserError(f"size {self.size} is not that of the given weights; leave it out with --init-from")
        shape = {}
        for field in fields(self):
            if field.name in ("size", "dropout", "attention_dropout", "initializer_std"):
                continue
            if field.name == "max_positions" and self.max_positions is not None and not given.has_position_table():
                continue
            requested, shape[field.name] = getattr(self, field.name), getattr(given, field.name)
            if requested not in (field.default, shape[field.name]):
                raise UserError(
                    f"{field.name} {requested} does not fit the given weights, which have {shape[field.name]}; "
                    f"leave it out with --init-from, or give {shape[field.name]}"
                )
        return replace(self, size=EncoderOptions.size, **shape)

    def resolve(self, vocab_size: int, length: int) -> EncoderConfig:
        """Resolves all defaults, for a vocabulary and the longest sequence of a run.

        Raises:
            UserError: the heads do not divide the width, or the length exceeds the positions.
        """
        layers, width = SIZES[self.size]
        width = self.width if self.width is not None else width
        defaults = {
            "layers": layers,
            "width": width,
            "heads": max(1, width // 64),
            "ffn": default_ffn(width, self.feed_forward),
            "max_positions": length,
            "type_vocab_size": POSITIONS[self.position].token_types,
        }
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "size"}
        values = {name: defaults[name] if value is None else value for name, value in given.items()}
        if length > values["max_positions"]:
            raise UserError(
                f"length {length} is longer than the {values['max_positions']} positions; raise --max-positions or "
                "lower --length"
            )
        return EncoderConfig(vocab_size=vocab_size, **values)


def default_ffn(width: int, feed_forward: str) -> int:
    """Inner size with which the matrices have about 8 width^2 weights: two with gelu, three with geglu."""
    if feed_forward != "geglu":
        return 4 * width
    step = 64 if width >= 64 else 8
    return -(-8 * width // (3 * step)) * step


@dataclass(frozen=True)
class NoteDictionaryOptions:
    """Note dictionary for rare words (arXiv 2008.01466), used in pretraining only."""

    enabled: bool = False
    """Use a note dictionary: one note for each selected rare word, mixed into the word's embeddings."""
    half_window: Annotated[int, Range(0, 2**20)] = 8
    """Tokens of context on each side of the word, over which its note is averaged. (The paper's 16 gain as much, at a
    higher cost.)"""
    gamma: Part = 0.1
    """Weight of the new context in a note each time its word occurs (exponential moving average)."""
    mix: Probability = 0.5
    """Weight of the note in the word's input embedding, the paper's lambda."""
    min_count: Count = 50
    """Minimum number of occurrences, in the training text, of a word with a note."""
    max_count: Count = 500
    """Maximum number of occurrences of a word with a note. Prepared data must list these words: --rare-min and
    --rare-max of `fastbert prepare`."""
    fraction: Part = 0.2
    """Fraction of the text, in segments of 25 words, that contains a word with a note: words between the two counts are
    selected, in a fixed random order, until it is reached. It does not depend on the length of a sequence."""
    initial_std: NotNegative = 0.02
    """Standard deviation of the initial values of notes; 0 starts from zeros."""
    leak: bool = False
    """Read the note of a word even if pieces of it are masked, although the note reveals them (an ablation)."""

    def __post_init__(self) -> None:
        check_values(self)
        if self.min_count > self.max_count:
            raise OptionError(
                self, "min_count", f"must not be above max_count, {self.max_count}, but is {self.min_count}"
            )
