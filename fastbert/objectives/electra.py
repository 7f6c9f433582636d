"""ELECTRA: replaced token detection (Clark et al., ICLR 2020, arXiv 2003.10555).

    L = L_MLM(generator) + 50 L_RTD
    L_RTD = mean over all tokens of the binary cross-entropy of "x^R_i differs from x_i"

Words, positions that are added to them, token types and their LayerNorm are shared. Shapes as in `replacement`.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.model.flops import TRAINING, encoder_flops
from fastbert.model.heads import MLMHead, ReplacedHead
from fastbert.model.shared_embeddings import SharedEmbeddings
from fastbert.objectives.replacement import Corrupted, Replacement


class Electra(Replacement):
    """A generator that fills masks, and the encoder, which tells for every token whether it is a replacement."""

    main = "rtd"
    second_network = "generator"
    parts: ClassVar = {"head": ("head.",), second_network: ("small.", "small_head.")}

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.head = ReplacedHead(self.config)
        self.small = SharedEmbeddings(self.small_config, self.encoder)
        self.small_head = MLMHead(self.config, self.encoder.words, self.small_config.width)

    def word_logits(self, hidden: Tensor) -> Tensor:
        """The generator's, [..., S] -> [..., V]."""
        return self.small_head(hidden)

    def main_loss(self, drawn: Corrupted, read: Tensor, small_hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the binary cross-entropies; bool [B, T], where the likelier answer is right."""
        logits = self.replaced_logits(drawn, read)
        replaced = read != drawn.original
        loss = F.binary_cross_entropy_with_logits(logits, replaced.to(logits.dtype), reduction="sum")
        return loss, (logits.detach() > 0) == replaced

    def judge(self, drawn: Corrupted, read: Tensor, small_hidden: Tensor) -> tuple[Tensor, None]:
        """The discriminator's probabilities [B, T]."""
        return self.replaced_logits(drawn, read).sigmoid(), None

    def replaced_logits(self, drawn: Corrupted, read: Tensor) -> Tensor:
        """[B, T], in at least float32."""
        logits = self.head(self.encode(drawn, read))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def flops(self, batch: int, length: int) -> int:
        """Of one training step over [B, T]: both networks and their heads."""
        config, tokens = self.config, batch * length
        places = batch * self.masker.count(length)
        main = encoder_flops(config, batch, length) + 2 * tokens * (config.width**2 + config.width)
        small = SharedEmbeddings.flops(self.small_config, config, batch, length)
        head = 2 * places * config.width * (self.small_config.width + config.vocab_size)
        notes = self.notes.flops(tokens) if self.notes is not None else 0
        return TRAINING * (main + small + head) + notes
