"""Reader of a prepared folder: tokens across shards, document starts, rare words, counts."""

from bisect import bisect_left, bisect_right
from collections.abc import Collection
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.data.array_files import AGAIN, ArrayFile, check_header, map_array
from fastbert.data.encoding import token_dtype
from fastbert.data.integrity import FileRecord, ascending_within, compare, remember, unverified
from fastbert.data.rare import RARE, RareWords
from fastbert.data.tokenizer import WordPiece
from fastbert.data.tokenizer_folders import load_tokenizer
from fastbert.data.writer import PARTS, shard_file
from fastbert.errors import UserError, brief, choose
from fastbert.progress import Progress, progress
from fastbert.records import COUNT, check, read_json, seal_of

FORMAT = "fastbert tokens"
PART_FORMAT = "fastbert part of tokens"
FORMAT_VERSION = 2
SPLITS = ("train", "validation")
LARGEST_RARE = 2**28  # bytes of rare_words.json
BLOCK = 2**22  # numbers whose range is checked at a time


_FILE = {"bytes": COUNT, "sha256": str}
_SPLIT = {"bytes": COUNT, "unigram_file": _FILE, "shards": [{"tokens": COUNT, "files": {str: _FILE}}]}
RECORD = {
    "tokenizer": str,
    "tokenizer_files": {str: _FILE},
    "vocab_size": COUNT,
    "splits": {str: _SPLIT, **dict.fromkeys(SPLITS, _SPLIT)},
    "sources?": [{split: {"whitespace_words?": COUNT} for split in SPLITS}],
    "rare_words": {"words": COUNT, "file": _FILE},
    "options": {"rare_min": COUNT, "rare_max": COUNT},
}
"""Schema of the entries of dataset.json that are used, for `check`."""


def whitespace_words(record: dict[str, Any], split: str) -> int | None:
    """Number of words between white space in a split of a dataset.json; None if an older version wrote it."""
    counts = [source[split].get("whitespace_words") for source in record.get("sources", ())]
    return None if None in counts or not counts else sum(counts)


def unigram_entropy(unigrams: np.ndarray, wordpiece: WordPiece) -> float:
    """The entropy in nats of the token distribution with counts `unigrams` [V], without special tokens; 0 if there are
    no other tokens."""
    counts = unigrams.astype(np.float64)
    counts[list(wordpiece.special_ids)] = 0
    p = counts[counts > 0] / max(counts.sum(), 1)
    return float((p * -np.log(p)).sum())


