"""Names of fastbert's options and weights in transformers: one table for each, used in both directions."""

from collections.abc import Iterable
from dataclasses import fields

import torch
from torch import Tensor, nn

from fastbert.errors import UserError, abbreviated
from fastbert.model.config import EncoderConfig
from fastbert.model.encoder import Encoder
from fastbert.model.heads import MLMHead, ReplacedHead
from fastbert.model.positions import POSITIONS
from fastbert.training.finite import not_finite

# Fields of EncoderConfig -> keys of a BERT config.json.
BERT_OPTIONS = {
    "vocab_size": "vocab_size",
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "ffn": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "type_vocab_size": "type_vocab_size",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "norm_eps": "layer_norm_eps",
    "initializer_std": "initializer_range",
}
# Fields that BERT does not have -> keys of a FastBertConfig, which has BERT's keys too.
OWN_OPTIONS = {field.name: field.name for field in fields(EncoderConfig) if field.name not in BERT_OPTIONS}

TIED = "head.decoder.weight"
"""Second name of `encoder.words.weight`, in a tied MLM head."""

DISCRIMINATOR = "discriminator."
"""Prefix of a discriminator's head, `head.`, in an export with code, so that no class loads one head as another."""

_BLOCK = {
    "attention.qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention.out": ("attention.output.dense",),
    "attention_norm": ("attention.output.LayerNorm",),
    "feed_forward.up": ("intermediate.dense",),
    "feed_forward.down": ("output.dense",),
    "feed_forward_norm": ("output.LayerNorm",),
}


HEADS = {"mlm": "head.decoder.bias", "replaced": "head.output.bias"}
"""Heads that are exported with an encoder -> the weight that identifies them."""


def head_of(weights: Iterable[str]) -> str | None:
    """Finds which of HEADS is among the names of weights."""
    names = set(weights)
    return next((head for head, mark in HEADS.items() if mark in names), None)


def exported_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of an objective that are exported: the encoder's and, if its head is one of HEADS, the head's."""
    prefixes = ("encoder.", "head.") if head_of(weights) else ("encoder.",)
    return {name: tensor for name, tensor in weights.items() if name.startswith(prefixes)}


def is_bert(config: EncoderConfig) -> bool:
    """True if transformers' own BERT computes the same as this encoder."""
    bert = {"norm": "post", "feed_forward": "gelu", "bias": True}
    fits = all(getattr(config, name) == value for name, value in bert.items())
    return fits and POSITIONS[config.position].bert_weights is not None


def bert_names(
    config: EncoderConfig, *, types: bool, head: str | None, family: str = "bert"
) -> dict[str, tuple[str, ...]]:
    """fastbert's name of each weight -> its names in `BertForMaskedLM` or, for the family "electra", in
    `ElectraForPreTraining`. A weight with several names is the concatenation of these along dimension 0."""
    modules = {
        "encoder.embedding_norm": (f"{family}.embeddings.LayerNorm",),
        **{
            f"encoder.blocks.{index}.{ours}": tuple(f"{family}.encoder.layer.{index}.{name}" for name in theirs)
            for index in range(config.layers)
            for ours, theirs in _BLOCK.items()
        },
    }
    names = {
        "encoder.words.weight": (f"{family}.embeddings.word_embeddings.weight",),
        **{
            f"encoder.positions.{ours}": (f"{family}.{theirs}",)
            for ours, theirs in POSITIONS[config.position].bert_weights.items()
        },
    }
    if types:
        names["encoder.types.weight"] = (f"{family}.embeddings.token_type_embeddings.weight",)
    if head == "mlm":
        modules["head.dense"] = ("cls.predictions.transform.dense",)
        modules["head.norm"] = ("cls.predictions.transform.LayerNorm",)
        names["head.decoder.bias"] = ("cls.predictions.bias",)
    elif head == "replaced":
        modules["head.dense"] = ("discriminator_predictions.dense",)
        modules["head.output"] = ("discriminator_predictions.dense_prediction",)
    for ours, theirs in modules.items():
        for kind in ("weight", "bias"):
            names[f"{ours}.{kind}"] = tuple(f"{name}.{kind}" for name in theirs)
    return names


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FLOATS_ONLY = "instead of floating-point numbers of 16, 32 or 64 bits"


def check_weights(config: EncoderConfig, weights: dict[str, Tensor], source: str) -> None:
    """Checks that `weights` are those of an encoder of `config`, and of its head if they include one.

    Raises:
        UserError: a weight is missing, unexpected, of another shape, not of floating-point numbers, not finite, or not
            tied. The message names it and `source`.
    """
    with torch.device("meta"):
        encoder = Encoder(config)
        modules: dict[str, nn.Module] = {"encoder": encoder}
        if any(name.startswith("head.") for name in weights):
            replaced = head_of(weights) == "replaced"
            modules["head"] = ReplacedHead(config) if replaced else MLMHead(config, encoder.words)
    shapes = {
        f"{prefix}.{name}": tuple(tensor.shape)
        for prefix, module in modules.items()
        for name, tensor in module.state_dict().items()
    }
    problems = [f"{name} is missing" for name in shapes if name not in weights and name != TIED]
    for name, tensor in weights.items():
        if name not in shapes:
            problems.append(f"{name} is unexpected")
        elif tuple(tensor.shape) != shapes[name]:
            problems.append(f"{name} has shape {tuple(tensor.shape)} instead of {shapes[name]}")
        elif tensor.dtype not in FLOATS:
            problems.append(f"{name} holds {str(tensor.dtype).removeprefix('torch.')} {FLOATS_ONLY}")
    if problems:
        raise UserError(f"the weights of {source} do not fit its configuration: {abbreviated(problems, '; ')}")
    if bad := not_finite(weights):
        raise UserError(
            f"the weights of {source} are not finite in {abbreviated(bad)}: its training has diverged, or a file is "
            "damaged; use an earlier checkpoint, or export or download it again"
        )
    if TIED in weights and not torch.equal(weights[TIED], weights["encoder.words.weight"]):
        raise UserError(f"the output embedding of {source} is not its word embedding; fastbert's MLM head ties the two")
