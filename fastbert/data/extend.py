"""`fastbert extend-vocab`: appends entries for the words of another domain or language to a WordPiece vocabulary.

The entries become part of WordPiece's vocabulary. Added tokens would match anywhere in a text, and so cut other words
in the middle. The ids of the old entries do not change: `fastbert pretrain --init-from` reads a model of the old
vocabulary and makes rows for the new entries.
"""

import dataclasses
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastbert.data.encoding import split_chunks
from fastbert.data.new_entries import NewEntries, choose_entries
from fastbert.data.sources import COLUMN, check_source, has_columns, open_source
from fastbert.data.tokenizer import WordPiece, pieces_of, read_sample
from fastbert.data.tokenizer_folders import load_tokenizer
from fastbert.downloads import TOKENIZER, TOKENIZER_FROM_HUB, check_downloaded
from fastbert.errors import UserError
from fastbert.files import atomic_folder
from fastbert.outputs import check_output_folder
from fastbert.progress import progress
from fastbert.ranges import Range, check_values
from fastbert.records import json_text
from fastbert.streams import echo, warn

NewWords = Annotated[int, Range(1, 2**20)]


@dataclass(frozen=True)
class ExtendOptions:
    """Append entries for the words of a text to a tokenizer. The ids of its old entries do not change.

    Entries are chosen in this order: single characters whose absence makes words [UNK]; whole words that occur at least
    twice, by the number of tokens that they save in the text; if words run out, pieces that join two adjacent pieces,
    by their number of occurrences. Ties are broken by spelling, so the result depends only on text and options. At most
    64 MiB of the text are counted, sampled evenly from 1 GiB of it.

    Continue with `fastbert prepare --tokenizer OUT` and `fastbert pretrain --init-from`."""

    tokenizer: str = field(metadata=TOKENIZER_FROM_HUB)
    """Tokenizer to extend: a run, a prepared folder, or a BERT's, as a Hugging Face folder or owner/name[@revision] on
    the hub."""
    source: str
    """Text of the new domain or language, one of the sources of prepare: text files, tables (JSONL, JSON, CSV, TSV,
    Parquet), globs, hf:NAME, sotu, python."""
    words: NewWords
    """Number of entries to append."""
    out: str
    """Folder to write, which must not exist: the extended tokenizer, which transformers opens too."""
    old: str | None = None
    """Text that the model was trained on, a source as for --source. The fraction of its words that the new entries cut
    differently is reported, and its tokens per word."""
    column: str = COLUMN
    """Column (in JSON: field) with the text, of --source and --old if they are tables."""
    json: bool = False
    """Print one JSON object instead of a table."""

    def __post_init__(self) -> None:
        check_values(self)

    def check_inputs(self) -> None:
        """Checks, before any text is read, that tokenizer and texts exist and that `out` does not.

        Raises:
            UserError: one is missing, or `out` exists or cannot be written.
        """
        check_downloaded(self.tokenizer, TOKENIZER, "a Hugging Face tokenizer, prepared data or a run")
        check_source(self.source, self.column)
        if self.old is not None:
            check_source(self.old, self.column_of_old)
        if os.path.lexists(self.out):
            raise UserError(f"{self.out} exists; choose another --out or remove it")
        check_output_folder(self.out)

    @property
    def column_of_old(self) -> str:
        """Column of --old; text files have none."""
        return self.column if has_columns(self.old) else COLUMN


