"""What ELECTRA and multiple choice share: a second network fills masks by sampling, the main network reads the result.

    L = mean over the masked positions of -log p_small(x_i | masked x) + weight * mean over all tokens of the main loss

x is a row, x^R the row with the second network's samples at the masked positions. A sample that happens to be x_i
counts as original. No gradient flows through the sampling. Packed rows hold no padding, so "all tokens" is every token
of a row, [CLS] and [SEP] included, as in ELECTRA's released code.

Shapes: B rows, T tokens, M masked positions, V vocabulary, D width of the main network, S of the small one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from fastbert_kernels import combine
from torch import Tensor

from fastbert.data.batches import Batch, Stream
from fastbert.data.tokenizer import WordPiece
from fastbert.model.encoder import Encoder
from fastbert.objectives.examples import spot
from fastbert.objectives.objective import Figure, Masked, Objective
from fastbert.randomness import row_keys
from fastbert.training.world import ONE_PROCESS, World

REPLACEMENT, CANDIDATES = 0, 1  # what a key of purpose "sample" is for


@dataclass(frozen=True)
class Corrupted(Masked):
    """A micro-batch with its masks; `input_ids` are what the second network reads."""

    original: Tensor
    """[B, T], x."""
    sample_keys: Tensor
    """int32 [B]."""
    small_dropout_keys: Tensor | None
    """int32 [B], of the second network; None where nothing is dropped."""
    seen: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """What the forward pass measured: name -> sum and count."""

    def token_keys(self, purpose: int) -> Tensor:
        """int32 [B, T]."""
        place = torch.arange(self.original.shape[1], dtype=torch.int32, device=self.original.device)
        return combine(combine(self.sample_keys, purpose)[:, None], place)


class Replacement(Objective):
    """The two networks. A subclass builds `small` and both heads in its constructor and has

    small                        the generator or meta controller
    word_logits(hidden)          [..., S] -> its logits [..., V]
    main_loss(drawn, read, small_hidden)
                                 the loss summed over all tokens; bool [B, T], where the main network is right
    judge(drawn, read, small_hidden)
                                 [B, T], how probable the main network thinks it that a token was replaced; int64
                                 [B, T], the words it thinks were there, or None
    main                         the name of its loss
    """

    main: ClassVar[str]
    small: Encoder

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        _, self.small_config = self.options.networks(self.config)
        self.loss_weights = {"mlm": 1.0, self.main: self.options.loss_weight}

    @torch.no_grad()
    def draw(self, batch: Batch, seed: int, step: int, purpose: str = "mask") -> Corrupted:
        ids = batch.input_ids
        masks, fields = self.masked(batch, seed, step, purpose)
        return Corrupted(
            **fields,
            original=ids,
            sample_keys=row_keys(seed, "sample", step, batch.row_indices),
            small_dropout_keys=row_keys(seed, "generator-dropout", step, batch.row_indices) if self.training else None,
            counts={"mlm": masks.valid.sum(), self.main: torch.full((), ids.numel(), device=ids.device)},
        )

    def small_hidden(self, drawn: Corrupted) -> Tensor:
        """[B, T, S]: the second network reads the masked rows."""
        return self.small(
            drawn.input_ids,
            document_ids=drawn.document_ids,
            position_ids=drawn.position_ids,
            row_keys=drawn.small_dropout_keys,
            edit_words=drawn.noted.edit if drawn.noted else None,
        )

    def forward(self, drawn: Corrupted) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        """The sums of both losses, and as (sum, count) what tells how hard the main network's questions are."""
        hidden = self.small_hidden(drawn)
        log_p, targets = self.masked_log_probabilities(drawn, hidden), drawn.targets.flatten()
        mlm = F.nll_loss(log_p, targets, ignore_index=-100, reduction="sum")
        with torch.no_grad():
            read = self.fill(drawn, log_p)
            entropy = (-(log_p.exp() * log_p).sum(-1) * (targets != -100)).sum()
        loss, right = self.main_loss(drawn, read, hidden.detach())
        replaced = read != drawn.original
        count, tokens = replaced.sum(), drawn.counts[self.main]
        drawn.seen.update(
            {
                "mlm_loss": (mlm.detach(), drawn.counts["mlm"]),
                f"{self.main}_loss": (loss.detach(), tokens),
                "replaced": (count, tokens),
                "accuracy_replaced": ((right & replaced).sum(), count),
                "accuracy_kept": ((right & ~replaced).sum(), tokens - count),
                "entropy": (entropy, drawn.counts["mlm"]),
            }
        )
        return {"mlm": mlm, self.main: loss, **drawn.seen}

    def masked_log_probabilities(self, drawn: Corrupted, hidden: Tensor) -> Tensor:
        """[B M, V]: what the second network, with hidden states [B, T, S], expects at the masked positions."""
        # No linear_cross_entropy: samples and entropy need the logits of these places, so a loss that makes its own and
        # drops them would be a product more and save no memory.
        row = torch.arange(hidden.shape[0], device=hidden.device)[:, None]
        logits = self.word_logits(hidden[row, drawn.positions].flatten(0, 1))
        return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))

    @torch.no_grad()
    def fill(self, drawn: Corrupted, log_p: Tensor) -> Tensor:
        """x^R [B, T]: the second network's samples at the masked positions, never a special token.

        Args:
            log_p: [B M, V], of the second network.
        """
        keys = drawn.token_keys(REPLACEMENT).gather(1, drawn.positions).flatten()
        sampled, _ = self.encoder.kernels.sample_distinct(log_p, 1, keys, forbidden=self.masker.special_ids)
        original, positions = drawn.original, drawn.positions
        words = original.gather(1, positions)
        return original.scatter(1, positions, torch.where(drawn.targets != -100, sampled.view_as(words), words))

    def show(self, drawn: Corrupted) -> tuple[Tensor, Tensor, Tensor | None]:
        """x^R, and what `judge` says of it."""
        hidden = self.small_hidden(drawn)
        read = self.fill(drawn, self.masked_log_probabilities(drawn, hidden))
        return read, *self.judge(drawn, read, hidden)

    def after_step(self, drawn: Sequence[Corrupted], updated: Tensor, world: World = ONE_PROCESS) -> dict[str, Tensor]:
        """Writes the notes, if there are any; returns what the step's forward passes measured."""
        measured = {}
        for name in drawn[0].seen:
            total, count = (world.sum(sum(part.seen[name][i] for part in drawn)) for i in range(2))
            measured[name] = total / count.clamp(min=1)
        return measured | super().after_step(drawn, updated, world)

    def examples(self, stream: Stream, vocabulary: WordPiece, length: int) -> tuple[str, list[str]]:
        heading = (
            f"Held-out sentences, [word -> what the {self.second_network} put there], and what the encoder suspects"
        )
        return heading, list(map(str, spot(self, stream, vocabulary, length)))

    def figures(self, measured: Mapping[str, float | None]) -> list[Figure]:
        others = {name: value for name, value in measured.items() if name != "mlm_loss"}
        return [Figure(self.second_network, measured["mlm_loss"], "nats"), *super().figures(others)]
