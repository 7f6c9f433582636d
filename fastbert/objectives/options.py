"""The user's options of each objective."""

from dataclasses import dataclass
from typing import ClassVar

from fastbert.errors import UserError
from fastbert.model.config import EncoderConfig


@dataclass(frozen=True)
class MLMOptions:
    """Masked language modelling."""

    mask_rate: float = 0.15
    """Share of the tokens of a row that are predicted; newer recipes take 0.2 to 0.4 (arXiv 2202.08005)."""
    mask_token_share: float = 0.8
    """Of those, the share that shows [MASK]."""
    random_token_share: float = 0.1
    """Of those, the share that shows a random word; the rest shows the word itself."""
    whole_word: bool = False
    """Mask all pieces of a word together; every word has the same probability, whatever its number of pieces."""

    def __post_init__(self) -> None:
        if not 0.0 < self.mask_rate <= 0.9:
            raise UserError(f"mlm.mask_rate must lie in (0, 0.9], not {self.mask_rate}")
        for name in ("mask_token_share", "random_token_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UserError(f"mlm.{name} must lie in [0, 1], not {getattr(self, name)}")
        if self.mask_token_share + self.random_token_share > 1.0:
            raise UserError(
                f"mlm.mask_token_share {self.mask_token_share} and mlm.random_token_share {self.random_token_share} "
                "add up to more than 1"
            )


@dataclass(frozen=True)
class ReplacementOptions:
    """Options of both objectives."""

    group: ClassVar[str]

    mask_rate: float = 0.15
    """Share of the tokens of a row that the small network fills."""
    mask_token_share: float = 0.85
    """Of those, the share that shows it [MASK]; the rest shows the word itself."""
    whole_word: bool = False
    """Mask all pieces of a word together; every word has the same probability, whatever its number of pieces."""

    def __post_init__(self) -> None:
        if not 0.0 < self.mask_rate <= 0.9:
            raise UserError(f"{self.group}.mask_rate must lie in (0, 0.9], not {self.mask_rate}")
        if not 0.0 <= self.mask_token_share <= 1.0:
            raise UserError(f"{self.group}.mask_token_share must lie in [0, 1], not {self.mask_token_share}")
        if not self.weight > 0.0:
            raise UserError(f"{self.group}.weight must be greater than 0, not {self.weight}")


@dataclass(frozen=True)
class ElectraOptions(ReplacementOptions):
    """ELECTRA: replaced token detection (arXiv 2003.10555)."""

    group: ClassVar[str] = "electra"

    generator_scale: float = 0.25
    """Width, inner width and heads of the generator as a share of the main network's; it has as many layers. The width
    is rounded to a multiple of 8."""
    weight: float = 50.0
    """Of the detection loss beside the generator's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.generator_scale <= 1.0:
            raise UserError(f"electra.generator_scale must lie in (0, 1], not {self.generator_scale}")


@dataclass(frozen=True)
class MultipleChoiceOptions(ReplacementOptions):
    """Multiple choice with a meta controller (MC-BERT, arXiv 2006.05744)."""

    group: ClassVar[str] = "multiple_choice"

    choices: int = 10
    """Candidates at every token, [NOTA] included: the paper's k."""
    controller_layers: int | None = None
    """Blocks of the controller (default: as many as the encoder has)."""
    controller_width: int | None = None
    """Hidden size of the controller (default: a quarter of the encoder's, a multiple of 8)."""
    weight: float = 20.0
    """Of the choice loss beside the controller's: the paper's lambda."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.choices < 2:
            raise UserError(f"multiple_choice.choices must be at least 2, a word and [NOTA], not {self.choices}")
        for name in ("controller_layers", "controller_width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"multiple_choice.{name} must be at least 1, not {value}")

    def controller(self, config: EncoderConfig) -> EncoderConfig:
        """The controller's numbers beside an encoder of `config`."""
        width = self.controller_width or min(config.width, max(8, 8 * round(config.width / 32)))
        return config.small(width, self.controller_layers)

    def remarks(self, config: EncoderConfig) -> list[str]:
        """What a user should hear before training an encoder of `config`."""
        width = self.controller(config).width
        if width <= config.width:
            return []
        return [
            f"the controller (width {width}) is wider than the encoder (width {config.width}): it is meant to be the "
            "small network, and is dropped after training; lower --multiple-choice.controller-width"
        ]