class TokenStream:
    """The tokens of a split: all documents in order, each followed by one [SEP], without [CLS]."""

    def __init__(self, folder: Path, split: str, record: dict[str, Any], wordpiece: WordPiece, rare: int) -> None:
        """
        Args:
            record: the split's entry in dataset.json.
            rare: number of words in the list of rare words.
        """
        self.split, self._folder, self._record = split, folder, record
        self._vocab_size, self._rare_words = len(wordpiece.tokens), rare
        self._borders = list(accumulate((shard["tokens"] for shard in record["shards"]), initial=0))
        dtypes = {"tokens": token_dtype(self._vocab_size), "rare.lengths": np.uint16, "rare.words": np.int32}
        self._files = {
            part: [
                ArrayFile(folder / shard_file(split, number, part), np.dtype(dtypes.get(part, np.int64)))
                for number in range(len(record["shards"]))
            ]
            for part in PARTS
        }
        self.unigrams = np.array(map_array(folder / f"unigram-{split}.npy", np.dtype(np.int64)))
        """int64 [V]: number of occurrences of each id."""
        self.unigram_entropy = unigram_entropy(self.unigrams, wordpiece)
        """Nats, without special tokens: the loss of a model that knows only the frequency of each token."""
        self.text_bytes: int = record["bytes"]
        """UTF-8 bytes of the text that the tokens came from."""

    def __len__(self) -> int:
        """Number of tokens."""
        return self._borders[-1]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start ... stop - 1, read-only, uint16 or uint32 [stop - start].

        Raises:
            IndexError: not 0 <= start <= stop <= len(self).
            UserError: a file cannot be read, or an id is not in the vocabulary.
        """
        self._check(start, stop)
        stretches = [self._tokens(n, self._files["tokens"][n].read(a, b)) for n, a, b in self._stretches(start, stop)]
        return np.concatenate(stretches) if len(stretches) > 1 else stretches[0]

    @property
    def documents(self) -> np.ndarray:
        """Position of every document's first token, int64. Raises a UserError if the positions do not ascend."""
        return np.concatenate([self._document_starts(n) + border for n, border in enumerate(self._borders[:-1])])

    def document_borders(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First token of the document of each token, and the first token after it.

        Args:
            positions: int64, ascending.

        Returns:
            Two arrays, int64, of the shape of `positions`.

        Raises:
            UserError: starts of documents do not ascend.
        """
        first, end = np.empty_like(positions), np.empty_like(positions)
        for number, (low, high) in enumerate(pairwise(self._borders)):
            here = slice(*np.searchsorted(positions, (low, high)))
            if here.start == here.stop:
                continue
            # A document may have begun in an earlier shard, and end in a later one.
            starts = [[self._last_start(number)], self._document_starts(number) + low, [self._next_start(number)]]
            borders = np.concatenate(starts)
            after = np.searchsorted(borders, positions[here], side="right")
            first[here], end[here] = borders[after - 1], borders[after]
        return first, end

    def _last_start(self, number: int) -> int:
        """Start of the last document of the shards before shard `number`; 0 if there is none."""
        for n in range(number - 1, -1, -1):
            if len(starts := self._document_starts(n)):
                return self._borders[n] + int(starts[-1])
        return 0

    def _next_start(self, number: int) -> int:
        """Start of the first document of the shards after shard `number`; the end of the stream if there is none."""
        for n in range(number + 1, len(self._borders) - 1):
            if len(starts := self._document_starts(n)):
                return self._borders[n] + int(starts[0])
        return len(self)

    def rare(self, start: int, stop: int) -> RareWords:
        """The rare words whose first piece is within start ... stop - 1. It maps the shards' files of rare words, so
        it is for long parts of the stream.

        Raises:
            IndexError: as in `read`.
            UserError: positions, lengths or words are out of range.
        """
        self._check(start, stop)
        found = []
        for number, first, last in self._stretches(start, stop):
            files = [self._files[f"rare.{part}"][number].map() for part in RARE]
            a, b = np.searchsorted(files[0], [first, last])
            positions, lengths, words = self._rare(number, *(file[a:b] for file in files))
            # Copies, so that no map stays open.
            found.append((positions + self._borders[number], lengths.copy(), words.copy()))
        return RareWords(*map(np.concatenate, zip(*found, strict=True)))

    def check_files(self) -> None:
        """Compares the lengths of the shards' files with dataset.json, without reading them; raises a UserError."""
        for number, shard in enumerate(self._record["shards"]):
            sizes = {part: len(self._files[part][number]) for part in PARTS}
            if sizes["tokens"] != shard["tokens"] or len({sizes[f"rare.{part}"] for part in RARE}) > 1:
                name = self._folder / shard_file(self.split, number, "tokens")
                raise UserError(f"{name} and the files next to it differ in length from dataset.json; {AGAIN}")
        if self.unigrams.shape != (self._vocab_size,) or self.unigrams.sum() != len(self):
            raise UserError(f"{self._folder / f'unigram-{self.split}.npy'} does not match the tokens; {AGAIN}")

    def check_headers(self, names: Collection[str]) -> None:
        """Raises a UserError if the header of one of the shards' files with these `names` does not match."""
        for files in self._files.values():
            for file in files:
                if file.path.name in names:
                    check_header(file.path, file.dtype)

    def check_ranges(self, work: Progress) -> None:
        """Reads all shards, even if their hashes are correct; raises a UserError that names a file with a number out of
        range."""
        for number, file in enumerate(self._files["tokens"]):
            self._document_starts(number)
            tokens = file.map()  # unlike `ArrayFile.read`, with read-ahead
            for first in range(0, len(tokens), BLOCK):
                work.update(work.done + len(self._tokens(number, tokens[first : first + BLOCK])))
            files = [self._files[f"rare.{part}"][number].map() for part in RARE]
            for first in range(0, len(files[0]), BLOCK):
                self._rare(number, *(file[max(0, first - 1) : first + BLOCK] for file in files))

    def _tokens(self, number: int, tokens: np.ndarray) -> np.ndarray:
        """`tokens` of a shard, after a check of their range."""
        if len(tokens) and (largest := np.maximum.reduce(tokens)) >= self._vocab_size:
            problem = f"the token id {largest}, beyond the vocabulary of {self._vocab_size}"
            raise self._out_of_range("tokens", number, problem)
        return tokens

    def _document_starts(self, number: int) -> np.ndarray:
        """First tokens of the documents that begin in a shard, counted from its start, after a check of their range."""
        starts, size = self._files["documents"][number].map(), len(self._files["tokens"][number])
        if not ascending_within((starts[a : a + BLOCK] for a in range(0, len(starts), BLOCK)), size):
            raise self._out_of_range("documents", number, f"starts that do not ascend from 0 to below {size}")
        return starts

    def _rare(
        self, number: int, positions: np.ndarray, lengths: np.ndarray, words: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Positions, lengths and words of rare words of a shard, after a check of their ranges."""
        size = len(self._files["tokens"][number])
        if not ascending_within((positions,), size):
            raise self._out_of_range("rare.positions", number, f"positions that do not ascend from 0 to below {size}")
        if len(lengths) and (positions + lengths).max() > size:
            raise self._out_of_range("rare.lengths", number, "a word that ends beyond the shard")
        if len(words) and (words.min() < 0 or words.max() >= self._rare_words):
            raise self._out_of_range("rare.words", number, f"a word beyond the list of {self._rare_words}")
        return positions, lengths, words

    def _out_of_range(self, part: str, number: int, problem: str) -> UserError:
        file = self._folder / shard_file(self.split, number, part)
        return UserError(f"{file} is damaged: it contains {problem}; {AGAIN}")

    def _check(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start} to {stop} of a {self.split} split of {len(self)}")

    def _stretches(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(shard, first, last) of the parts of start ... stop - 1; a single empty part for an empty range."""
        borders = self._borders
        first = min(bisect_right(borders, start) - 1, len(borders) - 2)
        last = max(first, bisect_left(borders, stop) - 1)
        return [(n, max(start - borders[n], 0), min(stop, borders[n + 1]) - borders[n]) for n in range(first, last + 1)]


class Dataset:
    """A prepared folder, opened by `open_dataset`."""

    def __init__(
        self, folder: Path, record: dict[str, Any], wordpiece: WordPiece, streams: dict[str, TokenStream]
    ) -> None:
        self.folder, self.record, self.wordpiece, self._streams = folder, record, wordpiece, streams
        self.tokenizer = folder / "tokenizer"
        """Folder of the tokenizer in Hugging Face's format."""
        self.fingerprint: str = record["tokenizer"]
        """Fingerprint of the tokenizer."""
        self.vocab_size: int = record["vocab_size"]

    @cached_property
    def rare_words(self) -> list[str]:
        """Spelling of the rare words, sorted by descending count in the training split, then alphabetically."""
        return self._listed[0]

    @cached_property
    def rare_counts(self) -> np.ndarray:
        """Number of occurrences of each rare word in the training split, int64."""
        return self._listed[1]

    @cached_property
    def _listed(self) -> tuple[list[str], np.ndarray]:
        """Words and counts, read when they are needed; raises a UserError if they do not match dataset.json."""
        return _rare_words(self.folder, self.record["rare_words"]["words"])

    def split(self, name: str) -> TokenStream:
        """The stream of `train` or `validation`. Raises a UserError for any other name."""
        return self._streams[choose("split", name, SPLITS)]

    def verify(self) -> None:
        """Compares every file with its SHA-256, even if it was verified before; raises a UserError that names a damaged
        file."""
        _verify(self.folder, self.record, self._streams, always=True)


def read_record(folder: Path) -> dict[str, Any]:
    """Reads dataset.json of a prepared folder and checks its seal.

    Raises:
        UserError: the folder is missing or unfinished, has another format, or dataset.json is damaged.
    """
    path = folder / "dataset.json"
    if not folder.is_dir():
        raise UserError(f"dataset {folder} does not exist; write it with fastbert prepare --out {folder}")
    if not path.is_file():
        raise UserError(f"{folder} has no dataset.json: it is not a prepared folder; write one with fastbert prepare")
    record = read_json(path, "dataset")
    if isinstance(record, dict) and record.get("format") == PART_FORMAT:
        raise UserError(f"{folder} is a part of prepared data; join all parts with fastbert merge")
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise UserError(f"{path} does not describe a prepared folder; write one with fastbert prepare")
    if record.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{folder} is of format {brief(record.get('format_version'))}, this version reads {FORMAT_VERSION}; "
            "prepare it again with another --out, or use the version that wrote it"
        )
    if record.get("seal") != seal_of(record):
        raise UserError(f"{path} is damaged: its seal does not match its content; {AGAIN}")
    try:
        check(record, RECORD, f"dataset {path}")
        for split in SPLITS:
            for number, shard in enumerate(record["splits"][split]["shards"]):
                names = {shard_file(split, number, part): _FILE for part in PARTS}
                check(shard["files"], names, f"dataset {path}", f"splits.{split}.shards[{number}].files")
        for name in _files(record):
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise UserError(f"dataset {path} is damaged: {brief(name)} is not in its folder")
    except UserError as error:
        raise UserError(f"{error}; {AGAIN}") from None
    return record


def open_dataset(folder: Path | str, verify: bool = False) -> Dataset:
    """Opens a prepared folder. Shards are compared with their hashes once per machine, and again if one of them was
    modified; the small files are compared each time.

    Args:
        verify: compare all files again, even if they were verified before.

    Raises:
        UserError: the folder is missing or unfinished, has another format or tokenizer, or a file is missing, cut off,
            of another type or damaged.
    """
    folder = Path(folder)
    record = read_record(folder)
    for name, expected in _files(record).items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file} is missing; {AGAIN}")
        size = file.stat().st_size
        if size != expected["bytes"] and name not in record["tokenizer_files"]:
            raise UserError(f"{file} has {size:,} bytes, not {expected['bytes']:,}: it was cut off or changed; {AGAIN}")
    other = f"{folder} contains shards of another tokenizer than {folder / 'tokenizer'}; {AGAIN}"
    compare(folder, record["tokenizer_files"], other)
    wordpiece = load_tokenizer(folder)
    if wordpiece.fingerprint != record["tokenizer"] or len(wordpiece.tokens) != record["vocab_size"]:
        raise UserError(other)
    rare = record["rare_words"]["words"]
    streams = {split: TokenStream(folder, split, record["splits"][split], wordpiece, rare) for split in SPLITS}
    for split in SPLITS:
        streams[split].check_files()
    _verify(folder, record, streams, verify)
    return Dataset(folder, record, wordpiece, streams)


