"""What every position scheme is: a module with these methods; a scheme overrides those it has something for."""

from torch import Tensor, nn

from fastbert.model.config import EncoderConfig


class Scheme(nn.Module):
    """No positions at all, scores scaled as in BERT."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.score_scale = config.head_size**-0.5
        """What q k^T is multiplied by."""

    def embed(self, length: int, position_ids: Tensor | None) -> Tensor | None:
        """[1 or B, T, D], added to the word embeddings."""
        return None

    def bias(self, length: int, position_ids: Tensor | None) -> Tensor | None:
        """[1 or B, H, T, T], added to the scaled scores of every layer."""
        return None

    def rotation(self, length: int, position_ids: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """cos and sin, each [1 or B, 1, T, K / 2], that queries and keys of every layer are turned by."""
        return None

    @staticmethod
    def parameters_of(config: EncoderConfig) -> int:
        return 0

    @staticmethod
    def flops(config: EncoderConfig, length: int) -> int:
        """Of one forward pass."""
        return 0
