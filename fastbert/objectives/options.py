"""Options of each objective."""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Self

from fastbert.errors import OptionError
from fastbert.model.config import SIZES, EncoderConfig
from fastbert.ranges import Layers, Part, Positive, Probability, Range, Width, check_values

MaskRate = Annotated[float, Range(above=0, most=0.9)]


@dataclass(frozen=True)
class ObjectiveOptions:
    """Options that all objectives have in common; an objective with further options extends this class."""

    mask_rate: MaskRate = 0.15
    """Fraction of the tokens of a row that are masked; newer recipes use 0.2 to 0.4 (arXiv 2202.08005)."""
    whole_word: bool = False
    """Mask all pieces of a word together; the probability of a word does not depend on its number of pieces."""

    mask_token_fraction: Probability = 1.0
    """Fraction of the masked tokens that show [MASK]; the rest show the word itself."""
    random_token_fraction: ClassVar[float] = 0.0
    """Fraction of the masked tokens that show a random word."""

    def __post_init__(self) -> None:
        check_values(self)

    def resolve(self, config: EncoderConfig) -> Self:
        """Fills in the defaults that depend on the encoder."""
        return self

    def networks(self, config: EncoderConfig) -> list[EncoderConfig]:
        """Configurations of the networks to train; the first is the encoder's, `config`.

        Raises:
            UserError: one of them cannot be built.
        """
        return [config]

    def warnings(self, config: EncoderConfig) -> list[str]:
        """Warnings to print before an encoder of `config` is trained."""
        return []


@dataclass(frozen=True)
class MLMOptions(ObjectiveOptions):
    """Masked language modeling."""

    mask_token_fraction: Probability = 0.8
    """Fraction of the masked tokens that show [MASK]."""
    random_token_fraction: Probability = 0.1
    """Fraction of the masked tokens that show a random word; the rest show the word itself."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask_token_fraction + self.random_token_fraction > 1.0:
            raise OptionError(
                self,
                "random_token_fraction",
                f"must be at most {1 - self.mask_token_fraction:g}, 1 - mask_token_fraction, "
                f"not {self.random_token_fraction}",
            )


def default_scale(width: int) -> float:
    """Width of a generator or meta controller as a fraction of the encoder's.

    The papers have three sizes: ELECTRA a quarter for Small (256) and Large (1024) and a third for Base (768), MC-BERT
    a third for Base. Widths between the presets small (512) and large (1024) count as Base. All others get the quarter,
    the less expensive of the two; ELECTRA's own comparison found a quarter to a half of the encoder's size best.
    """
    return 1 / 3 if SIZES["small"][1] < width < SIZES["large"][1] else 1 / 4


def scaled_width(width: int, scale: float) -> int:
    """The multiple of 8 nearest to width * scale, from 8 to `width`; `width` itself for a scale of 1."""
    return width if scale == 1 else min(width, max(8, 8 * round(width * scale / 8)))


@dataclass(frozen=True)
class ReplacementOptions(ObjectiveOptions):
    """Options that ELECTRA and multiple choice have in common."""

    mask_token_fraction: Probability = 0.85
    """Fraction of the masked tokens that show [MASK] to the generator or meta controller; the rest show the word
    itself."""
    unmasked_fraction: ClassVar[float] = 1.0
    """Fraction of the tokens without a mask at which the encoder's loss is computed in training."""


@dataclass(frozen=True)
class ElectraOptions(ReplacementOptions):
    """ELECTRA: replaced token detection (arXiv 2003.10555)."""

    generator_scale: Part | None = None
    """Width, inner width and heads of the generator as a fraction of the encoder's; the number of layers is the same,
    and the width is rounded to a multiple of 8 (default, as in the paper: 1/3 for widths from 513 to 1023, such as
    Base, else 1/4)."""
    loss_weight: Positive = 50.0
    """Weight of the detection loss, relative to the generator's loss."""

    def resolve(self, config: EncoderConfig) -> Self:
        """Fills in the generator's scale, by the width of the encoder."""
        return replace(self, generator_scale=self.generator_scale or default_scale(config.width))

    def networks(self, config: EncoderConfig) -> list[EncoderConfig]:
        """Configurations of the encoder and the generator."""
        scale = self.resolve(config).generator_scale
        return [config, config.scaled(scaled_width(config.width, scale))]


@dataclass(frozen=True)
class MultipleChoiceOptions(ReplacementOptions):
    """Multiple choice with a meta controller (MC-BERT, arXiv 2006.05744)."""

    choices: Annotated[int, Range(2)] = 10
    """Candidates at every token, [NOTA] included: the paper's k."""
    controller_layers: Layers | None = None
    """Transformer blocks of the meta controller (default: the encoder's number)."""
    controller_width: Width | None = None
    """Hidden size of the meta controller (default: 1/3 of the encoder's for widths from 513 to 1023, such as Base,
    as in the paper, else 1/4; rounded to a multiple of 8)."""
    loss_weight: Positive = 20.0
    """Weight of the choice loss, relative to the meta controller's loss: the paper's lambda."""
    mask_token_fraction: Probability = 1.0
    """Fraction of the masked tokens that show [MASK] to the meta controller; the rest show the word itself."""
    unmasked_fraction: Part = 1.0
    """Fraction of the tokens without a mask at which the encoder chooses in training; all masked ones count. A smaller
    fraction is faster. The odds are corrected for it, so validation and scores are of all tokens."""
    shared_bias: bool = False
    """One output bias for the meta controller and the choice head, as in the published code."""
    nota_embedding: bool = False
    """[NOTA] is a row of the word embedding, that of [PAD], with its bias, as in the published code; otherwise it has a
    vector and a bias in the choice head."""
    with_replacement: bool = False
    """Sample candidates with replacement and without excluding the token itself, as in the published code."""

    def resolve(self, config: EncoderConfig) -> Self:
        """Fills in the size of the meta controller, by that of the encoder."""
        width = self.controller_width or scaled_width(config.width, default_scale(config.width))
        return replace(self, controller_width=width, controller_layers=self.controller_layers or config.layers)

    def networks(self, config: EncoderConfig) -> list[EncoderConfig]:
        """Configurations of the encoder and the meta controller."""
        resolved = self.resolve(config)
        return [config, config.scaled(resolved.controller_width, resolved.controller_layers)]

    def warnings(self, config: EncoderConfig) -> list[str]:
        _, controller = self.networks(config)
        if controller.width <= config.width:
            return []
        return [
            f"the meta controller (width {controller.width}) is wider than the encoder (width {config.width}); it "
            "should be the smaller network, because it is discarded after training: lower "
            "--multiple-choice.controller-width"
        ]
