"""Export of an encoder to a folder that transformers loads: as transformers' own BERT (or, with a discriminator's head,
ELECTRA) if that computes the same, else with code.

The folder holds config.json, model.safetensors, the tokenizer's files, README.md and, with code,
configuration_fastbert.py and modeling_fastbert.py.
"""

import functools
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastbert
from fastbert.data.tokenizer_check import check_folder
from fastbert.data.tokenizer_files import interpret
from fastbert.data.tokenizer_folders import load_tokenizer
from fastbert.errors import UserError
from fastbert.files import contents, disk_errors
from fastbert.hub.card import model_card
from fastbert.hub.export_code import export_code
from fastbert.hub.names import (
    BERT_OPTIONS,
    DISCRIMINATOR,
    OWN_OPTIONS,
    TIED,
    bert_names,
    check_weights,
    head_of,
    is_bert,
)
from fastbert.model.config import EncoderConfig
from fastbert.outputs import check_output_folder, output_folder, resolved
from fastbert.progress import progress
from fastbert.records import json_text
from fastbert.training.tensors import read_metadata, serialized

AUTO_MAP = {
    "AutoConfig": "configuration_fastbert.FastBertConfig",
    "AutoModel": "modeling_fastbert.FastBertModel",
    "AutoModelForMaskedLM": "modeling_fastbert.FastBertForMaskedLM",
    "AutoModelForPreTraining": "modeling_fastbert.FastBertForPreTraining",
    "AutoModelForSequenceClassification": "modeling_fastbert.FastBertForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_fastbert.FastBertForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_fastbert.FastBertForQuestionAnswering",
}
# Keys: the exported head, if any.
FAMILIES = {None: "bert", "mlm": "bert", "replaced": "electra"}
NATIVE_CLASSES = {None: "BertModel", "mlm": "BertForMaskedLM", "replaced": "ElectraForPreTraining"}
OWN_CLASSES = {None: "FastBertModel", "mlm": "FastBertForMaskedLM", "replaced": "FastBertForPreTraining"}
MARK = "fastbert"
"""Key in the header of an export's model.safetensors. `save_pretrained` does not copy it, so a model that was trained
further and saved with transformers is not treated as an export that may be replaced."""
NO_TYPES = "no_token_types"
"""Key in that header: fastbert's encoder has no token types, so those of the exported BERT are zeros."""
TOKENIZER = "tokenizer"
"""Key in that header: fingerprint of the vocabulary that the weights were trained with."""
SETTINGS = "config"
"""Key in that header: config.json as it was written, so that later changes of it are detected."""


@progress("exporting the model")
def export_model(
    config: EncoderConfig,
    weights: dict[str, Tensor],
    tokenizer: Path,
    out: Path,
    *,
    card: dict[str, Any] | None = None,
    max_length: int | None = None,
) -> None:
    """Writes the folder `out` atomically; an earlier export there is replaced.

    An encoder that computes what BERT does (absolute positions, post-norm, GELU, biases) becomes a BERT of
    transformers, or an ELECTRA if it has ELECTRA's head. All others are exported with two files of code and are
    loaded with `trust_remote_code=True`, without fastbert.

    Args:
        config: configuration of the encoder.
        weights: `encoder.<names of Encoder>` and, if there is one, `head.<names of MLMHead or ReplacedHead>`, on any
            device; the tied `head.decoder.weight` may be left out.
        tokenizer: folder with tokenizer.json or vocab.txt. Its files are not copied: they are interpreted, written
            again, and compared with what transformers reads.
        out: folder to write.
        card: rows of the table in README.md: data, steps, validation loss, command, ...
        max_length: `model_max_length` of the tokenizer, in tokens; None for the model's positions.

    Raises:
        UserError: `out` holds something else; the weights do not fit `config`; the tokenizer is missing, damaged or
            larger than the vocabulary of the model; the disk is full or the folder is not writable.
    """
    out, tokenizer = resolved(out), Path(tokenizer)
    check_out(out)
    check_weights(config, weights, "the model to export")
    vocabulary = load_tokenizer(tokenizer)
    if len(vocabulary.tokens) > config.vocab_size:
        raise UserError(
            f"the tokenizer in {tokenizer} has {len(vocabulary.tokens)} tokens and the model {config.vocab_size}; "
            "give the folder of the tokenizer it was trained with"
        )
    native, head = is_bert(config), head_of(weights)
    tensors = _bert_weights(config, weights, head) if native else _own_weights(weights, head)
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))
    tensors = {
        name: tensor.to(dtype) for name, tensor in tensors.items()
    }  # config.json names one dtype for all weights
    mark = {MARK: fastbert.__version__, TOKENIZER: vocabulary.fingerprint}
    mark |= {NO_TYPES: "true"} if native and not config.type_vocab_size else {}
    settings = _config_json(config, native, head, vocabulary.ids["[PAD]"], tensors)
    with output_folder(out, first="model.safetensors", last="config.json") as folder:
        write_model(folder, settings, tensors, mark)
        vocabulary.save(folder, max_length or config.max_positions)
        check_folder(vocabulary, interpret(folder))
        parameters = sum(tensor.numel() for name, tensor in weights.items() if name != TIED)
        text = model_card(config, out.name, native=native, head=head, parameters=parameters, facts=card or {})
        (folder / "README.md").write_text(text, encoding="utf-8")
        if not native:
            for name, text in export_code(config.position).items():
                (folder / name).write_text(text, encoding="utf-8")


