"""Last step of `prepare` and `merge`: rare words, totals, and dataset.json."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from fastbert.data.encoding import token_dtype
from fastbert.data.integrity import FileRecord, save_array
from fastbert.data.rare import rare_hashes, write_rare
from fastbert.data.shards import FORMAT, FORMAT_VERSION, unigram_entropy
from fastbert.data.tokenizer import WordPiece
from fastbert.data.writer import WrittenSplit
from fastbert.records import seal_of, write_json


def write_dataset(
    folder: Path,
    made_of: dict[str, Any],
    wordpiece: WordPiece,
    tokenizer_files: dict[str, FileRecord],
    written: Mapping[str, WrittenSplit],
    sources: list[dict[str, Any]],
    duplicates: int,
    words: Sequence[Path],
    submit: Callable[..., Future],
) -> None:
    """Completes a folder that has the tokenizer and the shards.

    Args:
        made_of: identity of the source, and options.
        written: both splits, the training split first.
        sources: counts of each source.
        duplicates: number of documents with the text of an earlier one.
        words: runs of the tallies of words in training documents, as for `tally.sums`.
        submit: runs a function with arguments in another process.
    """
    options = made_of["options"]
    hashes, counts, distinct = rare_hashes(words, options["rare_min"], options["rare_max"])
    shards = {split: one.shards for split, one in written.items()}
    rare, rare_files, rare_list = write_rare(folder, shards, wordpiece, hashes, counts, submit)
    record = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **made_of,
        "tokenizer": wordpiece.fingerprint,
        "tokenizer_files": tokenizer_files,
        "vocab_size": len(wordpiece.tokens),
        "dtype": token_dtype(len(wordpiece.tokens)).name,
        "sources": sources,
        "duplicates": {"documents": duplicates},
        "splits": {
            split: _record(folder, split, one, wordpiece, rare[split], rare_files[split])
            for split, one in written.items()
        },
        "rare_words": {"words": len(hashes), "distinct_words": distinct, "file": rare_list},
    }
    write_json(folder / "dataset.json", {**record, "seal": seal_of(record)})


def _record(
    folder: Path,
    split: str,
    written: WrittenSplit,
    wordpiece: WordPiece,
    rare: dict[str, int],
    files: list[dict[str, FileRecord]],
) -> dict[str, Any]:
    """Entry of dataset.json for a split; `files` are the records of the rare words' files."""
    words = written.unigrams[~wordpiece.continuing].sum() - written.unigrams[wordpiece.ids["[SEP]"]]
    return {
        "documents": written.documents,
        "words": int(words),
        "tokens": sum(written.shards),
        "bytes": written.bytes,
        "unk_tokens": int(written.unigrams[wordpiece.ids["[UNK]"]]),
        "unigram_entropy": unigram_entropy(written.unigrams, wordpiece),
        "unigram_file": save_array(folder / unigram_file(split), written.unigrams),
        "rare": rare,
        "shards": [
            {"tokens": size, "files": of_text | of_rare}
            for size, of_text, of_rare in zip(written.shards, written.files, files, strict=True)
        ],
    }


def unigram_file(split: str) -> str:
    return f"unigram-{split}.npy"