def _verify(folder: Path, record: dict[str, Any], streams: dict[str, TokenStream], always: bool) -> None:
    """Compares the files of a folder with their hashes, shards only if their present state was not verified before."""
    why, files = f"its SHA-256 differs from that in dataset.json; {AGAIN}", _files(record)
    shards = {name: one for name, one in files.items() if name.startswith(tuple(f"{split}-" for split in SPLITS))}
    compare(folder, {name: one for name, one in files.items() if name not in shards}, why)
    left, marks = unverified(folder, shards, always)
    if left:
        if always:
            remember(folder, {})  # so that the next call verifies again if this one fails
        for stream in streams.values():
            stream.check_headers(set(left))
        compare(folder, {name: shards[name] for name in left}, why)
        with progress(f"checking {folder}", sum(map(len, streams.values())), "tokens") as work:
            for stream in streams.values():
                stream.check_ranges(work)
        remember(folder, marks)


def _files(record: dict[str, Any]) -> dict[str, FileRecord]:
    """Name -> bytes and sha256 of all files that dataset.json lists."""
    files = {**record["tokenizer_files"], "rare_words.json": record["rare_words"]["file"]}
    for split, content in record["splits"].items():
        files[f"unigram-{split}.npy"] = content["unigram_file"]
        for shard in content["shards"]:
            files |= shard["files"]
    return files


def _rare_words(folder: Path, number: int) -> tuple[list[str], np.ndarray]:
    """Words and counts in rare_words.json. Raises a UserError if they are not `number` words with a count each."""
    path = folder / "rare_words.json"
    rare = read_json(path, "list of rare words", dict, LARGEST_RARE, 2**25)
    words, counts = rare.get("words"), rare.get("counts")
    for values, kind in ((words, str), (counts, int)):
        if not isinstance(values, list) or len(values) != number or not all(type(value) is kind for value in values):
            raise UserError(f"{path} does not match dataset.json: it does not have {number} words and counts; {AGAIN}")
    if counts and not 0 <= min(counts) <= max(counts) < 2**63:
        raise UserError(f"{path} is damaged: it contains a count out of range; {AGAIN}")
    return words, np.array(counts, dtype=np.int64)