def write_model(folder: Path, settings: dict[str, Any], tensors: dict[str, Tensor], mark: dict[str, str]) -> None:
    """Writes config.json and model.safetensors, whose header has a copy of it."""
    (folder / "config.json").write_text(json_text(settings, indent=2) + "\n", encoding="utf-8")
    metadata = {"format": "pt", **mark, SETTINGS: json_text(settings, sort_keys=True)}
    # Not save_file, whose error for a full disk atomic_folder does not handle.
    (folder / "model.safetensors").write_bytes(serialized(tensors, metadata))


def check_out(out: Path) -> None:
    """Raises a UserError if no export can be written to `out`, or it holds something else."""
    if os.path.lexists(out) and not out.is_dir():
        raise UserError(f"cannot export to {out}: it is a file; choose a folder")
    check_output_folder(out)
    with disk_errors(out):
        if not out.is_dir() or not contents(out):
            return
    model = out / "model.safetensors"
    if not model.is_file() or MARK not in read_metadata(model):
        raise UserError(f"{out} is not empty and is not an export of fastbert; choose another folder")


def _bert_weights(config: EncoderConfig, weights: dict[str, Tensor], head: str | None) -> dict[str, Tensor]:
    family = FAMILIES[head]
    names = bert_names(config, types=config.type_vocab_size > 0, head=head, family=family)
    tensors = {}
    for ours, theirs in names.items():
        for name, part in zip(theirs, weights[ours].detach().cpu().chunk(len(theirs)), strict=True):
            tensors[name] = part.contiguous()
    if not config.type_vocab_size:
        # BERT adds a type embedding to every token. Two rows: tokenizers number the segments of a pair 0 and 1.
        words = tensors[f"{family}.embeddings.word_embeddings.weight"]
        tensors[f"{family}.embeddings.token_type_embeddings.weight"] = torch.zeros(2, config.width, dtype=words.dtype)
    # BertModel's own names have no prefix.
    return tensors if head else {name.removeprefix("bert."): tensor for name, tensor in tensors.items()}


def _own_weights(weights: dict[str, Tensor], head: str | None) -> dict[str, Tensor]:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items() if name != TIED}
    if head == "replaced":
        tensors = {re.sub("^head[.]", DISCRIMINATOR, name): tensor for name, tensor in tensors.items()}
    return tensors if head else {name.removeprefix("encoder."): tensor for name, tensor in tensors.items()}


def _config_json(
    config: EncoderConfig, native: bool, head: str | None, pad: int, tensors: dict[str, Tensor]
) -> dict[str, Any]:
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    values = {theirs: getattr(config, ours) for ours, theirs in BERT_OPTIONS.items()}
    shared = {"classifier_dropout": None, "pad_token_id": pad, "tie_word_embeddings": True, "dtype": dtype}
    if native:
        values["type_vocab_size"] = config.type_vocab_size or 2
        if FAMILIES[head] == "electra":
            values["embedding_size"] = config.width
        kind = {"architectures": [NATIVE_CLASSES[head]], "model_type": FAMILIES[head]}
        return kind | values | shared | {"hidden_act": "gelu", "position_embedding_type": "absolute"}
    values |= {theirs: getattr(config, ours) for ours, theirs in OWN_OPTIONS.items()}
    kind = {"architectures": [OWN_CLASSES[head]], "model_type": "fastbert"}
    return kind | {"auto_map": AUTO_MAP} | values | shared
