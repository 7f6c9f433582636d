"""Masked language modeling (Devlin et al. 2019), with new masks each time a row is seen (Liu et al. 2019).

    L = mean over the masked positions i of -log p(x_i | corrupted x)

The head is computed at the masked positions only. Shapes: B rows, T tokens, M masked positions, D width, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.data.batches import Batch, Stream
from fastbert.data.tokenizer import WordPiece
from fastbert.model.encoder import Encoder
from fastbert.model.flops import TRAINING, encoder_flops, mlm_head_flops
from fastbert.model.heads import MLMHead
from fastbert.objectives.examples import fill_in
from fastbert.objectives.objective import MaskedInputs, Metric, Objective


class MLM(Objective):
    """The encoder with an MLM head."""

    loss_weights: ClassVar = {"mlm": 1.0}
    loss_in_nats = True
    word_rows = ("encoder.words.weight", "head.decoder.bias")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.head = MLMHead(self.config, self.encoder.words)

    @torch.no_grad()
    def sample(self, batch: Batch, seed: int, step: int, purpose: str = "mask") -> MaskedInputs:
        masks, fields = self.sample_masks(batch, seed, step, purpose)
        counts = {"mlm": masks.valid.sum()}
        if not self.training:
            counts["accuracy"] = counts["mlm"]
        return MaskedInputs(**fields, counts=counts)

    def forward(self, inputs: MaskedInputs) -> dict[str, Tensor]:
        """Sums over the masked positions: the loss, and in validation the number of correct predictions."""
        if self.training:
            hidden, decoder = self.head.transform(self.masked_hidden(inputs)), self.head.decoder
            loss = self.encoder.kernels.linear_cross_entropy
            return {"mlm": loss(hidden, decoder.weight, decoder.bias, inputs.targets.flatten(), reduction="sum")}
        logits, targets = self.logits(inputs), inputs.targets.flatten()
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(wide, targets, reduction="sum")
        return {"mlm": loss, "accuracy": (logits.argmax(-1) == targets).sum()}

    @property
    def word_network(self) -> Encoder:
        return self.encoder

    def word_logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] from hidden states of the encoder, [..., D]."""
        return self.head(hidden)

    def logits(self, inputs: MaskedInputs) -> Tensor:
        """Logits [B M, V] at the masked positions."""
        return self.head(self.masked_hidden(inputs))

    def masked_hidden(self, inputs: MaskedInputs) -> Tensor:
        """Hidden states [B M, D] of the encoder at the masked positions."""
        return self.encode(inputs, inputs.input_ids, inputs.positions).flatten(0, 1)

    def flops(self, batch: int, length: int) -> int:
        """FLOPs of one training step over [B, T], by the closed forms of `fastbert.model.flops`."""
        masked = self.masker.count(length)
        encoder = encoder_flops(self.config, batch, length, masked)
        networks = TRAINING * (encoder + mlm_head_flops(self.config, batch * masked))
        if self.notes is None:
            return networks
        return networks + self.notes.context_flops(self.config, batch, length) + self.notes.flops(batch * length)

    def examples(self, stream: Stream, vocabulary: WordPiece, length: int) -> tuple[str, list[str]]:
        heading = "Held-out sentences, the masked word in brackets, and the model's guesses"
        return heading, list(map(str, fill_in(self, stream, vocabulary, length)))

    def metrics(self, measured: Mapping[str, float | None]) -> list[Metric]:
        loss = Metric("masked loss", measured["loss"], "nats", words=True)
        return [loss, Metric("masked accuracy", measured["accuracy"], "%")]
