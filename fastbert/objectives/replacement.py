"""What ELECTRA and multiple choice share: a small network fills masks by sampling, the main network reads the result.

    L = mean over the masked places of -log p_small(x_i | masked x) + weight * mean over all tokens of the main loss

x is a row, x^R the row in which the small network's samples stand at the masked places. A sample that happens to be x_i
counts as original. No gradient flows through the sampling. Packed rows hold no padding, so "all tokens" is every place
of a row, [CLS] and [SEP] included, as in ELECTRA's released code.

Shapes: B rows, T tokens, M masked places, V vocabulary, D width of the main network, S of the small one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from fastbert_kernels import combine
from torch import Tensor, nn

from fastbert.data.batches import Batch
from fastbert.data.tokenizer import WordPiece
from fastbert.model.config import EncoderConfig
from fastbert.model.encoder import Encoder
from fastbert.model.notes import NotedTokens, Notes
from fastbert.objectives.masking import choose_places, corrupt, masked_places
from fastbert.objectives.options import ReplacementOptions
from fastbert.randomness import row_keys
from fastbert.training.world import ONE_PROCESS, World

REPLACEMENT, CANDIDATES = 0, 1  # what a key of purpose "sample" is for


@dataclass(frozen=True)
class Corrupted:
    """A micro-batch with its masks drawn."""

    original: Tensor
    """[B, T], x."""
    input_ids: Tensor
    """[B, T], masked: what the small network reads."""
    places: Tensor
    """int64 [B, M]."""
    targets: Tensor
    """int64 [B, M]; -100 at places that are not used."""
    document_ids: Tensor | None
    position_ids: Tensor | None
    sample_keys: Tensor
    """int32 [B]."""
    dropout_keys: Tensor | None
    """int32 [B], of the main network; None where nothing is dropped."""
    small_dropout_keys: Tensor | None
    counts: dict[str, Tensor]
    """What each loss is a mean over."""
    noted: NotedTokens | None
    """What is read from and written to notes."""
    seen: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """What the forward pass measured: name -> sum and count."""

    def token_keys(self, purpose: int) -> Tensor:
        """int32 [B, T]."""
        place = torch.arange(self.original.shape[1], dtype=torch.int32, device=self.original.device)
        return combine(combine(self.sample_keys, purpose)[:, None], place)


class Replacement(nn.Module):
    """The two networks. A subclass builds them in its constructor and has

    encoder, small               the main network, which is kept, and the small one
    word_logits(hidden)          [..., S] -> the small network's logits [..., V]
    main_loss(drawn, read, small_hidden)
                                 the loss summed over all tokens; bool [B, T], where the main network is right
    judge(drawn, read, small_hidden)
                                 [B, T], how probable the main network thinks it that a token was replaced; int64
                                 [B, T], the words it thinks were there, or None
    main                         the name of its loss
    """

    main: ClassVar[str]
    encoder: Encoder
    small: Encoder

    def __init__(
        self, config: EncoderConfig, options: ReplacementOptions, vocabulary: WordPiece, notes: Notes | None
    ) -> None:
        super().__init__()
        self.config, self.options, self.notes = config, options, notes
        self.loss_weights = {"mlm": 1.0, self.main: options.loss_weight}
        self.mask_id = vocabulary.ids["[MASK]"]
        special = torch.zeros(config.vocab_size, dtype=torch.bool)
        special[list(vocabulary.special_ids)] = True
        special[len(vocabulary.tokens) :] = True  # rows of the embedding that stand for no word
        continuation = torch.zeros_like(special)
        continuation[: len(vocabulary.tokens)] = torch.from_numpy(vocabulary.continuing)
        self.register_buffer("special", special, persistent=False)
        self.register_buffer("continuation", continuation, persistent=False)
        self.register_buffer("special_ids", special.nonzero()[:, 0], persistent=False)
        self.register_buffer("ordinary_ids", (~special).nonzero()[:, 0], persistent=False)

    @torch.no_grad()
    def draw(self, batch: Batch, seed: int, step: int, purpose: str = "mask") -> Corrupted:
        """Chooses the masked places of a micro-batch and what stands there. Outside training all show [MASK].

        Args:
            batch: rows with their places in the global batch.
            seed: of the experiment.
            step: of the optimizer.
            purpose: mask, or validation-mask.
        """
        options, ids = self.options, batch.input_ids
        keys = row_keys(seed, purpose, step, batch.places)
        continuation = self.continuation if options.whole_word else None
        places, valid = choose_places(
            ids, self.special, keys, masked_places(ids.shape[1], options.mask_rate), continuation
        )
        masked = corrupt(
            ids,
            places,
            valid,
            keys,
            mask_id=self.mask_id,
            ordinary_ids=self.ordinary_ids,
            mask_token_share=options.mask_token_share if self.training else 1.0,
            random_token_share=0.0,
        )
        main, small = (
            row_keys(seed, name, step, batch.places) if self.training else None
            for name in ("dropout", "generator-dropout")
        )
        return Corrupted(
            original=ids,
            input_ids=masked,
            places=places,
            targets=torch.where(valid, ids.gather(1, places), -100),
            document_ids=batch.document_ids,
            position_ids=batch.position_ids,
            sample_keys=row_keys(seed, "sample", step, batch.places),
            dropout_keys=main,
            small_dropout_keys=small,
            counts={"mlm": valid.sum(), self.main: torch.full((), ids.numel(), device=ids.device)},
            noted=None if batch.noted is None else self.notes.take(batch.noted, places, valid, ids.shape[1]),
        )

    def small_hidden(self, drawn: Corrupted) -> Tensor:
        """[B, T, S]: the small network reads the masked rows."""
        return self.small(
            drawn.input_ids,
            document_ids=drawn.document_ids,
            position_ids=drawn.position_ids,
            row_keys=drawn.small_dropout_keys,
            edit_words=drawn.noted.edit if drawn.noted else None,
        )

    def main_hidden(self, drawn: Corrupted, read: Tensor) -> Tensor:
        """[B, T, D]: the main network reads the filled rows, and writes notes."""
        hidden = self.encoder(
            read,
            document_ids=drawn.document_ids,
            position_ids=drawn.position_ids,
            row_keys=drawn.dropout_keys,
            edit_words=drawn.noted.edit if drawn.noted else None,
        )
        if drawn.noted and self.training:
            drawn.noted.collect(hidden)
        return hidden

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
        """[B M, V]: what the small network, with hidden states [B, T, S], expects at the masked places."""
        # No linear_cross_entropy: samples and entropy need the logits of these places, so a loss that makes its own and
        # drops them would be a product more and save no memory.
        row = torch.arange(hidden.shape[0], device=hidden.device)[:, None]
        logits = self.word_logits(hidden[row, drawn.places].flatten(0, 1))
        return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))

    @torch.no_grad()
    def fill(self, drawn: Corrupted, log_p: Tensor) -> Tensor:
        """x^R [B, T]: the small network's samples at the masked places, never a special token.

        Args:
            log_p: [B M, V], of the small network.
        """
        keys = drawn.token_keys(REPLACEMENT).gather(1, drawn.places).flatten()
        sampled, _ = self.encoder.kernels.draw_distinct(log_p, 1, keys, forbidden=self.special_ids)
        kept = drawn.original.gather(1, drawn.places)
        return drawn.original.scatter(1, drawn.places, torch.where(drawn.targets != -100, sampled.view_as(kept), kept))

    def show(self, drawn: Corrupted) -> tuple[Tensor, Tensor, Tensor | None]:
        """x^R, and what `judge` says of it."""
        hidden = self.small_hidden(drawn)
        read = self.fill(drawn, self.masked_log_probabilities(drawn, hidden))
        return read, *self.judge(drawn, read, hidden)

    def after_step(self, drawn: Sequence[Corrupted], updated: Tensor, world: World = ONE_PROCESS) -> dict[str, Tensor]:
        """Writes the notes, if there are any; what the step's forward passes measured."""
        measured = {}
        for name in drawn[0].seen:
            total, count = (world.sum(sum(part.seen[name][i] for part in drawn)) for i in range(2))
            measured[name] = total / count.clamp(min=1)
        notes = {} if self.notes is None else self.notes.write([part.noted for part in drawn], updated, world)
        return measured | notes
