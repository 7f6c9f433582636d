"""Prepared folders of any size for measurements: shards of sparse files, most of whose tokens take no space on the
disk."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.data.encoding import token_dtype
from fastbert.data.integrity import HEADER_BYTES, npy_header, remember, save_array, unverified
from fastbert.data.shards import read_record
from fastbert.data.writer import shard_file
from fastbert.records import write_sealed

SHARDS = 210
DOCUMENT = 500  # tokens of a document
RARE = 100  # one token in this number begins a listed word
PERIOD, BLOCK = 2**17, 2**12  # bytes: of each period, only the first block has words and is written


def write(base: Path, out: Path, tokens: int) -> None:
    """Writes a folder with the tokenizer, the list of rare words and the validation split of `base`, and SHARDS equal
    shards of training text, with `tokens` tokens in all.

    The files are marked as verified, because their hashes are known. Words, document starts and rare words are real
    blocks, 0.22 bytes for each token.
    """
    shutil.copytree(base, out, ignore=shutil.ignore_patterns("train-*", "dataset.json", "notes"))
    record = read_record(base)
    vocabulary, words = record["vocab_size"], record["rare_words"]["words"]
    size, dtype = tokens // SHARDS, token_dtype(vocabulary)
    text = np.zeros(size, dtype)
    for first in range(0, size, PERIOD // dtype.itemsize):
        block = text[first : first + BLOCK // dtype.itemsize]
        block[:] = np.arange(len(block)) % (vocabulary - 5) + 5
    known = save_array(out / shard_file("train", 0, "tokens"), text)
    arrays = {
        "documents": np.arange(0, size, DOCUMENT, dtype=np.int64),
        "rare.positions": np.arange(0, size - 2, RARE, dtype=np.int64),
        "rare.lengths": np.ones(len(range(0, size - 2, RARE)), np.uint16),
        "rare.words": (np.arange(len(range(0, size - 2, RARE))) * 7919 % words).astype(np.int32),
    }
    shards: list[dict[str, Any]] = []
    for number in range(SHARDS):
        files = {shard_file("train", number, "tokens"): known}
        _write_sparse(out / shard_file("train", number, "tokens"), text)
        for part, array in arrays.items():
            name = shard_file("train", number, part)
            files[name] = save_array(out / name, array)
        shards.append({"tokens": size, "files": files})
    unigrams = np.bincount(text, minlength=vocabulary) * SHARDS
    train = record["splits"]["train"] | {
        "tokens": size * SHARDS,
        "documents": len(arrays["documents"]) * SHARDS,
        "words": size * SHARDS * 3 // 4,
        "unigram_file": save_array(out / "unigram-train.npy", unigrams),
        "shards": shards,
    }
    record = record | {"splits": record["splits"] | {"train": train}}
    write_sealed(out / "dataset.json", {name: value for name, value in record.items() if name != "seal"})
    every = {name: one for split in record["splits"].values() for shard in split["shards"] for name, one in
             shard["files"].items()}  # fmt: skip
    remember(out, unverified(out, every, True)[1])


def _write_sparse(path: Path, array: np.ndarray) -> None:
    """Writes an array as `save_array` does, without the blocks of zeros."""
    data = array.view(np.uint8).data
    with open(path, "wb") as file:
        file.write(npy_header(array.dtype, len(array)))
        for first in range(0, len(data), PERIOD):
            file.seek(HEADER_BYTES + first)
            file.write(data[first : first + BLOCK])
        file.truncate(HEADER_BYTES + len(data))