def extend_vocabulary(options: ExtendOptions) -> dict[str, Any]:
    """Writes the folder `options.out`, whole or not at all, and prints a report, which is returned.

    Raises:
        UserError: tokenizer or text cannot be read, or there is no entry to append.
    """
    wordpiece = load_tokenizer(options.tokenizer)
    counts = _read_counts(options.source, options.column, wordpiece)
    with progress("choosing entries", options.words, "entries") as work:
        chosen = choose_entries(wordpiece, counts, options.words, work.update)
    if not (added := len(chosen.all)):
        raise UserError(
            f"nothing to append to the tokenizer in {options.tokenizer}: each word that occurs twice in "
            f"{options.source} is an entry already, and no two pieces are adjacent twice; use the tokenizer as it is, "
            "or give more or other text"
        )
    if added < options.words:
        echo(
            f"{added:,} entries are appended instead of {options.words:,}: {options.source} has no further word, and "
            "no further pair of adjacent pieces, that occurs twice"
        )
    extended = dataclasses.replace(wordpiece, tokens=(*wordpiece.tokens, *chosen.all))
    result = {
        "tokenizer": options.tokenizer,
        "out": options.out,
        "entries": {"before": len(wordpiece.tokens), "after": len(extended.tokens)},
        "added": {field.name: len(getattr(chosen, field.name)) for field in dataclasses.fields(NewEntries)},
        "source": {"text": options.source, **compared(counts, wordpiece, extended)},
    }
    if options.old is not None:
        counts = _read_counts(options.old, options.column_of_old, wordpiece)
        result["old"] = {"text": options.old, **compared(counts, wordpiece, extended)}
    with atomic_folder(options.out) as folder:
        extended.save(folder)
    print(json_text(result) if options.json else report(result))
    return result


def _read_counts(source: str, column: str, wordpiece: WordPiece) -> dict[str, int]:
    """Counts of the words in a sample of a source. Raises a UserError if it has none."""
    opened = open_source(source, column)
    for warning in opened.warnings:
        warn(warning)
    counts = count_words(read_sample(opened, f"reading {opened.name}"), wordpiece)
    if not counts:
        raise UserError(f"{source} has no words; give a text with words")
    return counts


def count_words(documents: Iterable[str], wordpiece: WordPiece) -> dict[str, int]:
    """Number of occurrences of each word and punctuation mark, after normalization and pre-tokenization."""
    chunks: Counter[str] = Counter()
    for text in documents:
        chunks.update(split_chunks(text))
    library, counts = wordpiece.build(), Counter()
    for chunk, count in chunks.items():
        if chunk.isascii() and chunk.isalnum():  # most chunks: without the library, many times faster
            counts[chunk.lower() if wordpiece.lowercase else chunk] += count
            continue
        text = library.normalizer.normalize_str(chunk)
        for word, _ in library.pre_tokenizer.pre_tokenize_str(text):
            counts[word] += count
    return dict(counts)


def compared(counts: Mapping[str, int], before: WordPiece, after: WordPiece) -> dict[str, Any]:
    """Figures of a text before and after an extension, from the counts of its words: tokens per word, the fraction of
    its words that are [UNK], and the fraction that is cut differently."""
    old, new = before.ids, after.ids
    words = different = 0
    tokens, unknown = [0, 0], [0, 0]
    for word, count in counts.items():
        fits = len(word) <= before.longest_word
        cuts = [pieces_of(word, ids) if fits else None for ids in (old, new)]
        words += count
        different += count * (cuts[0] != cuts[1])
        for index, cut in enumerate(cuts):
            tokens[index] += count * (1 if cut is None else len(cut))
            unknown[index] += count * (cut is None)
    names = ("before", "after")
    return {
        "words": words,
        "tokens_per_word": {name: total / words for name, total in zip(names, tokens, strict=True)},
        "unknown_words": {name: total / words for name, total in zip(names, unknown, strict=True)},
        "cut_differently": different / words,
    }


def report(result: dict[str, Any]) -> str:
    """Plain-text table of the result."""
    lines = [f"{'':<34}{'before':>12}{'after':>12}", _row("entries", result["entries"], "{:,}")]
    for name in ("source", "old"):
        if (text := result.get(name)) is not None:
            lines += [
                f"{text['text']}: {text['words']:,} words and punctuation",
                _row("  tokens per word", text["tokens_per_word"], "{:.3f}"),
                _row("  [UNK]", text["unknown_words"], "{:.3%}"),
            ]
            if name == "old":
                lines.append(f"  {'words cut differently':<44}{text['cut_differently']:>12.2%}")
    added = ", ".join(f"{count:,} {kind}" for kind, count in result["added"].items())
    return "\n".join([*lines, f"added: {added}", f"wrote {result['out']}"])


def _row(label: str, values: dict[str, Any], form: str) -> str:
    return f"{label:<34}{form.format(values['before']):>12}{form.format(values['after']):>12}"
