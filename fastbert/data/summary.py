"""The table with which `fastbert prepare` ends."""

from collections.abc import Callable
from typing import Any

from fastbert.data import shares


def summary(dataset: dict[str, Any]) -> str:
    """A plain table of a dataset.json: one column a split."""
    rows: dict[str, Callable[[dict[str, Any]], str]] = {
        "documents": lambda s: f"{s['documents']:,}",
        "words (and marks)": lambda s: f"{s['words']:,}",
        "tokens": lambda s: f"{s['tokens']:,}",
        "tokens a word": lambda s: f"{s['tokens'] / max(s['words'], 1):.3f}",
        "bytes a token": lambda s: f"{s['bytes'] / s['tokens']:.2f}",
        "rare words' occurrences": lambda s: f"{s['rare']['occurrences']:,}",
        "sequences of 128 touched": lambda s: f"{s['rare']['sequences_touched'] / s['rare']['sequences']:.1%}",
        "unigram entropy (nats)": lambda s: f"{s['unigram_entropy']:.3f}",
    }
    splits = dataset["splits"]
    width = max(map(len, rows)) + 2
    lines = [" " * width + "".join(f"{name:>16}" for name in splits)]
    for name, show in rows.items():
        lines.append(f"{name:<{width}}" + "".join(f"{show(split):>16}" for split in splits.values()))
    rare = dataset["rare_words"]
    options = dataset["options"]
    lines.append(
        f"{rare['words']:,} of {rare['distinct_words']:,} distinct words are rare "
        f"({options['rare_min']} to {options['rare_max']} times in train); vocabulary {dataset['vocab_size']:,}"
    )
    if lack := rare["counts_may_lack"]:
        lines.append(f"counts of words may fall short by up to {lack}: too many distinct ones to hold")
    if len(sources := dataset.get("sources", [])) > 1:
        lines += ["", *shares.table(sources)]
    return "\n".join(lines)
