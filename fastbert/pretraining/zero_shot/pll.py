"""`fastbert evaluate --pll`: pseudo-log-likelihood of sentences of a text (Salazar et al. 2020, arXiv 1910.14659).

    PLL(x) = sum over the tokens i of log p(x_i | x with i masked)

without special tokens. A sentence that is longer than the model reads is cut between words into parts, each scored
alone. [UNK] remains in the sentence but is not scored; each byte of its text costs 8 bits. With S sampled sentences,

    nats per token   - sum PLL / tokens that are scored
    nats per word    (- sum PLL + 8 ln 2 * [UNK] bytes) / words, the parts between white space
    bits per byte    (- sum PLL / ln 2 + 8 * [UNK] bytes) / UTF-8 bytes

The standard error of such a ratio R = sum y / sum x is sqrt(S / (S - 1) * sum (y - R x)^2) / sum x, over sentences.
"""

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding

from fastbert.data.sources import open_source
from fastbert.errors import UserError
from fastbert.outputs import output_file
from fastbert.pretraining.evaluate_options import EvaluateOptions
from fastbert.pretraining.zero_shot.scorer import Scorer, open_scorer
from fastbert.pretraining.zero_shot.scoring import Sentence, encoded, log_probabilities, word_ends
from fastbert.pretraining.zero_shot.sentences import sample_sentences
from fastbert.progress import progress
from fastbert.records import json_text
from fastbert.streams import warn

LONGEST = 512  # tokens of a sequence by default, if the model has more positions


class Measured(NamedTuple):
    """Sizes of a sentence and its score."""

    text: str
    pll: float
    tokens: int
    """Tokens that are scored."""
    words: int
    size: int
    """UTF-8 bytes."""
    unk_tokens: int
    unk_bytes: int


def measure_pll(options: EvaluateOptions) -> dict[str, Any]:
    """Pseudo-log-likelihood of a sample of sentences, per token, word and byte, with standard errors.

    Raises:
        UserError: no model or no text; a model that predicts no words; a text without a token that can be scored;
            scores that are not finite.
    """
    began = time.monotonic()
    scorer = open_scorer(options)
    if scorer.word_logits is None:
        raise UserError(
            f"{options.model} is a discriminator without a generator, which predicts no words; give its run, or score "
            "--pairs, for which its log-odds suffice"
        )
    length = sequence_length(scorer, options.length)
    texts, available = read_sentences(options)
    measured, cut = measure_sentences(scorer, texts, length, options)
    if not sum(one.tokens for one in measured):
        raise UserError(f"{options.pll} has no token that can be scored: all are [UNK]; give other text")
    if options.out is not None:
        write_scores(options.out, measured)
    if cut:
        warn(
            f"{cut:,} of {len(texts):,} sentences are longer than {length} tokens and were cut into parts; --length "
            "sets the limit"
        )
    return {
        "model": options.model,
        "source": options.pll,
        "score": scorer.names[-1],
        "pll_form": options.pll_form,
        "precision": scorer.precision,
        "length": length,
        "sentences": len(texts),
        "sentences_in_text": available,
        "sentences_cut": cut,
        **totals(measured),
        "seconds": time.monotonic() - began,
    }


def sequence_length(scorer: Scorer, length: int | None) -> int:
    """Tokens of the longest sequence, with special tokens."""
    if length is None:
        return min(LONGEST, scorer.positions)
    if length > scorer.positions and (warning := scorer.check_length(length, f"length {length}")):
        warn(warning)
    return length


def read_sentences(options: EvaluateOptions) -> tuple[list[str], int]:
    """The sampled sentences, and the number of sentences in the text."""
    source = open_source(options.pll, options.column)
    for warning in source.warnings:
        warn(warning)
    with progress("reading sentences", source.size) as shown:

        def documents() -> Iterator[str]:
            for text in source.documents():
                shown.update(source.position)
                yield text

        texts, count = sample_sentences(documents(), options.sentences)
    if not texts:
        raise UserError(f"{options.pll} has no text; give a text with sentences")
    return texts, count


