"""Heads of other architectures, computed as in transformers' classes for sequence and token classification."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from fastbert_kernels import combine, hash_dropout
from torch import Tensor, nn

from fastbert.errors import UserError
from fastbert.finetuning.task_heads import SITE, PooledHead, TokenHead
from fastbert.model.foreign import ForeignConfig


@dataclass(frozen=True)
class Form:
    """Layers of a family's heads: dense -> activation -> norm -> dropout -> linear."""

    names: dict[str, str]
    """Name of each layer here -> its name in transformers."""
    activation: Callable[[Tensor], Tensor]
    dropout_first: bool = False
    """Dropout before the dense layer, too."""
    for_tokens: bool = False
    """Heads for tokens have the dense layer, too; else they are dropout -> linear."""


_ROBERTA = Form({"pooler": "classifier.dense", "classifier": "classifier.out_proj"}, torch.tanh, dropout_first=True)
FORMS = {
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "distilbert": Form({"pooler": "pre_classifier", "classifier": "classifier"}, F.relu),
    "modernbert": Form(
        {"pooler": "head.dense", "norm": "head.norm", "classifier": "classifier"}, F.gelu, for_tokens=True
    ),
}
"""Keys of `FAMILIES` -> the form of their heads."""


class ForeignHead(nn.Module):
    """Head of a family for texts or tokens, with the interface of `PooledHead` and `TokenHead`.

    Args:
        prototype: the head that the task would have on fastbert's encoder, for what it reads and its number of
            outputs.
    """

    def __init__(self, config: ForeignConfig, prototype: PooledHead | TokenHead) -> None:
        super().__init__()
        form, settings = FORMS[config.family], config.settings
        self.reads, self.dropout = prototype.reads, prototype.dropout
        self.dropout_first, self.activation = form.dropout_first, form.activation
        if self.reads is None and not form.for_tokens:
            self.pooler, self.norm = None, None
            self.bert_names = {"classifier": "classifier"}
        else:
            bias = settings.get("classifier_bias", False) if "norm" in form.names else True
            self.pooler = nn.Linear(config.width, config.width, bias=bias)
            normed = {"eps": settings.get("norm_eps", 1e-5), "bias": settings.get("norm_bias", False)}
            self.norm = nn.LayerNorm(config.width, **normed) if "norm" in form.names else None
            self.bert_names = form.names
        self.classifier = nn.Linear(config.width, prototype.classifier.out_features)

    def forward(self, hidden: Tensor, row_keys: Tensor | None = None) -> Tensor:
        """Logits [B, L] from the states of texts [B, 1, D], or [B, T, L] from hidden states [B, T, D]; with dropout if
        `row_keys` (int32 [B]) are given."""
        if row_keys is not None and self.dropout_first and self.pooler is not None:
            hidden = self._dropped(hidden, row_keys, SITE - 1)
        features = self.features(hidden)
        return self.classifier(features if row_keys is None else self._dropped(features, row_keys, SITE))

    def features(self, hidden: Tensor) -> Tensor:
        """Input of the classifier without dropout: [B, D], or [B, T, D] of a head for tokens."""
        x = hidden if self.reads is None else hidden[:, 0]
        if self.pooler is None:
            return x
        x = self.activation(self.pooler(x))
        return x if self.norm is None else self.norm(x)

    def _dropped(self, x: Tensor, row_keys: Tensor, site: int) -> Tensor:
        keys = combine(row_keys, site)
        if x.ndim == 3:
            keys = combine(keys[:, None], torch.arange(x.shape[1], dtype=torch.int32, device=x.device))
        return hash_dropout(x, keys, self.dropout)


def check_heads(config: ForeignConfig) -> None:
    """Raises a UserError if the heads of this model are computed in another way than here."""
    for key, known in (("classifier_activation", ("gelu",)), ("classifier_pooling", ("cls", "mean"))):
        if (value := config.settings.get(key, known[0])) not in known:
            raise UserError(f"config.json has {key} {value!r}, and fastbert's heads know {' and '.join(known)} only")
