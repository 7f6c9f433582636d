"""`fastbert evaluate --pairs`: the fraction of minimal pairs in which the acceptable sentence has the higher score.

A sentence's score is the sum over its tokens (`zero_shot.scorer`), without special tokens. A pair with equal scores
counts half. Accuracies of phenomena and of all pairs are means over paradigms.
"""

import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from fastbert.errors import UserError, plural
from fastbert.outputs import output_file
from fastbert.pretraining.evaluate_options import EvaluateOptions
from fastbert.pretraining.zero_shot.pair_files import Pair, phenomena, read_pairs
from fastbert.pretraining.zero_shot.scorer import Scorer, open_scorer
from fastbert.pretraining.zero_shot.scoring import Sentence, encoded, log_odds, log_probabilities, sentence
from fastbert.records import json_text
from fastbert.report.page import Table
from fastbert.streams import warn

Z = 1.959963984540054  # standard normal quantile of 0.975


def measure_pairs(options: EvaluateOptions) -> dict[str, Any]:
    """Accuracies by paradigm and by phenomenon, and their mean over the paradigms.

    Raises:
        UserError: no model or no pairs; a sentence that is longer than the positions; scores that are not finite.
    """
    began = time.monotonic()
    scorer = open_scorer(options)
    pairs = short_pairs(scorer, read_pairs(options.pairs), options.length)
    sentences, index = distinct_sentences(scorer, pairs)
    scores = sentence_scores(scorer, sentences, options)
    if options.out is not None:
        write_scores(options.out, pairs, index, scores)
    main, *others = scores
    return {
        "model": options.model,
        "pairs": options.pairs,
        "score": main,
        "pll_form": options.pll_form,
        "precision": scorer.precision,
        **accuracies(pairs, outcomes(scores[main], index)),
        "other_scores": {name: accuracies(pairs, outcomes(scores[name], index))["accuracy"] for name in others},
        "seconds": time.monotonic() - began,
    }


def short_pairs(scorer: Scorer, pairs: Sequence[Pair], length: int | None) -> Sequence[Pair]:
    """The pairs without those that have a sentence of more than `length` tokens, special tokens included.

    Raises:
        UserError: none is left.
    """
    if length is None:
        return pairs
    texts = list(dict.fromkeys(text for pair in pairs for text in (pair.good, pair.bad)))
    tokens = {text: len(sentence(one).ids) for text, one in zip(texts, encoded(scorer, texts), strict=True)}
    found = [pair for pair in pairs if max(tokens[pair.good], tokens[pair.bad]) <= length]
    if not found:
        raise UserError(f"all pairs have a sentence of more than {length} tokens; raise --length")
    if left_out := len(pairs) - len(found):
        warn(f"{left_out:,} of {len(pairs):,} pairs have a sentence of more than {length} tokens and are left out")
    return found


def distinct_sentences(scorer: Scorer, pairs: Sequence[Pair]) -> tuple[list[Sentence], np.ndarray]:
    """The sentences that differ in their tokens, and the indices of the good and the bad one of each pair, int64
    [pairs, 2].

    Raises:
        UserError: a sentence has no token, or is longer than the positions of an encoding that does not extrapolate.
    """
    where: dict[str, str] = {}  # text -> its first occurrence, for errors
    for pair in pairs:
        where.setdefault(pair.good, f"{pair.where}: sentence_good")
        where.setdefault(pair.bad, f"{pair.where}: sentence_bad")
    found: dict[bytes, int] = {}
    sentences: list[Sentence] = []
    of_text: dict[str, int] = {}
    unknown, longer, warning = 0, 0, None
    for text, encoding in zip(where, encoded(scorer, list(where)), strict=True):
        one = sentence(encoding)
        if not len(one.positions):
            raise UserError(f"{where[text]} has no tokens for the tokenizer of {scorer.source}; leave the pair out")
        if len(one.ids) > scorer.positions:
            warning = warning or scorer.check_length(len(one.ids), f"{where[text]} ({len(one.ids)} tokens)")
            longer += 1
        unknown += scorer.unk_id in encoding.ids
        of_text[text] = found.setdefault(one.ids.tobytes(), len(sentences))
        if of_text[text] == len(sentences):
            sentences.append(one)
    index = np.array([[of_text[pair.good], of_text[pair.bad]] for pair in pairs])
    if warning:
        warn(f"{warning}; {longer:,} of {len(where):,} sentences are longer")
    if unknown:
        warn(f"{unknown:,} of {len(where):,} sentences have words that the tokenizer of {scorer.source} reads as [UNK]")
    if equal := int((index[:, 0] == index[:, 1]).sum()):
        warn(f"{equal:,} of {len(pairs):,} pairs have equal tokens (case, accents, unknown words); they count half")
    return sentences, index


