"""Encoders of other architectures, computed by transformers' own code: RoBERTa, XLM-R, DistilBERT and ModernBERT. They
have the part of `Encoder`'s interface that fine-tuning uses; nothing else in fastbert depends on their architecture.

Shapes: B batch, T tokens, D width.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.model.encoder import TokenIndex, select


@dataclass(frozen=True)
class Family:
    """An architecture of transformers."""

    title: str
    """Name in messages."""
    classes: str
    """Prefix of the names of its classes."""
    prefix: str
    """Prefix of the encoder's weights in a model with a head."""
    sizes: tuple[str, str, str, str]
    """Keys in config.json of layers, width, heads and feed-forward width."""
    dropout: tuple[str, ...]
    """Keys of the dropout on embeddings and sublayer outputs."""
    attention_dropout: str
    """Key of the dropout on attention probabilities."""
    position: str = "absolute"
    feed_forward: str = "gelu"
    skips_padding: bool = False
    """Positions are counted from the id of padding + 1."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of its class in addition to the configuration."""


_BERT_SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
_ROBERTA: dict[str, Any] = {
    "prefix": "roberta.",
    "sizes": _BERT_SIZES,
    "dropout": ("hidden_dropout_prob",),
    "attention_dropout": "attention_probs_dropout_prob",
    "skips_padding": True,
    "arguments": {"add_pooling_layer": False},
}
FAMILIES = {
    "roberta": Family("RoBERTa", "Roberta", **_ROBERTA),
    "xlm-roberta": Family("XLM-R", "XLMRoberta", **_ROBERTA),
    "distilbert": Family(
        "DistilBERT",
        "DistilBert",
        prefix="distilbert.",
        sizes=("n_layers", "dim", "n_heads", "hidden_dim"),
        dropout=("dropout",),
        attention_dropout="attention_dropout",
    ),
    "modernbert": Family(
        "ModernBERT",
        "ModernBert",
        prefix="model.",
        sizes=_BERT_SIZES,
        dropout=("embedding_dropout", "mlp_dropout"),
        attention_dropout="attention_dropout",
        position="rope",
        feed_forward="geglu",
    ),
}
"""`model_type` in config.json -> the architecture."""

# Keys of config.json that the encoder does not depend on.
_UNRELATED = ("architectures", "dtype", "torch_dtype", "id2label", "label2id", "problem_type", "transformers_version")
_BLOCK = re.compile(r"encoder\.model\.(?:encoder\.layer|transformer\.layer|layers)\.(\d+)\.")


@dataclass(frozen=True)
class ForeignConfig:
    """Configuration of an encoder of another architecture: that of transformers, and its sizes by fastbert's names."""

    family: str
    """Key of FAMILIES."""
    settings: Mapping[str, Any]
    """Content of config.json."""
    vocab_size: int
    layers: int
    width: int
    heads: int
    ffn: int
    max_positions: int
    """Maximum length of a sequence in tokens."""
    dropout: float
    attention_dropout: float
    initializer_std: float

    @property
    def architecture(self) -> Family:
        return FAMILIES[self.family]

    @property
    def position(self) -> str:
        return self.architecture.position

    @property
    def feed_forward(self) -> str:
        return self.architecture.feed_forward

    @property
    def predicts_words(self) -> bool:
        """True if the model was saved as a masked language model."""
        saved = self.settings.get("architectures")
        return isinstance(saved, list) and f"{self.architecture.classes}ForMaskedLM" in saved

    def to_dict(self) -> dict[str, Any]:
        """Everything that the encoder depends on, for a fingerprint."""
        return {key: value for key, value in sorted(self.settings.items()) if key not in _UNRELATED}

    def of_transformers(self) -> Any:
        """The configuration for transformers' classes, with this dropout. Raises transformers' errors if a value is
        impossible."""
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        family = self.architecture
        dropout = {**dict.fromkeys(family.dropout, self.dropout), family.attention_dropout: self.attention_dropout}
        return CONFIG_MAPPING[self.family].from_dict({**self.settings, **dropout})


class ForeignEncoder(nn.Module):
    """An encoder of transformers, with new weights, as `Encoder`."""

    def __init__(self, config: ForeignConfig) -> None:
        from transformers import AutoModel

        super().__init__()
        self.config = config
        settings = config.of_transformers()
        self.pooling = getattr(settings, "classifier_pooling", "cls")
        chosen = {"attn_implementation": "sdpa", "dtype": torch.float32, **config.architecture.arguments}
        self.model = AutoModel.from_config(settings, **chosen)

    def forward(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        row_keys: Tensor | None = None,
        only: TokenIndex = None,
    ) -> Tensor:
        """Hidden states [B, T, D]; with `only` = slice(1) the state of each text, [B, 1, D], as the architecture's own
        classifier reads it: that of the first token, or with `classifier_pooling` mean the mean over the tokens.

        Args:
            input_ids: int64 [B, T], padded on the right.
            attention_mask: [B, T], nonzero for real tokens.
            token_type_ids: ignored, because these architectures have no token types.
            row_keys: int32 [B]; None for no dropout. transformers' dropout is that of PyTorch, whose generator is
                seeded with the first key, so the same batch gives the same values; other micro-batches give others.
        """
        self.model.train(row_keys is not None)
        devices = [input_ids.device] if input_ids.is_cuda else []
        with torch.random.fork_rng(devices, enabled=row_keys is not None):
            if row_keys is not None:
                torch.manual_seed(int(row_keys[0]) % 2**32)
            mask = attention_mask.long()
            hidden = self.model(input_ids=input_ids, attention_mask=mask, return_dict=True).last_hidden_state
        if only is None or self.pooling == "cls":
            return select(hidden, only)
        real = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)


def block_number(name: str) -> int | None:
    """The number of the block that the parameter `name` of such an encoder belongs to; None for embeddings and the last
    norm."""
    found = _BLOCK.match(name)
    return None if found is None else int(found[1])
