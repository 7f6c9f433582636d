"""The WordPiece tokenizer: training, and saving as a Hugging Face BERT folder.

The result of training depends only on the text. The library's trainer breaks ties by the order of a hash table that
differs from run to run, so the alphabet and its `##` forms are counted here and passed to it in a fixed order.
"""

import hashlib
import json
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastbert.data.hashing import document_hash
from fastbert.data.sources.source import Source, cut, no_text, text_bytes
from fastbert.data.tokenizer_files import (
    ADDED,
    CONFIG,
    JSON,
    PREFIX,
    SPECIAL_MAP,
    SPECIAL_TOKENS,
    VOCABULARY,
)
from fastbert.errors import UserError
from fastbert.files import atomic_file
from fastbert.progress import Progress, progress
from fastbert.records import read_json, write_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SAMPLE_BYTES = 64 * 2**20  # maximum size of the UTF-8 text for training a tokenizer
EXCERPT_BYTES = 2**30  # of text that is read to sample it
SMALLEST_VOCABULARY = 256
COMMON_CHARACTERS = 1000  # maximum number of characters that enter a trained vocabulary even if they are rare
WORTH = 50  # any further character must make up 1 / (WORTH * vocab_size) of the text


@dataclass(frozen=True)
class WordPiece:
    """A WordPiece vocabulary and the settings of text normalization. Small and picklable."""

    tokens: tuple[str, ...]
    """The token of every id."""
    lowercase: bool = True
    strip_accents: bool | None = None
    """None: the value of `lowercase` (BERT's rule)."""
    split_chinese: bool = True
    clean_text: bool = True
    longest_word: int = 100
    """Maximum number of characters; a longer word is [UNK]."""

    @cached_property
    def ids(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}

    @cached_property
    def special_ids(self) -> tuple[int, ...]:
        """Ids of [PAD], [UNK], [CLS], [SEP], [MASK]."""
        return tuple(self.ids[token] for token in SPECIAL_TOKENS)

    @cached_property
    def continuing(self) -> np.ndarray:
        """bool [V]: True for ids that continue a word (`##` pieces)."""
        return np.array([token.startswith(PREFIX) and token != PREFIX for token in self.tokens])

    @property
    def settings(self) -> tuple[bool, bool, bool, bool, int]:
        """Settings that affect ids in addition to the vocabulary: lower case, accents, Chinese, clean text, longest
        word."""
        accents = self.lowercase if self.strip_accents is None else self.strip_accents
        return self.lowercase, accents, self.split_chinese, self.clean_text, self.longest_word

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the vocabulary and all settings that affect ids."""
        return hashlib.sha256(json.dumps([self.tokens, self.settings]).encode()).hexdigest()

    def extends(self, other: "WordPiece") -> bool:
        """Returns True if the tokens begin with those of `other`, id by id, and all settings are equal."""
        return self.settings == other.settings and self.tokens[: len(other.tokens)] == other.tokens

    @property
    def between(self) -> tuple[int, ...]:
        """Ids between the two texts of a pair."""
        return (self.ids["[SEP]"],)

    def build(self) -> "Tokenizer":
        """Builds the `tokenizers.Tokenizer`, which adds [CLS] and [SEP] and reads "[MASK]" in a text as the special
        token."""
        from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

        tokenizer = Tokenizer(models.WordPiece(self.ids, unk_token="[UNK]", max_input_chars_per_word=self.longest_word))
        tokenizer.normalizer = normalizers.BertNormalizer(
            clean_text=self.clean_text,
            handle_chinese_chars=self.split_chinese,
            strip_accents=self.strip_accents,
            lowercase=self.lowercase,
        )
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece(prefix=PREFIX)
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS]:0 $A:0 [SEP]:0",
            pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
            special_tokens=[(token, self.ids[token]) for token in ("[CLS]", "[SEP]")],
        )
        tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
        return tokenizer

    def build_for_words(self) -> "Tokenizer":
        """Builds the tokenizer for single words, which it reads as they are read in a text."""
        return self.build()

    def save(self, folder: Path | str, max_length: int | None = None) -> None:
        """Writes a Hugging Face folder that `transformers.AutoTokenizer.from_pretrained` opens with equal ids.

        Args:
            max_length: `model_max_length` in tokens; None if no model limits it.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in (
            SPECIAL_MAP,
            ADDED,
            VOCABULARY,
        ):  # files of an earlier tokenizer, which transformers would read too
            (folder / name).unlink(missing_ok=True)
        with atomic_file(folder / JSON, "w") as file:
            file.write(self.build().to_str(pretty=True))
        if all(token == token.rstrip() and set(token).isdisjoint("\r\n") for token in self.tokens) and self.tokens[-1]:
            with atomic_file(folder / VOCABULARY, "w") as file:
                file.writelines(token + "\n" for token in self.tokens)
        write_json(folder / CONFIG, self.config() | ({} if max_length is None else {"model_max_length": max_length}))

    def config(self) -> dict[str, Any]:
        """tokenizer_config.json, without `model_max_length`."""
        # transformers rebuilds a BertTokenizer from the vocabulary, with BERT's values for these two settings.
        usual = self.clean_text and self.longest_word == 100
        return {
            "tokenizer_class": "BertTokenizer" if usual else "PreTrainedTokenizerFast",
            "do_lower_case": self.lowercase,
            "strip_accents": self.strip_accents,
            "tokenize_chinese_chars": self.split_chinese,
            **{f"{token[1:-1].lower()}_token": token for token in SPECIAL_TOKENS},
        }

    def wrote(self, folder: Path) -> bool:
        """Returns True if the files in `folder` are exactly those that `save` writes."""
        if not (folder / JSON).is_file() or not (folder / CONFIG).is_file():
            return False
        if (folder / SPECIAL_MAP).exists() or (folder / ADDED).exists():
            return False
        config = read_json(folder / CONFIG, "tokenizer configuration", dict)
        config.pop("model_max_length", None)
        return config == self.config() and read_json(folder / JSON, "tokenizer") == json.loads(self.build().to_str())


