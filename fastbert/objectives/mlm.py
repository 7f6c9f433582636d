"""Masked language modelling (Devlin et al. 2019), with masks drawn anew each time a row is seen (Liu et al. 2019).

    L = mean over the masked places i of -log p(x_i | corrupted x)

The head is computed at the masked places only. Shapes: B rows, T tokens, M masked places, D width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert.data.batches import Batch
from fastbert.data.tokenizer import WordPiece
from fastbert.model.config import EncoderConfig
from fastbert.model.encoder import Encoder
from fastbert.model.flops import (
    TRAINING,
    block_flops,
    encoder_flops,
    encoder_parameters,
    mlm_head_flops,
    mlm_head_parameters,
)
from fastbert.model.heads import MLMHead
from fastbert.model.notes import NotedTokens, Notes
from fastbert.objectives.masking import choose_places, corrupt, masked_places
from fastbert.objectives.options import MLMOptions
from fastbert.randomness import row_keys
from fastbert.training.world import ONE_PROCESS, World


@dataclass(frozen=True)
class Masked:
    """A micro-batch with its masks drawn."""

    input_ids: Tensor
    """[B, T], corrupted."""
    places: Tensor
    """int64 [B, M]."""
    targets: Tensor
    """int64 [B, M]; -100 at places that are not used."""
    document_ids: Tensor | None
    position_ids: Tensor | None
    dropout_keys: Tensor | None
    """int32 [B]; None where nothing is dropped."""
    counts: dict[str, Tensor]
    """What each sum is a mean over."""
    noted: NotedTokens | None = None
    """What is read from and written to notes."""


class MLM(nn.Module):
    """The encoder with an MLM head."""

    loss_weights: ClassVar = {"mlm": 1.0}

    def __init__(
        self,
        config: EncoderConfig,
        options: MLMOptions,
        vocabulary: WordPiece,
        kernels: str = "auto",
        notes: Notes | None = None,
    ) -> None:
        super().__init__()
        self.config, self.options, self.notes = config, options, notes
        self.mask_id = vocabulary.ids["[MASK]"]
        self.encoder = Encoder(config, kernels)
        self.head = MLMHead(config, self.encoder.words)
        special = torch.zeros(config.vocab_size, dtype=torch.bool)
        special[list(vocabulary.special_ids)] = True
        special[len(vocabulary.tokens) :] = True  # rows of the embedding that stand for no word
        continuation = torch.zeros_like(special)
        continuation[: len(vocabulary.tokens)] = torch.from_numpy(vocabulary.continuing)
        self.register_buffer("special", special, persistent=False)
        self.register_buffer("continuation", continuation, persistent=False)
        self.register_buffer("ordinary_ids", (~special).nonzero()[:, 0], persistent=False)

    @torch.no_grad()
    def draw(self, batch: Batch, seed: int, step: int, purpose: str = "mask") -> Masked:
        """Chooses the masked places of a micro-batch and what stands there.

        Outside training every place shows [MASK]: a word that is shown as it is would be no question, and the loss
        could not be held against the entropy of the words.

        Args:
            batch: rows with their places in the global batch.
            seed: of the experiment.
            step: of the optimizer.
            purpose: mask, or validation-mask.
        """
        options, ids = self.options, batch.input_ids
        keys = row_keys(seed, purpose, step, batch.places)
        count = masked_places(ids.shape[1], options.mask_rate)
        continuation = self.continuation if options.whole_word else None
        places, valid = choose_places(ids, self.special, keys, count, continuation)
        shares = (options.mask_token_share, options.random_token_share) if self.training else (1.0, 0.0)
        corrupted = corrupt(
            ids,
            places,
            valid,
            keys,
            mask_id=self.mask_id,
            ordinary_ids=self.ordinary_ids,
            mask_token_share=shares[0],
            random_token_share=shares[1],
        )
        targets = torch.where(valid, ids.gather(1, places), -100)
        dropout_keys = row_keys(seed, "dropout", step, batch.places) if self.training else None
        counts = {"mlm": valid.sum()}
        if not self.training:
            counts["accuracy"] = counts["mlm"]
        noted = self.notes.take(batch.noted, places, valid, ids.shape[1]) if self.notes is not None else None
        return Masked(corrupted, places, targets, batch.document_ids, batch.position_ids, dropout_keys, counts, noted)

    def forward(self, drawn: Masked) -> dict[str, Tensor]:
        """Sums over the masked places: of the loss, and outside training of the right answers."""
        if self.training:
            hidden, decoder = self.head.transform(self.masked_hidden(drawn)), self.head.decoder
            loss = self.encoder.kernels.linear_cross_entropy
            return {"mlm": loss(hidden, decoder.weight, decoder.bias, drawn.targets.flatten(), reduction="sum")}
        logits, targets = self.logits(drawn), drawn.targets.flatten()
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(wide, targets, reduction="sum")
        return {"mlm": loss, "accuracy": (logits.argmax(-1) == targets).sum()}

    def logits(self, drawn: Masked) -> Tensor:
        """[B M, V] at the masked places."""
        return self.head(self.masked_hidden(drawn))

    def masked_hidden(self, drawn: Masked) -> Tensor:
        """[B M, D], the encoder's at the masked places; in training it writes notes."""
        hidden = self.encoder(
            drawn.input_ids,
            document_ids=drawn.document_ids,
            position_ids=drawn.position_ids,
            row_keys=drawn.dropout_keys,
            only=drawn.places,
            edit_words=drawn.noted.edit if drawn.noted else None,
            show=drawn.noted.collect if drawn.noted and self.training else None,
        )
        return hidden.flatten(0, 1)

    def after_step(self, drawn: Sequence[Masked], updated: Tensor, world: World = ONE_PROCESS) -> dict[str, Tensor]:
        """Writes the notes, if there are any."""
        return {} if self.notes is None else self.notes.write([part.noted for part in drawn], updated, world)

    def flops(self, batch: int, length: int) -> int:
        """Of one training step over [B, T], by the closed forms of `fastbert.model.flops`."""
        masked = masked_places(length, self.options.mask_rate, self.options.whole_word)
        encoder = encoder_flops(self.config, batch, length, masked)
        networks = TRAINING * (encoder + mlm_head_flops(self.config, batch * masked))
        if self.notes is None:
            return networks
        contexts = batch * block_flops(self.config, length, length)  # the last block of all tokens, forward alone
        return networks + contexts + self.notes.flops(batch * length)

    def parameter_count(self) -> int:
        return encoder_parameters(self.config) + mlm_head_parameters(self.config)
