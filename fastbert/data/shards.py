"""A prepared folder, opened: tokens by memory map across shard borders, document starts, rare words, counts."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.data.encoding import token_dtype
from fastbert.data.tokenizer import WordPiece, load_tokenizer
from fastbert.data.writer import PARTS, file_record, shard_file
from fastbert.errors import UserError, choose
from fastbert.files import read_json

FORMAT = "fastbert tokens"
FORMAT_VERSION = 2
SPLITS = ("train", "validation")
AGAIN = "prepare it again (fastbert prepare) after removing the folder"


def unigram_entropy(unigrams: np.ndarray, wordpiece: WordPiece) -> float:
    """The entropy, in nats, of the distribution of tokens with the counts `unigrams` [V], special tokens left out."""
    counts = unigrams.astype(np.float64)
    counts[list(wordpiece.special_ids)] = 0
    p = counts[counts > 0] / max(counts.sum(), 1)
    return float(-(p * np.log(p)).sum())


@dataclass(frozen=True)
class RareWords:
    """Occurrences of rare words in a stretch of a split."""

    positions: np.ndarray
    """int64, ascending: the token position of each one's first piece in the split."""
    lengths: np.ndarray
    """uint16: pieces."""
    words: np.ndarray
    """int32: places in `Dataset.rare_words`."""