def pieces_of(word: str, vocabulary: Container[str], within: bool = False) -> list[str] | None:
    """Pieces of a normalized word: at each index the longest entry of `vocabulary` that matches, as in WordPiece.

    Args:
        within: the characters continue a word, so that the first piece has the prefix ## too.

    Returns:
        None if no entry matches at an index: the word is [UNK]. The maximum length of a word is not checked.
    """
    pieces, start = [], 0
    while start < len(word):
        prefix = PREFIX if start or within else ""
        for end in range(len(word), start, -1):
            if (piece := prefix + word[start:end]) in vocabulary:
                break
        else:
            return None
        pieces.append(piece)
        start = end
    return pieces


def read_sample(source: Source, label: str) -> list[str]:
    """The documents of `source.excerpt` that `sample_documents` selects; progress is shown with `label`."""

    def watched() -> Iterator[str]:
        text = None
        for fraction, text in source.excerpt(EXCERPT_BYTES):
            yield text
            work.update(int(work.total * fraction))
        if text is None:
            raise no_text(source.spec)
        work.update(work.total)

    with progress(label, min(source.size, EXCERPT_BYTES)) as work:
        return sample_documents(watched())


def sample_documents(documents: Iterable[str], limit: int = SAMPLE_BYTES) -> list[str]:
    """Samples documents evenly from a stream of unknown length: all of them, or between `limit` / 2 and `limit` bytes.

    A document remains in the sample while its hash is below a bound, which is halved whenever the sample is full.
    """
    bound, total, sample = 2**64, 0, []
    hashes, first = document_hash(0, 0, 4096), 0
    for index, text in enumerate(documents):
        if index - first == len(hashes):
            first = index
            hashes = document_hash(0, first, 4096)
        key = int(hashes[index - first])
        if key >= bound:
            continue
        size = len(text) if text.isascii() else len(text.encode())
        sample.append((key, size, text))
        total += size
        while total > limit and len(sample) > 1:
            bound //= 2
            sample = [item for item in sample if item[0] < bound] or [min(sample)]
            total = sum(size for _, size, _ in sample)
    return [text for _, _, text in sample]


