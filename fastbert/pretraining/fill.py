"""`fastbert fill`: the most likely words for each [MASK] of a text, from an MLM head, from the generator or meta
controller of a run, or from any masked language model of transformers."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastbert.data.text import clean
from fastbert.data.tokenizer import WordPiece
from fastbert.encodings import explain
from fastbert.errors import UserError, abbreviated, brief, visible
from fastbert.hub.load import load_pretrained, tokenizer_of
from fastbert.model.config import EncoderConfig, check_length
from fastbert.objectives.objective import Objective
from fastbert.objectives.options import MLMOptions
from fastbert.objectives.replacement import Replacement
from fastbert.pretraining.fill_options import MASK, FillOptions, check_masked
from fastbert.pretraining.held_out import trained_objective
from fastbert.pretraining.zero_shot.scorer import is_foreign, open_foreign
from fastbert.records import json_text
from fastbert.streams import echo, warn
from fastbert.training.hardware import autocast, resolve_device, resolve_precision, setup_machine

Words = list[tuple[str, float]]
"""Tokens of the vocabulary with their probabilities, the most likely first."""


@dataclass(frozen=True)
class MaskedText:
    text: str
    ids: list[int]
    """[CLS] ... [SEP]."""


def fill(options: FillOptions) -> None:
    """Prints the most likely words for each text, as soon as the text has been read.

    Raises:
        UserError: no such model; a model that cannot fill in words; a text that is not UTF-8, is empty, has no [MASK],
            or is longer than the model's positions, if its position encoding does not extrapolate; standard input
            without text.
    """
    device = resolve_device(options.machine.device)
    precision, _ = resolve_precision(options.machine.precision, device)
    setup_machine(options.machine, device)
    if is_foreign(Path(options.model)):
        fill_with_transformers(options, device, precision)
        return
    pretrained = load_pretrained(options.model)
    vocabulary = tokenizer_of(pretrained)
    check_top(options, len(vocabulary.tokens))
    mask_rate = MLMOptions.mask_rate  # has no effect here
    objective = trained_objective(options.model, pretrained, vocabulary, options.machine.kernels, mask_rate)
    objective.to(device).eval()
    if isinstance(objective, Replacement):
        echo(f"the words are predicted by the {objective.second_network} of {options.model}")
    texts = masked_texts(options, vocabulary.build(), pretrained.config)
    count = 0
    while part := list(islice(texts, options.machine.micro_batch_size or 1)):
        for text, found in zip(part, likeliest(objective, part, vocabulary, options.top, precision), strict=True):
            print_words(options, text, found)
        count += len(part)
    check_any(count)


def fill_with_transformers(options: FillOptions, device: torch.device, precision: str) -> None:
    """`fill` with a model that transformers computes, one text at a time; [MASK] is read as its mask token."""
    scorer = open_foreign(options.model, {"source": options.model, "device": device, "precision": precision})
    tokenizer = scorer.tokenizer
    tokenizer.encode_special_tokens = False
    mask, size = tokenizer.id_to_token(scorer.mask_id), tokenizer.get_vocab_size()
    check_top(options, size)
    count = 0
    for where, text in texts_of(options):
        check_masked(text, where)
        ids = tokenizer.encode(text.replace(MASK, mask)).ids
        scorer.check_length(len(ids), f"{where} ({len(ids)} tokens with special tokens)")
        row = torch.tensor([ids], device=device)
        positions = (row[0] == scorer.mask_id).nonzero()[:, 0]
        with torch.no_grad(), autocast(device, precision):
            logits = scorer.word_logits(row.expand(len(positions), -1), positions)
        words = most_likely(logits, size, options.top)
        found = [[(word_of(tokenizer, index), probability) for index, probability in one] for one in words]
        print_words(options, MaskedText(text, ids), found)
        count += 1
    check_any(count)


def word_of(tokenizer: Tokenizer, index: int) -> str:
    """The text of a token without white space around it; the token itself if it is no text, such as half a
    character."""
    text = tokenizer.decode([index], skip_special_tokens=False).strip()
    return text if text and "\ufffd" not in text else tokenizer.id_to_token(index)


def check_top(options: FillOptions, size: int) -> None:
    """Raises a UserError if --top is more than the `size` of the vocabulary."""
    if options.top > size:
        raise UserError(f"--top {options.top} is more than the {size} tokens of {options.model}; lower it")


def check_any(count: int) -> None:
    """Raises a UserError if standard input had no text."""
    if not count:
        raise UserError("standard input has no text; give lines that contain [MASK]")


def print_words(options: FillOptions, text: "MaskedText", found: list[Words]) -> None:
    print(json_line(text, found) if options.json else table(text, found), flush=True)


# --- texts


def masked_texts(options: FillOptions, tokenizer: Tokenizer, config: EncoderConfig) -> Iterator[MaskedText]:
    """The texts of the command line or of standard input, as ids; warns of words that the tokenizer does not know, and
    of the first text that is longer than the positions."""
    warned = False
    for where, text in texts_of(options):
        check_masked(text, where)
        encoding = tokenizer.encode(text)
        length = len(encoding.ids)
        warning = check_length(config, length, f"{where} ({length} tokens with [CLS] and [SEP])")
        if warning and not warned:
            warn(warning)
            warned = True
        spans = zip(encoding.tokens, encoding.offsets, strict=True)
        unknown = [text[start:end] for token, (start, end) in spans if token == "[UNK]"]
        if unknown := [word for word in dict.fromkeys(unknown) if word != "[UNK]"]:
            warn(f"{where}: the tokenizer of {options.model} reads {abbreviated(unknown)} as [UNK], an unknown word")
        yield MaskedText(text, encoding.ids)


def texts_of(options: FillOptions) -> Iterator[tuple[str, str]]:
    """Pairs (name for messages, text)."""
    return standard_input() if options.reads_standard_input else enumerate_texts(options.texts)


def enumerate_texts(texts: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Pairs (name for messages, text)."""
    for number, text in enumerate(texts, 1):
        yield f"text {number}", clean(text, f"text {number}")