def measure_sentences(
    scorer: Scorer, texts: Sequence[str], length: int, options: EvaluateOptions
) -> tuple[list[Measured], int]:
    """The measured sentences, and the number of them that were cut."""
    parts: list[Sentence] = []
    owners: list[int] = []
    unknown: list[tuple[int, int]] = []
    for number, encoding in enumerate(encoded(scorer, texts)):
        found = list(parts_of(encoding, length, scorer.unk_id))
        parts += found
        owners += [number] * len(found)
        spans = [
            texts[number][a:b] for id, (a, b) in zip(encoding.ids, encoding.offsets, strict=True) if id == scorer.unk_id
        ]
        unknown.append((len(spans), sum(len(span.encode()) for span in spans)))
    values = log_probabilities(scorer, parts, options.pll_form, options.machine.micro_batch_size)
    sums, tokens = np.zeros(len(texts)), np.zeros(len(texts), dtype=int)
    for owner, value in zip(owners, values, strict=True):
        sums[owner] += value.sum()
        tokens[owner] += len(value)
    if not np.isfinite(sums).all():
        raise UserError(f"the scores of {scorer.source} are not finite; try --machine.precision fp32")
    measured = [
        Measured(text, float(pll), int(count), len(text.split()), len(text.encode()), *unk)
        for text, pll, count, unk in zip(texts, sums, tokens, unknown, strict=True)
    ]
    return measured, int((np.bincount(owners) > 1).sum())


def parts_of(encoding: Encoding, length: int, unk_id: int | None) -> Iterator[Sentence]:
    """Parts of a text of at most `length` tokens with the special tokens around them, cut between words where
    possible."""
    special = np.array(encoding.special_tokens_mask, dtype=bool)
    ids, ends = np.array(encoding.ids, dtype=np.int32), word_ends(encoding)
    inner = np.flatnonzero(~special)
    if not len(inner):
        return
    first, stop = inner[0], inner[-1] + 1
    before, after = ids[:first], ids[stop:]
    room = max(1, length - len(before) - len(after))
    starts_word = np.ones(len(ids) + 1, dtype=bool)
    starts_word[1:-1] = ends[:-1] == np.arange(1, len(ids))
    start = first
    while start < stop:
        end = min(start + room, stop)
        if end < stop:
            end = max((cut for cut in range(start + 1, end + 1) if starts_word[cut]), default=end)
        part = np.concatenate([before, ids[start:end], after])
        positions = np.flatnonzero(ids[start:end] != (-1 if unk_id is None else unk_id))
        word_end = np.minimum(ends[start:end], end) - start
        yield Sentence(part, positions + len(before), word_end[positions] + len(before))
        start = end


def totals(measured: Sequence[Measured]) -> dict[str, Any]:
    """Sizes, and the three ratios with their standard errors; an error is None for one sentence."""
    nats = -np.array([one.pll for one in measured])
    sizes = {name: np.array([getattr(one, name) for one in measured]) for name in ("tokens", "words", "size")}
    unknown = np.array([one.unk_bytes for one in measured])
    bits = nats / math.log(2) + 8 * unknown
    found: dict[str, Any] = {
        "tokens": int(sizes["tokens"].sum()),
        "words": int(sizes["words"].sum()),
        "bytes": int(sizes["size"].sum()),
        "unk_tokens": sum(one.unk_tokens for one in measured),
        "unk_bytes": int(unknown.sum()),
    }
    ratios = {
        "nats_per_token": (nats, sizes["tokens"]),
        "nats_per_word": (bits * math.log(2), sizes["words"]),
        "bits_per_byte": (bits, sizes["size"]),
    }
    for name, (value, size) in ratios.items():
        found[name], found[f"{name}_error"] = ratio(value, size)
    return found


def ratio(y: np.ndarray, x: np.ndarray) -> tuple[float, float | None]:
    """sum y / sum x, and its standard error over the entries (see the module's docstring)."""
    value = float(y.sum() / x.sum())
    if len(y) < 2:
        return value, None
    return value, float(math.sqrt(len(y) / (len(y) - 1) * ((y - value * x) ** 2).sum()) / x.sum())


# --- output


def write_scores(path: str, measured: Sequence[Measured]) -> None:
    """Writes a line of JSON for each sentence."""
    with output_file(path, "w") as file:
        for one in measured:
            row = one._asdict()
            file.write(
                json_text({"text": row.pop("text"), "pll": row.pop("pll"), "bytes": row.pop("size"), **row}) + "\n"
            )


def report(result: dict[str, Any]) -> str:
    form = f"{'pseudo-log-likelihood' if result['score'] == 'pll' else result['score']} ({result['pll_form']})"

    def line(label: str, name: str, unit: str) -> str:
        error = result[f"{name}_error"]
        spread = "" if error is None else f" (standard error {error:.4f})"
        return f"  {label:<10} {result[name]:.4f} {unit}{spread}"

    return "\n".join(
        [
            f"{result['model']} on {result['source']}: {form} of {result['sentences']:,} of "
            f"{result['sentences_in_text']:,} sentences, {result['tokens']:,} tokens, {result['words']:,} words, "
            f"{result['bytes']:,} bytes",
            line("per token", "nats_per_token", "nats"),
            line("per word", "nats_per_word", "nats"),
            line("per byte", "bits_per_byte", "bits"),
            f"  {'[UNK]':<10} {result['unk_tokens']:,} tokens, {result['unk_bytes']:,} bytes",
        ]
    )
