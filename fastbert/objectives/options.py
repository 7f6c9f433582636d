"""The options of each objective."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from fastbert.errors import OptionError
from fastbert.model.config import EncoderConfig
from fastbert.ranges import Layers, Part, Positive, Probability, Range, Width, check_values

MaskRate = Annotated[float, Range(above=0, most=0.9)]


@dataclass(frozen=True)
class ObjectiveOptions:
    """The options of every objective; one that has more of them extends this class."""

    mask_rate: MaskRate = 0.15
    """Fraction of the tokens of a row that are masked; newer recipes take 0.2 to 0.4 (arXiv 2202.08005)."""
    whole_word: bool = False
    """Mask all pieces of a word together; every word has the same probability, whatever its number of pieces."""

    mask_token_fraction: Probability = 1.0
    """Of the masked tokens, the fraction that shows [MASK]; the rest shows the word itself."""
    random_token_fraction: ClassVar[float] = 0.0
    """Of the masked tokens, the fraction that shows a random word."""

    def __post_init__(self) -> None:
        check_values(self)

    def networks(self, config: EncoderConfig) -> list[EncoderConfig]:
        """The networks that are trained, the encoder of `config` first; a UserError if one of them cannot be built."""
        return [config]

    def warnings(self, config: EncoderConfig) -> list[str]:
        """What to print before training an encoder of `config`."""
        return []


@dataclass(frozen=True)
class MLMOptions(ObjectiveOptions):
    """Masked language modelling."""

    mask_token_fraction: Probability = 0.8
    """Of the masked tokens, the fraction that shows [MASK]."""
    random_token_fraction: Probability = 0.1
    """Of the masked tokens, the fraction that shows a random word; the rest shows the word itself."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask_token_fraction + self.random_token_fraction > 1.0:
            raise OptionError(
                self,
                "random_token_fraction",
                f"must be at most {1 - self.mask_token_fraction:g}, 1 - mask_token_fraction, "
                f"not {self.random_token_fraction}",
            )


@dataclass(frozen=True)
class ReplacementOptions(ObjectiveOptions):
    """Options of both objectives."""

    mask_token_fraction: Probability = 0.85
    """Of the masked tokens, the fraction that shows [MASK] to the generator or meta controller; the rest shows the word
    itself."""


@dataclass(frozen=True)
class ElectraOptions(ReplacementOptions):
    """ELECTRA: replaced token detection (arXiv 2003.10555)."""

    generator_scale: Part = 0.25
    """Width, inner width and heads of the generator as a fraction of the main network's; it has as many layers. The
    width is rounded to a multiple of 8."""
    loss_weight: Positive = 50.0
    """Weight of the detection loss next to the generator's."""

    def networks(self, config: EncoderConfig) -> list[EncoderConfig]:
        """The encoder, and the generator."""
        width = config.width
        if self.generator_scale < 1.0:
            width = min(width, max(8, 8 * round(width * self.generator_scale / 8)))
        return [config, config.scaled(width)]


@dataclass(frozen=True)
class MultipleChoiceOptions(ReplacementOptions):
    """Multiple choice with a meta controller (MC-BERT, arXiv 2006.05744)."""

    choices: Annotated[int, Range(2)] = 10
    """Candidates at every token, [NOTA] included: the paper's k."""
    controller_layers: Layers | None = None
    """Blocks of the controller (default: as many as the encoder has)."""
    controller_width: Width | None = None
    """Hidden size of the controller (default: a quarter of the encoder's, a multiple of 8)."""
    loss_weight: Positive = 20.0
    """Weight of the choice loss next to the controller's: the paper's lambda."""

    def networks(self, config: EncoderConfig) -> list[EncoderConfig]:
        """The encoder, and the meta controller."""
        width = self.controller_width or min(config.width, max(8, 8 * round(config.width / 32)))
        return [config, config.scaled(width, self.controller_layers)]

    def warnings(self, config: EncoderConfig) -> list[str]:
        _, controller = self.networks(config)
        if controller.width <= config.width:
            return []
        return [
            f"the controller (width {controller.width}) is wider than the encoder (width {config.width}): it is meant "
            "to be the smaller network, and is dropped after training; lower --multiple-choice.controller-width"
        ]
