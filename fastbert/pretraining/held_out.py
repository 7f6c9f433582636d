"""`fastbert evaluate`: masked loss of a model on held-out text in nats and bits per byte; for a run with two networks,
all metrics of its objective."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.config import from_dict
from fastbert.data.batches import InMemory, PackedRows, validation_batches
from fastbert.data.encoding import MUCH_UNKNOWN, TextEncoder
from fastbert.data.shards import unigram_entropy
from fastbert.data.sources import open_source
from fastbert.data.tokenizer import WordPiece
from fastbert.errors import UserError
from fastbert.hub.load import Pretrained, find_checkpoint, load_pretrained, tokenizer_of
from fastbert.model.config import check_length
from fastbert.objectives import OBJECTIVES
from fastbert.objectives.mlm import MLM
from fastbert.objectives.objective import Metric, Objective
from fastbert.objectives.options import MLMOptions
from fastbert.pretraining.evaluate_options import EvaluateOptions
from fastbert.pretraining.evaluation import evaluate, shown
from fastbert.pretraining.options import PretrainOptions
from fastbert.progress import progress
from fastbert.records import check, json_text
from fastbert.streams import warn
from fastbert.training.hardware import resolve_device, resolve_precision, setup_machine


def evaluate_text(options: EvaluateOptions) -> dict[str, Any]:
    """Prints the figures of `--source` and returns them.

    Raises:
        UserError: model or text is missing, the model has no MLM head, the text is too short, sequences exceed the
            positions of an encoding that does not extrapolate, or no token can be masked.
    """
    device = resolve_device(options.machine.device)
    precision, _ = resolve_precision(options.machine.precision, device)
    setup_machine(options.machine, device)
    pretrained = load_pretrained(options.model)
    length = options.length or min(512, pretrained.config.max_positions)
    if warning := check_length(pretrained.config, length, f"length {length}"):
        warn(warning)
    vocabulary = tokenizer_of(pretrained)
    text = read_text(options, vocabulary)
    tokens = text.tokens
    rows = PackedRows(InMemory(tokens), length, vocabulary.ids["[CLS]"], vocabulary.ids["[SEP]"])
    if not len(rows):
        raise UserError(f"{options.source} has {len(tokens)} tokens, less than one sequence of {length}")
    kernels, mask_rate = options.machine.kernels, options.mask_rate
    objective = trained_objective(options.model, pretrained, vocabulary, kernels, mask_rate).to(device)
    ordinary = ~np.isin(tokens, vocabulary.special_ids)
    words = tokens[ordinary]
    fraction = text.unk_tokens / max(1, text.unk_tokens + len(words))
    if fraction > MUCH_UNKNOWN:
        warn(
            f"{fraction:.1%} of the tokens of {options.source} are [UNK], because the tokenizer of "
            f"{options.model} has no pieces for them: loss and accuracy leave them out, bits per byte counts 8 bits "
            "for each of their bytes",
        )
    if ordinary[: len(rows) * (length - 1)].any():
        micro = options.machine.micro_batch_size or 32
        batches = validation_batches(rows, len(rows), micro, device)
        values = evaluate(objective, batches, precision, sequences=len(rows))
    elif objective.loss_in_nats and not len(words):
        values = {"loss": None, "accuracy": None}  # all tokens are [UNK]: 8 bits for each byte
    else:
        raise UserError(f"{options.source} has no token that can be masked: all are [UNK]; give more or other text")
    result = {
        "model": options.model,
        "source": options.source,
        "tokens": len(rows) * length,
        "length": length,
        "positions": pretrained.config.max_positions,
        "bytes": text.size,
        "unk_tokens": text.unk_tokens,
        "unk_fraction": fraction,
        "unk_bytes": text.unk_bytes,
        **values,
        "unigram_entropy": unigram_entropy(np.bincount(words, minlength=len(vocabulary.tokens)), vocabulary),
        "mask_rate": options.mask_rate,
    }
    if objective.loss_in_nats:
        bits = (values["loss"] or 0.0) * len(words) / math.log(2) + 8 * text.unk_bytes
        result["bits_per_byte"] = bits / text.size
    print(json_text(result) if options.json else report(result, objective.metrics(values)))
    return result


def trained_objective(
    model: str, pretrained: Pretrained, vocabulary: WordPiece, kernels: str, mask_rate: float | None
) -> Objective:
    """The objective with its trained weights, without a note dictionary.

    Args:
        mask_rate: replaces that of the training unless it is None.

    Raises:
        UserError: the model has no MLM head, and its generator or meta controller is missing.
    """
    if pretrained.has_head:
        given = MLMOptions() if mask_rate is None else MLMOptions(mask_rate=mask_rate)
        objective = MLM(pretrained.config, given, vocabulary, kernels)
        objective.load_state_dict(pretrained.weights)
        return objective
    checkpoint = find_checkpoint(Path(model))
    if checkpoint is None:
        raise UserError(
            f"{model} has no MLM head, so it cannot predict masked words; give a model with one: the model before "
            "fine-tuning or, for an export of ELECTRA or multiple choice, its run"
        )
    state = check(checkpoint.state, {"options": dict}, f"{checkpoint.path}/state.json")  # hashed, unlike config.yaml
    trained = from_dict(PretrainOptions, state["options"], f"{checkpoint.path}/state.json")
    objective_options = trained.of_objective
    if mask_rate is not None:
        objective_options = replace(objective_options, mask_rate=mask_rate)
    objective = OBJECTIVES[trained.objective](pretrained.config, objective_options, vocabulary, kernels)
    weights = checkpoint.tensors["model"].items()
    try:
        objective.load_state_dict({name: tensor for name, tensor in weights if not name.startswith("notes.")})
    except RuntimeError as error:
        raise UserError(f"checkpoint {checkpoint.path} does not fit its options: {error}") from None
    return objective


@dataclass(frozen=True)
class HeldOut:
    """Held-out text as tokens."""

    tokens: np.ndarray
    """int64, each document closed by [SEP]."""
    size: int
    """UTF-8 bytes of the text."""
    unk_tokens: int
    unk_bytes: int
    """UTF-8 bytes of the text that became [UNK]."""


def read_text(options: EvaluateOptions, vocabulary: WordPiece) -> HeldOut:
    """Reads the first documents of the source, until they have `max_tokens` tokens."""
    encoder, unk = TextEncoder(vocabulary), vocabulary.ids["[UNK]"]
    parts: list[np.ndarray] = []
    count = size = unk_bytes = 0
    source = open_source(options.source, options.column)
    for warning in source.warnings:
        warn(warning)
    with progress("tokenizing", options.max_tokens, "tokens") as shown:
        for text in source.documents():
            encoded = encoder.encode([text], [False])
            parts.append(encoded.tokens)
            count, size = count + len(encoded.tokens), size + int(encoded.sizes[0])
            shown.update(count)
            if (encoded.tokens == unk).any():
                unk_bytes += encoder.unknown_bytes(text)
            if count >= options.max_tokens:
                break
    tokens = np.concatenate(parts).astype(np.int64)
    return HeldOut(tokens, size, int((tokens == unk).sum()), unk_bytes)


def report(result: dict[str, Any], figures: Sequence[Metric]) -> str:
    lines = [
        f"{result['model']} on {result['source']}: {result['tokens']} tokens, {result['bytes']} bytes",
        f"  {'unigram entropy':<17} {result['unigram_entropy']:.4f} nats",
        f"  {'[UNK]':<17} {result['unk_fraction']:.2%} of the tokens, {result['unk_bytes']} bytes",
    ]
    lines += [f"  {figure.label:<17} {shown(figure, digits=4)}" for figure in figures]
    if "bits_per_byte" in result:
        lines.append(f"  {'bits per byte':<17} {result['bits_per_byte']:.4f}")
    return "\n".join(lines)
