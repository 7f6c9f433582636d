"""Sentences of a text, and a sample of them that is the same for every model. Imports no torch."""

import heapq
import re
from collections.abc import Iterable, Iterator

from fastbert.data.hashing import document_hash

# The end of a sentence: its punctuation and closing quotes, before white space and a character that is not lower case;
# or East Asian punctuation.
_END = re.compile(r"[.!?…]+[\"'”’»)\]]*(?=\s+[^\sa-zß-öø-ÿ])|[。！？]+[」』”’）]*")
_TITLES = frozenset(["Mr", "Mrs", "Ms", "Dr", "Prof", "St", "No", "vs", "etc", "Jr", "Sr", "Gen", "Col", "Lt", "Capt"])
BLOCK = 4096  # hashes that are computed at once


def split_sentences(text: str) -> Iterator[str]:
    """The sentences of each line of `text`, without white space around them. A full stop after a single capital letter
    or a title does not end one."""
    for line in text.splitlines():
        start = 0
        for match in _END.finditer(line):
            before = line[start : match.start()].rpartition(" ")[2].lstrip("\"'“‘«([")
            if match[0] == "." and ((len(before) == 1 and before.isupper()) or before in _TITLES):
                continue
            if sentence := line[start : match.end()].strip():
                yield sentence
            start = match.end()
        if sentence := line[start:].strip():
            yield sentence


def sample_sentences(documents: Iterable[str], size: int) -> tuple[list[str], int]:
    """Samples `size` sentences without replacement, or all of them if there are fewer, in the order of the text.

    The sample consists of the sentences whose indices have the smallest hashes, so it depends on the text alone, and a
    smaller sample is part of a larger one.

    Returns:
        The sentences, and the number of sentences in the text.
    """
    count = 0

    def keyed() -> Iterator[tuple[int, int, str]]:
        nonlocal count
        hashes = document_hash(0, 0, BLOCK)
        for sentence in (sentence for text in documents for sentence in split_sentences(text)):
            if count and count % BLOCK == 0:
                hashes = document_hash(0, count, BLOCK)
            yield int(hashes[count % BLOCK]), count, sentence
            count += 1

    sampled = heapq.nsmallest(size, keyed())
    return [sentence for _, _, sentence in sorted(sampled, key=lambda entry: entry[1])], count
