"""The interface of objectives: all that the loop, validation, evaluation, reports and dry runs know of one.

A subclass builds its networks in its constructor and overrides what it needs.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from fastbert.data.batches import Batch, Stream
from fastbert.data.tokenizer import WordPiece
from fastbert.model.config import EncoderConfig
from fastbert.model.encoder import Encoder, TokenIndex
from fastbert.model.note_dictionary import NoteDictionary, NoteTokens
from fastbert.objectives.masking import Masker, Masks
from fastbert.objectives.options import ObjectiveOptions
from fastbert.randomness import row_keys
from fastbert.training.world import ONE_PROCESS, World


class Figure(NamedTuple):
    """A line of a summary."""

    label: str
    value: float | None
    """None if it is not finite."""
    unit: str = ""
    """nats; % for a fraction that is shown as a percentage; empty for a plain number."""


@dataclass(frozen=True)
class Drawn:
    """A micro-batch with everything random about it."""

    input_ids: Tensor
    """[B, T], masked."""
    document_ids: Tensor | None
    position_ids: Tensor | None
    dropout_keys: Tensor | None
    """int32 [B], of the encoder; None where nothing is dropped."""
    counts: dict[str, Tensor]
    """What each loss is a mean over."""
    noted: NoteTokens | None
    """What is read from the notes and written to them."""


@dataclass(frozen=True)
class Masked(Drawn):
    """A micro-batch with its masks."""

    positions: Tensor
    """int64 [B, M]."""
    targets: Tensor
    """int64 [B, M]; -100 where nothing is masked."""


class Objective(nn.Module, ABC):
    """An encoder and what it learns by.

    Counts are known before any forward pass, so a loss over several micro-batches (or processes) is the exact mean over
    all of them. State that is no parameter is a persistent buffer: it is saved and restored with the weights.

    An export holds the parameters of `encoder` and, if they are those of a head that transformers knows (`hub.names`),
    of `head`.
    """

    loss_weights: Mapping[str, float]
    """Name of a loss -> its weight in the loss."""
    loss_in_nats: ClassVar[bool] = False
    """Whether the loss is the mean of the encoder's -log p(word) over the masked positions, in nats: it can be compared
    with the unigram entropy, and be given in bits per byte."""
    second_network: ClassVar[str] = ""
    """What fills the masks, where that is not the encoder; its loss at the masked positions is logged as `mlm_loss`."""
    parts: ClassVar[Mapping[str, tuple[str, ...]]] = {"head": ("head.",)}
    """Name of a part, for a dry run -> how the names of its parameters begin; the encoder's are known."""

    def __init__(
        self,
        config: EncoderConfig,
        options: ObjectiveOptions,
        vocabulary: WordPiece,
        kernels: str = "auto",
        notes: NoteDictionary | None = None,
    ) -> None:
        super().__init__()
        self.config, self.options, self.notes = config, options, notes
        self.masker = Masker(config.vocab_size, vocabulary, options)
        self.encoder = Encoder(config, kernels)

    @abstractmethod
    def draw(self, batch: Batch, seed: int, step: int, purpose: str = "mask") -> Drawn:
        """Everything random about a micro-batch, as a function of the arguments.

        Args:
            batch: rows with their indices in the global batch.
            seed: of the experiment.
            step: of the optimizer.
            purpose: mask, or validation-mask.
        """

    @abstractmethod
    def forward(self, drawn: Drawn) -> dict[str, Any]:
        """Name -> sum over the micro-batch, differentiable for the names in `loss_weights`. What is only measured may
        be a pair of sum and count."""

    def after_step(self, drawn: Sequence[Drawn], updated: Tensor, world: World = ONE_PROCESS) -> dict[str, Tensor]:
        """Is called after the optimizer; writes the notes, if there are any.

        Args:
            drawn: all micro-batches of the step.
            updated: bool [], whether the update was made.

        Returns:
            Scalars for the log.
        """
        return {} if self.notes is None else self.notes.write([part.noted for part in drawn], updated, world)

    def masked(self, batch: Batch, seed: int, step: int, purpose: str) -> tuple[Masks, dict[str, Any]]:
        """The masks of a micro-batch, arguments as for `draw`, and what `Masked` has of them, but for the counts."""
        masks = self.masker(batch.input_ids, row_keys(seed, purpose, step, batch.row_indices))
        return masks, {
            "input_ids": masks.input_ids,
            "positions": masks.positions,
            "targets": masks.targets,
            "document_ids": batch.document_ids,
            "position_ids": batch.position_ids,
            "dropout_keys": row_keys(seed, "dropout", step, batch.row_indices) if self.training else None,
            "noted": self.noted(batch, masks),
        }

    def noted(self, batch: Batch, masks: Masks) -> NoteTokens | None:
        """What a micro-batch reads from the notes and writes to them; None without notes."""
        if self.notes is None or batch.noted is None:
            return None
        return NoteTokens(self.notes, batch.noted, masks.positions, masks.valid, batch.input_ids.shape[1])

    def encode(self, drawn: Drawn, input_ids: Tensor, only: TokenIndex = None) -> Tensor:
        """The encoder's hidden states [B, T, D], or [B, M, D] of the tokens `only`; in training notes are written."""
        noted = drawn.noted
        return self.encoder(
            input_ids,
            document_ids=drawn.document_ids,
            position_ids=drawn.position_ids,
            row_keys=drawn.dropout_keys,
            only=only,
            edit_words=noted.edit if noted else None,
            show=noted.collect if noted and self.training else None,
        )

    @abstractmethod
    def flops(self, batch: int, length: int) -> int:
        """FLOPs of one training step over [B, T] in closed form, a multiply and an add counted as two."""

    def parameter_count(self) -> int:
        """Of all networks; what they share counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def examples(self, stream: Stream, vocabulary: WordPiece, length: int) -> tuple[str, list[str]]:
        """A heading, and a few sentences of held-out text with what the networks make of them; none by default."""
        return "", []

    def figures(self, measured: Mapping[str, float | None]) -> list[Figure]:
        """What a validation measured, for people."""
        return [Figure(name, value) for name, value in measured.items()]