class TokenStream:
    """A split: documents one after the other, each followed by one [SEP]; no [CLS]."""

    def __init__(self, folder: Path, split: str, record: dict[str, Any], wordpiece: WordPiece) -> None:
        self.split, self._folder, self._record = split, folder, record
        self._borders = np.cumsum([0] + [shard["tokens"] for shard in record["shards"]])
        self._parts = {
            part: [
                np.load(folder / shard_file(split, number, part), mmap_mode="r", allow_pickle=False)
                for number in range(len(record["shards"]))
            ]
            for part in PARTS
        }
        self.unigrams: np.ndarray = np.load(folder / f"unigram-{split}.npy", allow_pickle=False)
        """int64 [V]: how often each id occurs."""
        self.unigram_entropy = unigram_entropy(self.unigrams, wordpiece)
        """Nats, special tokens left out: the loss of a model that knows only how frequent each token is."""
        self.text_bytes: int = record["bytes"]
        """UTF-8 bytes of the text that the tokens came from."""

    def __len__(self) -> int:
        """Tokens."""
        return int(self._borders[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start ... stop - 1, uint16 or uint32 [stop - start]; a read-only view within a shard.

        Raises:
            IndexError: not 0 <= start <= stop <= len(self).
        """
        self._check(start, stop)
        stretches = [self._parts["tokens"][n][a:b] for n, a, b in self._stretches(start, stop)]
        return np.concatenate(stretches) if len(stretches) > 1 else stretches[0]

    @cached_property
    def documents(self) -> np.ndarray:
        """int64, ascending: the position of every document's first token."""
        parts = zip(self._parts["documents"], self._borders[:-1], strict=True)
        return np.concatenate([starts + border for starts, border in parts])

    def rare(self, start: int, stop: int) -> RareWords:
        """The rare words whose first piece lies within start ... stop - 1.

        Raises:
            IndexError: as in `read`.
        """
        self._check(start, stop)
        found = []
        for number, first, last in self._stretches(start, stop):
            a, b = np.searchsorted(self._parts["rare.positions"][number], [first, last])
            positions = self._parts["rare.positions"][number][a:b] + self._borders[number]
            found.append((positions, *(self._parts[f"rare.{x}"][number][a:b] for x in ("lengths", "words"))))
        return RareWords(*map(np.concatenate, zip(*found, strict=True)))

    def _check(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start} to {stop} of a {self.split} split of {len(self)}")

    def _stretches(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(shard, first, last) of the parts of start ... stop - 1; one empty part if there are none."""
        first = min(int(np.searchsorted(self._borders, start, side="right")) - 1, len(self._borders) - 2)
        last = max(first, int(np.searchsorted(self._borders, stop, side="left")) - 1)
        borders = self._borders
        return [
            (n, max(start - int(borders[n]), 0), int(min(stop, borders[n + 1]) - borders[n]))
            for n in range(first, last + 1)
        ]


class Dataset:
    """A prepared folder. Use `open_dataset`."""

    def __init__(self, folder: Path, record: dict[str, Any], wordpiece: WordPiece) -> None:
        self.folder, self.record, self.wordpiece = folder, record, wordpiece
        self.tokenizer = folder / "tokenizer"
        """A Hugging Face folder."""
        self.fingerprint: str = record["tokenizer"]
        """Of the tokenizer."""
        self.vocab_size: int = record["vocab_size"]
        self._streams = {split: TokenStream(folder, split, record["splits"][split], wordpiece) for split in SPLITS}
        self.rare_words: list[str] = []
        """By descending count in the training split, then by spelling."""
        self.rare_counts = np.zeros(0, np.int64)
        """int64: how often each occurs in the training split."""
        rare = read_json(folder / "rare_words.json", "list of rare words")
        self.rare_words, self.rare_counts = rare["words"], np.array(rare["counts"], dtype=np.int64)

    def split(self, name: str) -> TokenStream:
        """The stream of `train` or `validation`.

        Raises:
            UserError: there is no such split.
        """
        return self._streams[choose("split", name, SPLITS)]

    def verify(self) -> None:
        """Reads every file and compares it with its sha256.

        Raises:
            UserError: names the damaged file.
        """
        for name, expected in _files(self.record).items():
            if file_record(self.folder / name)["sha256"] != expected["sha256"]:
                raise UserError(f"{self.folder / name} is damaged: its sha256 is not that of dataset.json; {AGAIN}")


def open_dataset(folder: Path | str) -> Dataset:
    """Opens a prepared folder and checks whatever can be checked without reading the tokens.

    Raises:
        UserError: missing or unfinished folder, another format, another tokenizer, a missing, cut off or mistyped file.
    """
    folder = Path(folder)
    path = folder / "dataset.json"
    if not folder.is_dir():
        raise UserError(f"dataset {folder} does not exist; write it with fastbert prepare --out {folder}")
    if not path.is_file():
        raise UserError(f"{folder} has no dataset.json: it is no prepared folder; write one with fastbert prepare")
    record = read_json(path, "dataset")
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise UserError(f"{path} does not describe a prepared folder; write one with fastbert prepare")
    if record.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{folder} is of format {record.get('format_version')}, this version reads {FORMAT_VERSION}; "
            "prepare it again or use the version that wrote it"
        )
    wordpiece = load_tokenizer(folder)
    if wordpiece.fingerprint != record["tokenizer"]:
        raise UserError(f"{folder} holds shards of another tokenizer than {folder / 'tokenizer'}; {AGAIN}")
    for name, expected in _files(record).items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file} is missing; {AGAIN}")
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise UserError(f"{file} has {size:,} bytes, not {expected['bytes']:,}: it was cut off or changed; {AGAIN}")
    dataset = _mapped(folder, record, wordpiece)
    for split in SPLITS:
        _check_types(folder, dataset.split(split), record, split)
    return dataset


def _files(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name -> bytes and sha256 of the files that dataset.json vouches for."""
    files = {"rare_words.json": record["rare_words"]["file"]}
    for split, content in record["splits"].items():
        files[f"unigram-{split}.npy"] = content["unigram_file"]
        for shard in content["shards"]:
            files |= shard["files"]
    return files


def _mapped(folder: Path, record: dict[str, Any], wordpiece: WordPiece) -> Dataset:
    try:
        return Dataset(folder, record, wordpiece)
    except ValueError as error:  # numpy's word for a header that is none
        raise UserError(f"{folder} has a damaged .npy file ({error}); {AGAIN}") from None


def _check_types(folder: Path, stream: TokenStream, record: dict[str, Any], split: str) -> None:
    dtypes = {"tokens": token_dtype(record["vocab_size"]), "rare.lengths": np.uint16, "rare.words": np.int32}
    for part in PARTS:
        for number, array in enumerate(stream._parts[part]):
            if array.dtype != dtypes.get(part, np.int64) or array.ndim != 1:
                raise UserError(f"{folder / shard_file(split, number, part)} holds {array.dtype}; {AGAIN}")
    # Counted while the tokens were written: that they add up also says that no id is outside of the vocabulary.
    if stream.unigrams.shape != (record["vocab_size"],) or stream.unigrams.sum() != len(stream):
        raise UserError(f"{folder / f'unigram-{split}.npy'} does not fit the tokens; {AGAIN}")
