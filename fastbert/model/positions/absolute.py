"""BERT's positions (BERT-A): a learned vector for each place, added to the word embeddings."""

from torch import Tensor, nn

from fastbert.model.config import EncoderConfig


class Absolute(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.score_scale = config.head_size**-0.5
        self.table = nn.Embedding(config.max_positions, config.width)

    def embed(self, length: int, position_ids: Tensor | None) -> Tensor:
        return self.table.weight[None, :length] if position_ids is None else self.table(position_ids)

    def bias(self, length: int, position_ids: Tensor | None) -> None:
        return None

    @staticmethod
    def parameters_of(config: EncoderConfig) -> int:
        return config.max_positions * config.width

    @staticmethod
    def flops(config: EncoderConfig, length: int) -> int:
        return 0
