"""ELECTRA: replaced token detection (Clark et al., ICLR 2020, arXiv 2003.10555).

    L = L_MLM(generator) + 50 L_RTD
    L_RTD = mean over all tokens of the binary cross-entropy of "x^R_i differs from x_i"

Both networks use the same word embeddings, added positions, token types and LayerNorm of their sum. Shapes as in
`replacement`.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.model.flops import TRAINING, encoder_flops
from fastbert.model.heads import MLMHead, ReplacedHead
from fastbert.model.shared_embeddings import SharedEmbeddings
from fastbert.objectives.replacement import CorruptedInputs, Replacement


class Electra(Replacement):
    """A generator that fills masks, and the encoder as the discriminator: it detects the replaced tokens."""

    main = "rtd"
    second_network = "generator"
    score_names = ("electra", "discriminator")
    word_rows = ("encoder.words.weight", "small_head.decoder.bias")
    parts: ClassVar = {"head": ("head.",), second_network: ("small.", "small_head.")}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.head = ReplacedHead(self.config)
        self.small = SharedEmbeddings(self.generator_config, self.encoder)
        self.small_head = MLMHead(self.config, self.encoder.words, self.generator_config.width)

    def word_logits(self, hidden: Tensor) -> Tensor:
        """Logits of the generator: [..., S] -> [..., V]."""
        return self.small_head(hidden)

    def main_loss(
        self, inputs: CorruptedInputs, filled: Tensor, generator_hidden: Tensor
    ) -> tuple[Tensor, Tensor, dict]:
        """Sum of the binary cross-entropies; bool [B, T], true where the prediction is correct; no further metrics."""
        logits = self.replaced_logits(inputs, filled)
        replaced = filled != inputs.original
        loss = F.binary_cross_entropy_with_logits(logits, replaced.to(logits.dtype), reduction="sum")
        return loss, (logits.detach() > 0) == replaced, {}

    def predict(self, inputs: CorruptedInputs, filled: Tensor, generator_hidden: Tensor) -> tuple[Tensor, None]:
        """Logits [B, T] of the discriminator."""
        return self.replaced_logits(inputs, filled), None

    def replaced_logits(self, inputs: CorruptedInputs, filled: Tensor) -> Tensor:
        """Logits of the discriminator, [B, T], in at least float32."""
        logits = self.head(self.encode(inputs, filled))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def flops(self, batch: int, length: int) -> int:
        """FLOPs of one training step over [B, T]: both networks and their heads."""
        config, tokens = self.config, batch * length
        masked = batch * self.masker.count(length)
        main = encoder_flops(config, batch, length) + 2 * tokens * (config.width**2 + config.width)
        small = SharedEmbeddings.flops(self.generator_config, config, batch, length)
        head = 2 * masked * config.width * (self.generator_config.width + config.vocab_size)
        notes = self.notes.flops(tokens) if self.notes is not None else 0
        return TRAINING * (main + small + head) + notes