def standard_input() -> Iterator[tuple[str, str]]:
    """Lines of standard input that are not blank: pairs (name for messages, text).

    Raises:
        UserError: a line is not UTF-8, or contains a zero byte.
    """
    if sys.stdin.isatty():
        echo("reading texts with [MASK] from standard input, one a line; end with Ctrl-D")
    for number, line in enumerate(sys.stdin.buffer, 1):
        where = f"standard input, line {number}"
        try:
            text = clean(line.decode("utf-8"), where).strip("\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{where} is not UTF-8 text: {explain(line, error.start, None)}") from None
        if text.strip():
            yield where, text


# --- words


@torch.no_grad()
def likeliest(
    objective: Objective, texts: list[MaskedText], vocabulary: WordPiece, top: int, precision: str
) -> list[list[Words]]:
    """The `top` most likely words for each [MASK] of each text."""
    device = next(objective.parameters()).device
    rows = [torch.tensor(text.ids) for text in texts]
    ids = pad_sequence(rows, batch_first=True, padding_value=vocabulary.ids["[PAD]"]).to(device)  # [B, T]
    real = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(device)
    masked = ids == vocabulary.ids["[MASK]"]
    with autocast(device, precision):
        logits = word_logits(objective, ids, real, masked)
    words = most_likely(logits, len(vocabulary.tokens), top)
    rest = iter([[(vocabulary.tokens[index], value) for index, value in one] for one in words])
    return [list(islice(rest, count)) for count in masked.sum(1).tolist()]


def most_likely(logits: Tensor, size: int, top: int) -> list[list[tuple[int, float]]]:
    """The ids with the `top` highest probabilities and these, for each row of logits [M, V].

    Args:
        size: number of tokens; the embedding may have more rows.
    """
    probabilities, found = logits.float().softmax(-1)[:, :size].topk(top)
    if not probabilities.isfinite().all():
        raise UserError("the probabilities are not finite; try --machine.precision fp32, or another checkpoint")
    pairs = zip(found.tolist(), probabilities.tolist(), strict=True)
    return [list(zip(*one, strict=True)) for one in pairs]


def word_logits(objective: Objective, ids: Tensor, real: Tensor, masked: Tensor) -> Tensor:
    """Logits [M, V] at the M masked tokens of a batch.

    Args:
        ids: int64 [B, T].
        real: [B, T], 0 for padding.
        masked: bool [B, T].
    """
    if objective.word_network is None:
        raise UserError(
            f"the objective {type(objective).__name__} does not fill in words; give a model with an MLM head"
        )
    return objective.word_logits(objective.word_network(ids, attention_mask=real)[masked])


# --- output


def json_line(text: MaskedText, found: list[Words]) -> str:
    masks = [[{"word": word, "probability": value} for word, value in words] for words in found]
    return json_text({"text": text.text, "masks": masks})


def table(text: MaskedText, found: list[Words]) -> str:
    """The text, and below it a column for each [MASK]: words and their probabilities."""
    heads = [f"[MASK] {number}" if len(found) > 1 else "" for number in range(1, len(found) + 1)]
    cells = [[(brief(word, str), f"{100 * value:.1f} %") for word, value in words] for words in found]
    columns = []
    for head, column in zip(heads, cells, strict=True):
        width = max(len(word) for word, _ in column)
        lines = [f"{word:<{width}}  {value:>7}" for word, value in column]
        columns.append([f"{line:<{len(head)}}" for line in [head, *lines]])
    widths = [max(map(len, column)) for column in columns]
    rows = zip(*columns, strict=True)
    lines = ["    ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([visible(text.text), *(f"  {line.rstrip()}" for line in lines if line.strip())])
