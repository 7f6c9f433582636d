"""Heads on top of the encoder. In an encoder without biases, their hidden layers have none, but their outputs do."""

import torch.nn.functional as F
from torch import Tensor, nn

from fastbert.model.config import EncoderConfig
from fastbert.model.encoder import layer_norm


class WordTransform(nn.Module):
    """Dense, GELU, LayerNorm: the hidden layer of heads over words."""

    def __init__(self, config: EncoderConfig, hidden_width: int | None = None) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_width or config.width, config.width, bias=config.bias)
        self.norm = layer_norm(config)

    def transform(self, hidden: Tensor) -> Tensor:
        """Vectors that are multiplied by the word embedding: [..., hidden width] -> [..., D]."""
        return self.norm(F.gelu(self.dense(hidden)))


class MLMHead(WordTransform):
    """Head of masked language models: `transform`, then the tied embedding and a bias for each word."""

    def __init__(self, config: EncoderConfig, words: nn.Embedding, hidden_width: int | None = None) -> None:
        """
        Args:
            words: [V, D], tied.
            hidden_width: width of the hidden states, D if None.
        """
        super().__init__(config, hidden_width)
        self.decoder = nn.Linear(config.width, config.vocab_size)
        self.decoder.weight = words.weight

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden width] -> logits [..., V]."""
        return self.decoder(self.transform(hidden))


class ReplacedHead(nn.Module):
    """Head of ELECTRA's discriminator, a logit for each token: dense, GELU, dense."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.width, bias=config.bias)
        self.output = nn.Linear(config.width, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] -> logits [...]."""
        return self.output(F.gelu(self.dense(hidden)))[..., 0]