def train_tokenizer(
    sample: Sequence[str], vocab_size: int, lowercase: bool = True, strip_accents: bool | None = None
) -> WordPiece:
    """Trains WordPiece on a `sample` (of `sample_documents`); the result depends only on the text and arguments.

    The alphabet consists of the most frequent characters, up to an eighth of the vocabulary and COMMON_CHARACTERS, and
    of all further characters that are frequent enough (Chinese has thousands, and a character without an entry makes
    its word [UNK]), up to the whole vocabulary. Entries that remain at the end are filled with the rarest characters.

    Returns:
        At most `vocab_size` entries, fewer if the sample has no further character and no further piece that occurs
        twice. The special tokens have the ids 0 to 4.

    Raises:
        UserError: `vocab_size` is too small for the alphabet.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(f"vocab_size {vocab_size} is too small; use at least {SMALLEST_VOCABULARY}")
    tokenizer = WordPiece(SPECIAL_TOKENS, lowercase=lowercase, strip_accents=strip_accents).build()
    counts = _count_characters(sample, tokenizer)
    ranked = sorted(counts, key=lambda c: (-counts[c], c))
    inner = {c for c in ranked if _occurs_within_words(c, tokenizer)}
    worth = sum(counts.values()) / (WORTH * vocab_size)
    wanted = max(64, min(COMMON_CHARACTERS, vocab_size // 8), sum(count >= worth for count in counts.values()))
    alphabet = _fitting(ranked[:wanted], inner, vocab_size - len(SPECIAL_TOKENS))
    tokens = _train(sample, tokenizer, alphabet, inner, vocab_size)
    if more := _fitting(ranked[len(alphabet) :], inner, vocab_size - len(tokens)):
        alphabet += more
        tokens = _train(sample, tokenizer, alphabet, inner, vocab_size)
    # A character that occurs within words needs two entries; a single last entry is used for the beginning of a word.
    tokens += ranked[len(alphabet) :][: vocab_size - len(tokens)]
    return WordPiece(tuple(tokens), lowercase=lowercase, strip_accents=strip_accents)


def _count_characters(sample: Sequence[str], tokenizer: "Tokenizer") -> dict[str, int]:
    """Number of occurrences of each normalized character."""
    counts = np.zeros(0x110000, dtype=np.int64)
    for text in sample:
        found, often = np.unique(np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32), return_counts=True)
        counts[found] += often
    normalized: dict[str, int] = {}
    for code in np.flatnonzero(counts):
        for c in tokenizer.normalizer.normalize_str(chr(code)):
            if not c.isspace():
                normalized[c] = normalized.get(c, 0) + int(counts[code])
    return normalized


def _occurs_within_words(character: str, tokenizer: "Tokenizer") -> bool:
    """Returns False for punctuation and, with `split_chinese`, Chinese characters, each of which is a word."""
    text = tokenizer.normalizer.normalize_str("a" + character)
    return len(tokenizer.pre_tokenizer.pre_tokenize_str(text)) == 1


def _fitting(characters: list[str], inner: set[str], entries: int) -> list[str]:
    """The first `characters` that fit into `entries`; those in `inner` also need a `##` form."""
    for number, c in enumerate(characters):
        entries -= 1 + (c in inner)
        if entries < 0:
            return characters[:number]
    return characters


def _train(
    sample: Sequence[str], tokenizer: "Tokenizer", alphabet: list[str], inner: set[str], vocab_size: int
) -> list[str]:
    """Trains at most `vocab_size` tokens, in the order of their ids: special tokens, alphabet, pieces."""
    from tokenizers import trainers

    alphabet = sorted(alphabet)
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[*SPECIAL_TOKENS, *(PREFIX + c for c in alphabet if c in inner)],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    with progress("training the tokenizer", sum(map(text_bytes, sample))) as work:
        tokenizer.train_from_iterator(_pieces(sample, work), trainer)
    vocabulary = tokenizer.get_vocab()
    return sorted(vocabulary, key=vocabulary.__getitem__)


def _pieces(sample: Sequence[str], work: Progress) -> Iterator[str]:
    # The library reads 256 texts at a time: short ones need little memory and give its threads equal work.
    done = 0
    for text in sample:
        yield from cut(text, 2**14)
        done += text_bytes(text)
        work.update(done)
    work.update(done, status="merging pieces")  # a few seconds, in which the library reports nothing
