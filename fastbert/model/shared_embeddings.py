"""Encoders of a different width that use the embeddings of the main encoder.

`SharedEmbeddings` is ELECTRA's generator: word embeddings, added positions, token types and their LayerNorm are those
of the main encoder, and a linear layer projects the sum to its own width. `SharedWords` is the meta controller of
MC-BERT: only the word embeddings are those of the main encoder, projected by a matrix that its output also uses.
Parameters of the attention scores (relative biases, TUPE) are not shared in either.

Shapes: B batch, T tokens, D width of the main encoder, S width of this encoder, V vocabulary.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from fastbert.model.config import EncoderConfig
from fastbert.model.encoder import Encoder
from fastbert.model.flops import encoder_flops


class SharedEmbeddings(Encoder):
    """An encoder of width S on the embeddings of `main`."""

    def __init__(self, config: EncoderConfig, main: Encoder) -> None:
        super().__init__(config)
        self.kernels = main.kernels
        self.words, self.types, self.embedding_norm = main.words, main.types, main.embedding_norm
        for name in self.positions.shared:
            setattr(self.positions, name, getattr(main.positions, name))
        width = main.config.width
        self.projection = nn.Linear(width, config.width, bias=config.bias) if width != config.width else None

    def embed(self, *args, **kwargs) -> Tensor:
        """Projected embeddings, [B, T, S]."""
        x = super().embed(*args, **kwargs)
        return x if self.projection is None else self.projection(x)

    @staticmethod
    def flops(config: EncoderConfig, main: EncoderConfig, batch: int, length: int) -> int:
        """FLOPs of one forward pass over [B, T]."""
        return encoder_flops(config, batch, length) + _projection_flops(config, main, batch * length)


class SharedWords(Encoder):
    """An encoder of width S on the word embeddings of `main`."""

    def __init__(self, config: EncoderConfig, main: Encoder) -> None:
        super().__init__(config)
        self.kernels = main.kernels
        self.words = main.words
        width = main.config.width
        self.projection = nn.Linear(width, config.width, bias=False) if width != config.width else None

    def embed_words(self, input_ids: Tensor, edit_words: Callable[[Tensor], Tensor] | None) -> Tensor:
        """Projected word embeddings, [B, T, S]."""
        x = super().embed_words(input_ids, edit_words)
        return x if self.projection is None else self.projection(x)

    def vocabulary(self) -> Tensor:
        """Word embeddings [V, S] that this network uses for its input and output."""
        words = self.words.weight
        return words if self.projection is None else F.linear(words, self.projection.weight)

    @staticmethod
    def flops(config: EncoderConfig, main: EncoderConfig, batch: int, length: int) -> int:
        """FLOPs of one forward pass over [B, T], and of one call of `vocabulary`."""
        tokens = batch * length + config.vocab_size
        return encoder_flops(config, batch, length) + _projection_flops(config, main, tokens)


def _projection_flops(config: EncoderConfig, main: EncoderConfig, rows: int) -> int:
    return 2 * rows * main.width * config.width if main.width != config.width else 0
