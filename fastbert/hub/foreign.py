"""Loading of encoders of other architectures (`fastbert.model.foreign`) for fine-tuning. The folder's weights are read
like those of a BERT; transformers computes, and no code of the folder is executed."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastbert.data.foreign_tokenizer import AnyTokenizer, load_foreign_tokenizer
from fastbert.data.tokenizer_folders import load_tokenizer
from fastbert.downloads import local_folder, shown_folder
from fastbert.errors import UserError, abbreviated, brief
from fastbert.hub.load import BERT_ONLY, LARGEST_CONFIG, Pretrained, load_pretrained
from fastbert.hub.names import FLOATS, FLOATS_ONLY
from fastbert.hub.weight_files import read_weights
from fastbert.model.foreign import FAMILIES, ForeignConfig, ForeignEncoder
from fastbert.progress import progress
from fastbert.records import read_json
from fastbert.training.finite import not_finite

_POOLER = "pooler."
"""Prefix of weights of an encoder that no head here reads."""
_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")


def family_of(folder: Path) -> str | None:
    """The key in FAMILIES of the model in `folder`; None if it is none of them.

    Raises:
        UserError: config.json is damaged.
    """
    path = folder / "config.json"
    if not path.is_file():
        return None
    family = read_json(path, "model configuration", dict, LARGEST_CONFIG).get("model_type")
    return family if isinstance(family, str) and family in FAMILIES else None


def load_any(path: str | Path) -> Pretrained:
    """Loads an encoder for fine-tuning: what `load_pretrained` reads, or a folder of one of FAMILIES.

    Raises:
        UserError: as in `load_pretrained`.
    """
    folder = local_folder(path)
    return load_pretrained(folder) if family_of(folder) is None else load_foreign(folder)


def open_tokenizer(folder: Path) -> AnyTokenizer:
    """Opens the tokenizer of a model in `folder`. Raises a UserError if there is none, or it cannot be used."""
    return load_tokenizer(folder) if family_of(folder) is None else load_foreign_tokenizer(folder)


@progress("reading the model")
def load_foreign(folder: Path) -> Pretrained:
    """Reads the encoder in a folder of one of FAMILIES; heads and poolers are ignored.

    Raises:
        UserError: its configuration is not supported; a file is missing or damaged; weights are missing, unexpected, or
            do not fit.
    """
    path = folder / "config.json"
    config = _config(path, read_json(path, "model configuration", dict, LARGEST_CONFIG))
    family = config.architecture
    tensors, _ = read_weights(folder)
    if config.layers > 1000 + len(tensors):  # before a model of that size is built
        raise UserError(f"{path} has {config.layers} layers, and the weights lack them")
    try:
        with torch.device("meta"):
            expected = ForeignEncoder(config).model.state_dict()
    except Exception as error:  # transformers checks values in many ways
        reason = brief(str(error).strip().partition("\n")[0], str)
        raise UserError(f"{path}: transformers cannot build this {family.title}: {reason}; fix it") from None
    tensors = {_modern(name): tensor for name, tensor in tensors.items()}
    alone = not any(name.startswith(family.prefix) for name in tensors)  # saved without a head
    heads = {} if alone else {name: one for name, one in tensors.items() if not name.startswith(family.prefix)}
    found = {name.removeprefix(family.prefix): one for name, one in tensors.items() if name not in heads}
    found = {name: one for name, one in found.items() if name not in _BUFFERS}
    problems = [f"{name} is missing" for name in expected if name not in found]
    for name, tensor in found.items():
        if name not in expected:
            if not name.startswith(_POOLER):
                problems.append(f"{name} is unexpected")
        elif tensor.shape != expected[name].shape:
            problems.append(f"{name} has shape {tuple(tensor.shape)} instead of {tuple(expected[name].shape)}")
        elif tensor.dtype not in FLOATS:
            problems.append(f"{name} holds {str(tensor.dtype)[6:]} {FLOATS_ONLY}")
    if problems:
        raise UserError(f"the weights in {folder} do not fit its config.json: {abbreviated(problems, '; ')}")
    weights: dict[str, Tensor] = {f"encoder.model.{name}": found[name] for name in expected}
    weights |= {f"head.{name}": tensor for name, tensor in heads.items()}
    if bad := not_finite(weights):
        raise UserError(f"the weights in {folder} are not finite in {abbreviated(bad)}; download or export it again")
    return Pretrained(config, weights, folder, f"the {family.title} in {shown_folder(folder)}")


def _modern(name: str) -> str:
    """Converts TensorFlow's gamma and beta in the name of a weight to PyTorch's."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _config(path: Path, settings: dict[str, Any]) -> ForeignConfig:
    family = FAMILIES[settings["model_type"]]
    keys = ("vocab_size", *family.sizes, "max_position_embeddings")
    for key in keys:
        if type(settings.get(key)) is not int or not 1 <= settings[key] < 2**31:
            found = brief(settings[key]) if key in settings else "missing"
            raise UserError(f"{path}: {key} is {found}, and must be a whole number above 0; restore the file")
    for key in ("is_decoder", "add_cross_attention", "position_embedding_type"):
        if settings.get(key, BERT_ONLY[key]) != BERT_ONLY[key]:
            raise UserError(
                f"{path} has {key} {brief(settings[key])}; fastbert reads encoders with {BERT_ONLY[key]!r} only"
            )
    vocab_size, layers, width, heads, ffn, positions = (settings[key] for key in keys)
    if family.skips_padding:
        positions -= 1 + _padding(path, settings)
    return ForeignConfig(
        family=settings["model_type"],
        settings=settings,
        vocab_size=vocab_size,
        layers=layers,
        width=width,
        heads=heads,
        ffn=ffn,
        max_positions=positions,
        dropout=0.0,
        attention_dropout=0.0,
        initializer_std=0.02,
    )


def _padding(path: Path, settings: dict[str, Any]) -> int:
    padding = settings.get("pad_token_id", 1)
    if type(padding) is not int or not 0 <= padding < settings["max_position_embeddings"] - 1:
        raise UserError(f"{path}: pad_token_id is {brief(padding)}, which leaves no positions; restore the file")
    return padding
