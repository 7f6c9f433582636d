"""Table that `fastbert prepare` prints at the end."""

from collections.abc import Callable
from typing import Any

from fastbert.data import source_counts
from fastbert.data.encoding import MUCH_UNKNOWN
from fastbert.data.shards import whitespace_words


def summary(dataset: dict[str, Any]) -> str:
    """Plain-text table of a dataset.json, with a column for each split."""
    tokens = sum(split["tokens"] for split in dataset["splits"].values())
    rows: dict[str, Callable[[dict[str, Any]], str]] = {
        "documents": lambda s: f"{s['documents']:,}",
        "words and punctuation": lambda s: f"{s['words']:,}",
        "tokens": lambda s: f"{s['tokens']:,}",
        "fraction of all tokens": lambda s: f"{s['tokens'] / tokens:.2%}",
        "[UNK] tokens": lambda s: f"{unknown(s):.3%}",
        "tokens per word": lambda s: f"{s['tokens'] / max(s['words'], 1):.3f}",
        "bytes per token": lambda s: f"{s['bytes'] / s['tokens']:.2f}",
        "occurrences of rare words": lambda s: f"{s['rare']['occurrences']:,}",
        "sequences with a rare word": lambda s: f"{s['rare']['sequences_touched'] / s['rare']['sequences']:.1%}",
        "unigram entropy (nats)": lambda s: f"{s['unigram_entropy']:.3f}",
    }
    splits = dataset["splits"]
    cells = {name: [show(split) for split in splits.values()] for name, show in rows.items()}
    spaced = [whitespace_words(dataset, split) for split in splits]
    if None not in spaced:
        cells = {"documents": cells.pop("documents"), "words": [f"{count:,}" for count in spaced], **cells}
    width = max(map(len, cells)) + 2
    lines = [" " * width + "".join(f"{name:>16}" for name in splits)]
    lines += [f"{name:<{width}}" + "".join(f"{cell:>16}" for cell in row) for name, row in cells.items()]
    rare = dataset["rare_words"]
    options = dataset["options"]
    lines.append(
        f"{rare['words']:,} of {rare['distinct_words']:,} distinct words are rare "
        f"({options['rare_min']} to {options['rare_max']} times in train); vocabulary {dataset['vocab_size']:,}"
    )
    if count := dataset["duplicates"]["documents"]:
        dropped = "which were dropped" if options["drop_duplicates"] else "which --drop-duplicates leaves out"
        lines.append(f"{count:,} exact duplicates of earlier documents, {dropped}")
    if len(sources := dataset.get("sources", [])) > 1:
        lines += ["", *source_counts.table(sources)]
    return "\n".join(lines)


def warnings(dataset: dict[str, Any]) -> list[str]:
    """Warnings about a dataset.json that a user should read before training on it."""
    options, splits = dataset["options"], dataset["splits"]
    found = []
    worst = max(splits, key=lambda name: unknown(splits[name]))
    if unknown(splits[worst]) > MUCH_UNKNOWN:
        fix = "raise --vocab-size" if options["tokenizer"] is None else "give another --tokenizer, or none to train one"
        found.append(
            f"{unknown(splits[worst]):.1%} of the {worst} tokens are [UNK]: the tokenizer has no pieces for these "
            f"words, and nothing is learned about them; {fix}"
        )
    requested = options["validation_fraction"]
    documents, tokens = (
        splits["validation"][what] / sum(split[what] for split in splits.values()) for what in ("documents", "tokens")
    )
    if any(not 0.5 <= _odds(fraction) / _odds(requested) <= 2 for fraction in (documents, tokens)):
        count = sum(split["documents"] for split in splits.values())
        found.append(
            f"validation has {tokens:.2%} of the tokens and {documents:.2%} of the documents instead of "
            f"{requested:.2%}: documents are not split, and these {count:,} are too few, of unequal length or copies "
            "of each other; give more or shorter documents (in text files, separate them by a blank line), or another "
            "--seed or --validation-fraction"
        )
    dropped = options["drop_duplicates"] and dataset["duplicates"]["documents"]
    if dropped and (off := source_counts.weight_deviation(dataset.get("sources", []))):
        found.append(
            f"{off}: duplicates are dropped after the sources are mixed, so a document of several sources counts for "
            "the source that yields it first; remove duplicates from the files first, or adjust --weights"
        )
    return found


def unknown(split: dict[str, Any]) -> float:
    """Fraction of [UNK] among the tokens of a split, [SEP] excluded."""
    return split["unk_tokens"] / max(1, split["tokens"] - split["documents"])


def _odds(fraction: float) -> float:
    return fraction / (1 - fraction)
