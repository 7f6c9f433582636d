"""Interface of objectives for the training loop, validation, evaluation, reports and dry runs.

A subclass builds its networks in the constructor and overrides the methods it needs.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
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


class Metric(NamedTuple):
    """A metric of a validation, as one line of a summary."""

    label: str
    value: float | None
    """None if it is not finite."""
    unit: str = ""
    """nats; % for a fraction that is printed as a percentage; empty for a plain number."""
    words: bool = False
    """True for a mean -log p(word) over the masked positions, which is compared with the unigram entropy."""
    chance: float | None = None
    """Value of the best constant guess, if it is known."""


@dataclass(frozen=True)
class Inputs:
    """Inputs of a forward pass: a micro-batch with all random choices sampled."""

    input_ids: Tensor
    """int64 [B, T], with masks."""
    document_ids: Tensor | None
    position_ids: Tensor | None
    dropout_keys: Tensor | None
    """int32 [B], keys of the encoder's dropout; None without dropout."""
    counts: dict[str, Tensor]
    """Name of a loss -> number of terms in its sum; the loss is reported as sum / count."""
    note_tokens: NoteTokens | None
    """Words that read and write the note dictionary; None without one."""
    counted: bool = field(default=True, kw_only=True)
    """`Batch.counted`."""

    def counting(self, value: Tensor) -> Tensor:
        """`value`, or zero if the micro-batch does not count."""
        return value if self.counted else torch.zeros_like(value)


@dataclass(frozen=True)
class MaskedInputs(Inputs):
    """Inputs with masked positions."""

    positions: Tensor
    """int64 [B, M], the masked positions."""
    targets: Tensor
    """int64 [B, M], the original words; -100 where nothing is masked."""


class Objective(nn.Module, ABC):
    """An encoder, with the heads, further networks and losses that train it.

    `sample` gives the counts of the losses before any forward pass, so the loss over several micro-batches (or
    processes) is the exact mean over all of them. State that is not a parameter must be a persistent buffer: buffers
    are saved and restored with the weights.

    An export holds the parameters of `encoder` and, if they are those of a head that transformers knows (`hub.names`),
    of `head`.
    """

    loss_weights: Mapping[str, float]
    """Name of a loss -> its weight in the total loss."""
    loss_in_nats: ClassVar[bool] = False
    """True if the loss is the encoder's mean -log p(word) over the masked positions, in nats. It is then compared with
    the unigram entropy and reported in bits per byte."""
    second_network: ClassVar[str] = ""
    """Name of the network that fills the masks, if it is not the encoder; its loss is logged as `mlm_loss`."""
    parts: ClassVar[Mapping[str, tuple[str, ...]]] = {"head": ("head.",)}
    """Name of a part of the model -> prefixes of its parameters' names; without the encoder. For dry runs, and for
    --init-from, which copies a part as a whole or not at all."""
    word_rows: ClassVar[tuple[str, ...]] = ("encoder.words.weight",)
    """Names of parameters with a row for each word of the vocabulary; of a tied one the first. --init-from appends rows
    to them for new words."""

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
    def sample(self, batch: Batch, seed: int, step: int, purpose: str = "mask") -> Inputs:
        """Makes all random choices for a micro-batch (masks, replacements, dropout keys), as a function of the
        arguments alone.

        Args:
            batch: rows with their indices in the global batch.
            seed: seed of the experiment.
            step: optimizer step.
            purpose: mask or validation-mask.
        """

    @abstractmethod
    def forward(self, inputs: Inputs) -> dict[str, Any]:
        """Computes the losses of a micro-batch.

        Returns:
            Name -> sum over the micro-batch, differentiable for the names in `loss_weights`. A further metric may be a
            pair (sum, count).
        """

    def after_step(
        self, micro_batches: Sequence[Inputs], updated: Tensor, world: World = ONE_PROCESS
    ) -> dict[str, Tensor]:
        """Updates state after an optimizer step: the note dictionary, if there is one.

        Args:
            micro_batches: the inputs of all micro-batches of the step.
            updated: bool [], false if the update was skipped because a loss or gradient was not finite.

        Returns:
            Scalars for the log.
        """
        if self.notes is None:
            return {}
        return self.notes.write([part.note_tokens for part in micro_batches], updated, world)

    def sample_masks(self, batch: Batch, seed: int, step: int, purpose: str) -> tuple[Masks, dict[str, Any]]:
        """Masks of a micro-batch, and the fields of `MaskedInputs` except `counts`; arguments as for `sample`."""
        masks = self.masker(batch.input_ids, row_keys(seed, purpose, step, batch.row_indices))
        return masks, {
            "input_ids": masks.input_ids,
            "positions": masks.positions,
            "targets": masks.targets,
            "document_ids": batch.document_ids,
            "position_ids": batch.position_ids,
            "dropout_keys": row_keys(seed, "dropout", step, batch.row_indices) if self.training else None,
            "note_tokens": self.note_tokens(batch, masks),
            "counted": batch.counted,
        }

    def note_tokens(self, batch: Batch, masks: Masks) -> NoteTokens | None:
        """Words of a micro-batch that read and write the note dictionary; None without one."""
        if self.notes is None or batch.noted is None:
            return None
        size = batch.input_ids.numel() if batch.counted else 0
        return NoteTokens(self.notes, batch.noted, masks.positions, masks.valid, batch.input_ids.shape[1], size)

    def encode(self, inputs: Inputs, input_ids: Tensor, only: TokenIndex = None) -> Tensor:
        """Hidden states of the encoder, [B, T, D], or [B, M, D] of the tokens `only`. In training, those around words
        with notes are collected for the note dictionary."""
        notes = inputs.note_tokens
        return self.encoder(
            input_ids,
            document_ids=inputs.document_ids,
            position_ids=inputs.position_ids,
            row_keys=inputs.dropout_keys,
            only=only,
            edit_words=notes.edit if notes else None,
            windows=notes.windows if notes and self.training else None,
        )

    @property
    def word_network(self) -> Encoder | None:
        """The network that predicts masked words, or None. A subclass with one also has `word_logits(hidden)`, which
        maps its hidden states [..., S] to logits over the vocabulary [..., V]."""
        return None

    @abstractmethod
    def flops(self, batch: int, length: int) -> int:
        """FLOPs of one training step over [B, T], in closed form; a multiply-add counts as two."""

    def parameter_count(self) -> int:
        """Number of parameters of all networks; shared ones count once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def examples(self, stream: Stream, vocabulary: WordPiece, length: int) -> tuple[str, list[str]]:
        """Heading, and held-out sentences with the predictions of the networks, printed at the end of a run."""
        return "", []

    def metrics(self, measured: Mapping[str, float | None]) -> list[Metric]:
        """Lines of the summary and of `fastbert evaluate`, from the values of a validation by name."""
        return [Metric(name.replace("_", " "), value) for name, value in measured.items()]
