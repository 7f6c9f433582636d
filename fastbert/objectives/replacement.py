"""Base class of ELECTRA and multiple choice: a generator fills masks by sampling, the encoder reads the result.

    L = mean over the masked positions of -log p_G(x_i | masked x) + weight * mean over all tokens of the encoder's loss

x is a row, x^R the row with the generator's samples at the masked positions. A sample that equals x_i counts as
original. No gradient flows through the sampling. Packed rows hold no padding, so "all tokens" are all tokens of a row,
[CLS] and [SEP] included, as in ELECTRA's released code. MC-BERT calls the generator "meta controller".

Shapes: B rows, T tokens, M masked positions, V vocabulary, D width of the encoder, S width of the generator.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from fastbert_kernels import combine
from torch import Tensor

from fastbert.data.batches import Batch, Stream
from fastbert.data.tokenizer import WordPiece
from fastbert.model.encoder import Encoder, select
from fastbert.objectives.examples import detect_replaced
from fastbert.objectives.masking import Masks
from fastbert.objectives.objective import MaskedInputs, Metric, Objective
from fastbert.randomness import row_keys
from fastbert.training.world import ONE_PROCESS, World

REPLACEMENT, CANDIDATES, JUDGED = 0, 1, 2  # the uses of a key of purpose "sample"


@dataclass(frozen=True)
class CorruptedInputs(MaskedInputs):
    """Inputs of both networks; the generator reads `input_ids`."""

    original: Tensor
    """[B, T], x."""
    sample_keys: Tensor
    """int32 [B], keys of the generator's samples."""
    generator_dropout_keys: Tensor | None
    """int32 [B], keys of the generator's dropout; None without dropout."""
    judged: Tensor | None = None
    """int64 [B, J], ascending: the tokens at which the encoder's loss is computed; None for all tokens."""
    measured: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Metrics of the forward pass: name -> sum and count."""

    def token_keys(self, purpose: int) -> Tensor:
        """Keys of the samples at each token, int32 [B, T]."""
        return token_keys(self.sample_keys, purpose, self.original.shape[1])


def token_keys(keys: Tensor, purpose: int, length: int) -> Tensor:
    """Keys of samples at each of `length` tokens, int32 [B, T], from those of the rows, int32 [B]."""
    index = torch.arange(length, dtype=torch.int32, device=keys.device)
    return combine(combine(keys, purpose)[:, None], index)


class Replacement(Objective):
    """An objective with two networks. The constructor of a subclass builds the generator, `small`, its head,
    `small_head`, and the encoder's, `head`. (Initial weights are hashes of parameter names, so these names must not
    change.) A subclass has

    main                         name of the encoder's loss
    score_names                  names of the scores in `fastbert evaluate --pairs`
    word_logits(hidden)          generator's hidden states [..., S] -> its logits [..., V]
    main_loss(inputs, filled, generator_hidden)
                                 encoder's loss, summed over the judged tokens; bool [B, J], true where it predicts
                                 correctly; further metrics, name -> sum and count
    predict(inputs, filled, generator_hidden)
                                 [B, T], log-odds that a token was replaced, by the encoder; int64 [B, T], its guesses
                                 of the original words, or None

    where `filled` is x^R.
    """

    main: ClassVar[str]
    score_names: ClassVar[tuple[str, str]]
    """Names of scores of sentences: by both networks, and by the encoder's log-odds alone."""
    small: Encoder

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _, self.generator_config = self.options.networks(self.config)
        self.loss_weights = {"mlm": 1.0, self.main: self.options.loss_weight}

    @torch.no_grad()
    def sample(self, batch: Batch, seed: int, step: int, purpose: str = "mask") -> CorruptedInputs:
        ids = batch.input_ids
        masks, fields = self.sample_masks(batch, seed, step, purpose)
        rows = batch.row_indices
        keys = row_keys(seed, "sample", step, rows)
        judged = self.judged(masks, keys)
        tokens = ids.numel() if judged is None else judged.numel()
        return CorruptedInputs(
            **fields,
            original=ids,
            judged=judged,
            sample_keys=keys,
            generator_dropout_keys=row_keys(seed, "generator-dropout", step, rows) if self.training else None,
            counts={"mlm": masks.valid.sum(), self.main: torch.full((), tokens, device=ids.device)},
        )

    def judged(self, masks: Masks, keys: Tensor) -> Tensor | None:
        """`CorruptedInputs.judged`; `keys` are the rows' keys of samples."""
        return None

    def generator_hidden(self, inputs: CorruptedInputs) -> Tensor:
        """Hidden states [B, T, S] of the generator, which reads the masked rows."""
        return self.small(
            inputs.input_ids,
            document_ids=inputs.document_ids,
            position_ids=inputs.position_ids,
            row_keys=inputs.generator_dropout_keys,
            edit_words=inputs.note_tokens.edit if inputs.note_tokens else None,
        )

    def forward(self, inputs: CorruptedInputs) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        """Sums of both losses, and metrics of the difficulty of the encoder's task as pairs (sum, count)."""
        hidden = self.generator_hidden(inputs)
        log_p, targets = self.masked_log_probabilities(inputs, hidden), inputs.targets.flatten()
        mlm = F.nll_loss(log_p, targets, ignore_index=-100, reduction="sum")
        with torch.no_grad():
            filled = self.fill(inputs, log_p)
            entropy = (-(log_p.exp() * log_p).sum(-1) * (targets != -100)).sum()
        loss, right, parts = self.main_loss(inputs, filled, hidden.detach())
        replaced = select(filled != inputs.original, inputs.judged)
        count, tokens = replaced.sum(), inputs.counts[self.main]
        inputs.measured.update(
            {
                "mlm_loss": (mlm.detach(), inputs.counts["mlm"]),
                f"{self.main}_loss": (loss.detach(), tokens),
                **parts,
                "replaced": (count, torch.full_like(count, filled.numel())),
                "accuracy_replaced": ((right & replaced).sum(), count),
                "accuracy_original": ((right & ~replaced).sum(), tokens - count),
                "entropy": (entropy, inputs.counts["mlm"]),
            }
        )
        return {"mlm": mlm, self.main: loss, **inputs.measured}

    def masked_log_probabilities(self, inputs: CorruptedInputs, hidden: Tensor) -> Tensor:
        """[B M, V], the generator's predictions at the masked positions, from its hidden states [B, T, S]."""
        # No linear_cross_entropy: sampling and the entropy need these logits too, so a loss that computes its own and
        # discards them would cost one more product and save no memory.
        row = torch.arange(hidden.shape[0], device=hidden.device)[:, None]
        logits = self.word_logits(hidden[row, inputs.positions].flatten(0, 1))
        return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))

    @torch.no_grad()
    def fill(self, inputs: CorruptedInputs, log_p: Tensor) -> Tensor:
        """x^R [B, T]: the rows with the generator's samples at the masked positions; special tokens are never sampled.

        Args:
            log_p: [B M, V], log-probabilities of the generator.
        """
        keys = inputs.token_keys(REPLACEMENT).gather(1, inputs.positions).flatten()
        sampled, _ = self.encoder.kernels.sample_distinct(log_p, 1, keys, forbidden=self.masker.special_ids)
        original, positions = inputs.original, inputs.positions
        words = original.gather(1, positions)
        return original.scatter(1, positions, torch.where(inputs.targets != -100, sampled.view_as(words), words))

    @property
    def word_network(self) -> Encoder:
        return self.small

    def plain_inputs(self, input_ids: Tensor) -> CorruptedInputs:
        """Inputs for rows without masks or replacements, int64 [B, T]; keys of samples depend on the position alone."""
        keys = torch.zeros(len(input_ids), dtype=torch.int32, device=input_ids.device)
        fields = dict.fromkeys(
            ("document_ids", "position_ids", "dropout_keys", "note_tokens", "generator_dropout_keys")
        )
        return CorruptedInputs(
            **fields,
            input_ids=input_ids,
            counts={},
            positions=input_ids[:, :0],
            targets=input_ids[:, :0],
            original=input_ids,
            sample_keys=keys,
        )

    def original_log_odds(self, input_ids: Tensor) -> Tensor:
        """Log-odds, by the encoder, that each token is original, [B, T].

        Both networks read the rows as they are. Where candidates are sampled, their keys depend on the position alone,
        so a row's result does not depend on the batch, and rows that differ in a few words have similar samples.

        Args:
            input_ids: int64 [B, T], rows of equal length without masks or padding.
        """
        inputs = self.plain_inputs(input_ids)
        replaced, _ = self.predict(inputs, input_ids, self.generator_hidden(inputs))
        return -replaced

    def predictions(self, inputs: CorruptedInputs) -> tuple[Tensor, Tensor, Tensor | None]:
        """x^R, the encoder's probabilities that its tokens were replaced, and its guesses (`predict`)."""
        hidden = self.generator_hidden(inputs)
        filled = self.fill(inputs, self.masked_log_probabilities(inputs, hidden))
        log_odds, guesses = self.predict(inputs, filled, hidden)
        return filled, log_odds.sigmoid(), guesses

    def after_step(
        self, micro_batches: Sequence[CorruptedInputs], updated: Tensor, world: World = ONE_PROCESS
    ) -> dict[str, Tensor]:
        """Updates the note dictionary, if there is one; returns the means of the step's metrics."""
        names = list(micro_batches[0].measured)
        totals, counts = (
            world.sums({name: sum(part.counting(part.measured[name][i]) for part in micro_batches) for name in names})
            for i in range(2)
        )
        means = {name: totals[name] / counts[name].clamp(min=1) for name in names}
        return means | super().after_step(micro_batches, updated, world)

    def examples(self, stream: Stream, vocabulary: WordPiece, length: int) -> tuple[str, list[str]]:
        heading = (
            f"Held-out sentences, [word -> replacement by the {self.second_network}], and the replacements that the "
            "encoder detects"
        )
        return heading, list(map(str, detect_replaced(self, stream, vocabulary, length)))

    def metrics(self, measured: Mapping[str, float | None]) -> list[Metric]:
        chance = {} if measured["replaced"] is None else self.chance(measured["replaced"])
        metrics = [
            Metric(self.second_network, measured["mlm_loss"], "nats", words=True),
            Metric("total loss", measured["loss"]),
        ]
        for name, value in measured.items():
            if name not in ("mlm_loss", "loss"):
                unit = "nats" if name.endswith("_loss") or name == "entropy" else "%"
                metrics.append(Metric(name.replace("_", " "), value, unit, chance=chance.get(name)))
        return metrics

    def chance(self, replaced: float) -> dict[str, float]:
        """Losses, in nats, of constant guesses where this fraction of the tokens is replaced."""
        return {f"{self.main}_loss": binary_entropy(replaced)}


def binary_entropy(p: float) -> float:
    """Entropy of an event of probability p, in nats."""
    return -sum(q * math.log(q) for q in (p, 1 - p) if q > 0)