def sentence_scores(scorer: Scorer, sentences: Sequence[Sentence], options: EvaluateOptions) -> dict[str, np.ndarray]:
    """Score of every sentence, float64 [sentences], by the name of the score, the main one first.

    Raises:
        UserError: a score is not finite.
    """
    rows = options.machine.micro_batch_size
    words = odds = None
    if scorer.word_logits is not None:
        words = log_probabilities(scorer, sentences, options.pll_form, rows)
    if scorer.log_odds is not None:
        odds = log_odds(scorer, sentences, rows)
    if words is None or odds is None:
        values = [words if odds is None else odds]
    else:
        both = [scorer.combined(log_q, value) for log_q, value in zip(words, odds, strict=True)]
        values = [both, odds, words]
    found = {name: np.array([one.sum() for one in value]) for name, value in zip(scorer.names, values, strict=True)}
    for name, value in found.items():
        if not np.isfinite(value).all():
            raise UserError(
                f"the {name} scores of {scorer.source} are not finite; try --machine.precision fp32, or another "
                "checkpoint"
            )
    return found


# --- accuracies


def outcomes(scores: np.ndarray, index: np.ndarray) -> np.ndarray:
    """1 where the good sentence has the higher score, 0 where the bad one has, 0.5 for a tie: float64 [pairs]."""
    return (np.sign(scores[index[:, 0]] - scores[index[:, 1]]) + 1) / 2


def accuracies(pairs: Sequence[Pair], values: np.ndarray) -> dict[str, Any]:
    """The mean over paradigms, `phenomena` and `paradigms` by name; each with its number of pairs and of ties, and a 95
    % interval."""
    members: dict[str, list[int]] = {}
    for number, pair in enumerate(pairs):
        members.setdefault(pair.paradigm, []).append(number)
    phenomenon = phenomena(pairs)
    paradigms = {name: values[rows] for name, rows in members.items()}
    groups: dict[str, list[np.ndarray]] = {}
    for name, group in phenomenon.items():
        if group is not None:
            groups.setdefault(group, []).append(paradigms[name])
    return {
        **summary(paradigms.values()),
        "phenomena": {name: summary(groups[name]) for name in sorted(groups)},
        "paradigms": {
            name: {"phenomenon": phenomenon[name], **summary([paradigms[name]])}
            for name in sorted(paradigms, key=lambda name: (phenomenon[name] or "", name))
        },
    }


def summary(groups: Iterable[np.ndarray]) -> dict[str, Any]:
    """Mean over groups of the mean of their outcomes, with its interval, and the numbers of pairs and ties.

    The interval is Wilson's, for the number of pairs of a single sample whose mean would have the variance of this one,
    sum over the K groups of p (1 - p) / n, divided by K^2. It is about other pairs of the same paradigms. A tie counts
    as if the pair had been decided by a coin.
    """
    groups = list(groups)
    means = [float(group.mean()) for group in groups]
    mean = math.fsum(means) / len(means)
    count = sum(map(len, groups))
    variance = math.fsum(p * (1 - p) / len(group) for p, group in zip(means, groups, strict=True)) / len(means) ** 2
    low, high = wilson(mean, mean * (1 - mean) / variance if variance else count)
    ties = int(sum((group == 0.5).sum() for group in groups))
    return {"accuracy": mean, "low": low, "high": high, "count": count, "ties": ties}


def wilson(p: float, n: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion p of n observations."""
    center = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    reach = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return max(0.0, center - reach), min(1.0, center + reach)


# --- output


def write_scores(path: str, pairs: Sequence[Pair], index: np.ndarray, scores: dict[str, np.ndarray]) -> None:
    """Writes a line of JSON for each pair, with the scores of both sentences."""
    with output_file(path, "w") as file:
        for pair, (good, bad) in zip(pairs, index, strict=True):
            values = {name: {"good": float(value[good]), "bad": float(value[bad])} for name, value in scores.items()}
            row = {"UID": pair.paradigm, "sentence_good": pair.good, "sentence_bad": pair.bad, "scores": values}
            file.write(json_text(row) + "\n")


def report(result: dict[str, Any]) -> str:
    """Tables for a terminal: paradigms, phenomena, and the mean last."""
    rows = [_row(one["phenomenon"] or "", name, one=one) for name, one in result["paradigms"].items()]
    parts = [_table(["phenomenon", "paradigm"], rows)]
    if result["phenomena"]:
        parts.append(_table(["phenomenon"], [_row(name, one=one) for name, one in result["phenomena"].items()]))
    name = f"{result['score']} ({result['pll_form']})" if result["score"] == "pll" else result["score"]
    parts.append(
        f"{result['model']} on {result['pairs']}: {plural(result['count'], 'pair')} in "
        f"{plural(len(result['paradigms']), 'paradigm')}\n"
        f"  accuracy by {name}: {_percent(result['accuracy'])}, 95 % interval {_interval(result)}, "
        f"{plural(result['ties'], 'tie')}; chance is 50 %"
    )
    others = [f"{name} {_percent(value)}" for name, value in result["other_scores"].items()]
    if others:
        parts[-1] += f"\n  by parts of the model: {', '.join(others)}"
    return "\n\n".join(parts)


def _table(names: list[str], rows: list[list[str]]) -> str:
    return Table([*names, "accuracy", "95 % interval", "pairs", "ties"], rows).plain()


def _row(*names: str, one: dict[str, Any]) -> list[str]:
    return [*names, _percent(one["accuracy"]), _interval(one), f"{one['count']}", f"{one['ties']}"]


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _interval(one: dict[str, Any]) -> str:
    return f"[{100 * one['low']:.1f}, {100 * one['high']:.1f}]"
