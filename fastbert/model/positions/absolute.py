"""BERT's positions (BERT-A): a learned vector for each position, added to the word embeddings. There is none beyond
`max_positions`."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from fastbert.model.config import EncoderConfig
from fastbert.model.positions.encoding import PositionEncoding


class Absolute(PositionEncoding):
    shared = ("table",)
    bert_weights: ClassVar = {"table.weight": "embeddings.position_embeddings.weight"}

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.table = nn.Embedding(config.max_positions, config.width)
        self.register_buffer("indices", torch.arange(config.max_positions), persistent=False)

    def embed(self, length: int, position_ids: Tensor | None) -> Tensor:
        return self.table(self.indices[None, :length] if position_ids is None else position_ids)
