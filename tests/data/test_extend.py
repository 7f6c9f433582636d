"""`fastbert extend-vocab`: the entries that are chosen, compared with a direct search, and opened in transformers."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers.models import WordPiece as LibraryWordPiece
from transformers import AutoTokenizer

from fastbert.data.extend import compared, count_words
from fastbert.data.new_entries import NewEntries, choose_entries
from fastbert.data.tokenizer import SPECIAL_TOKENS, WordPiece, pieces_of
from fastbert.data.tokenizer_folders import load_tokenizer
from tests.flags import main

GERMAN = """
In alten Zeiten, wo das Wünschen noch geholfen hat, lebte ein König, dessen Töchter waren alle schön, aber die jüngste
war so schön, daß die Sonne selber, die doch so vieles gesehen hat, sich verwunderte, sooft sie ihr ins Gesicht schien.

Nahe bei dem Schlosse des Königs lag ein großer dunkler Wald, und in dem Walde unter einer alten Linde war ein Brunnen;
wenn nun der Tag recht heiß war, so ging das Königskind hinaus in den Wald und setzte sich an den kühlen Brunnen.

Und wenn sie Langeweile hatte, so nahm sie eine goldene Kugel, warf sie in die Höhe und fing sie wieder; und das war
ihr liebstes Spielwerk. Die Kugel rollte in den Brunnen, und der Brunnen war tief, so tief, daß man keinen Grund sah.
"""
LETTERS = ("a", "b", "##a", "##b")


def vocabulary(*tokens: str) -> WordPiece:
    return WordPiece((*SPECIAL_TOKENS, *tokens))


def direct(wordpiece: WordPiece, counts: dict[str, int], most: int) -> list[str]:
    """Words and pieces by the definition: everything is measured again, with the library, after each entry."""
    tokens = list(wordpiece.tokens)

    def cuts() -> dict[str, list[str]]:
        model = LibraryWordPiece({token: n for n, token in enumerate(tokens)}, unk_token="[UNK]")
        return {word: [token.value for token in model.tokenize(word)] for word in counts}

    def best(scores: dict[str, int], least: int) -> str | None:
        found = [entry for entry, score in scores.items() if score >= least]
        return min(found, key=lambda entry: (-scores[entry], entry), default=None)

    while len(tokens) < len(wordpiece.tokens) + most:
        cut = cuts()
        entry = best({word: (len(cut[word]) - 1) * count for word, count in counts.items() if count >= 2}, 1)
        if entry is None:
            joined: dict[str, int] = {}
            for word, pieces in cut.items():
                for one, other in pairwise(pieces):
                    joined[one + other[2:]] = joined.get(one + other[2:], 0) + counts[word]
            entry = best(joined, 2)
        if entry is None:
            break
        tokens.append(entry)
    return tokens[len(wordpiece.tokens) :]


@given(
    st.dictionaries(st.text("ab", min_size=1, max_size=9), st.integers(1, 3), max_size=25),
    st.sets(st.sampled_from(["ab", "##ab", "##ba", "aab", "##aba", "##bb"])),
    st.integers(1, 30),
)
@example({"abbabab": 1, "ababb": 1, "bababa": 1, "aba": 2}, {"##ab", "##aba"}, 30)
@settings(max_examples=80)
def test_words_and_pieces_are_those_of_a_direct_search(counts, more, most) -> None:
    wordpiece = vocabulary(*LETTERS, *sorted(more))
    found = choose_entries(wordpiece, counts, most)
    assert [*found.words, *found.pieces] == direct(wordpiece, counts, most) and not found.characters
    assert all(counts[word] >= 2 for word in found.words)


def test_the_order_of_choice() -> None:
    """Characters by their number, words by the tokens they save at that time, ties by spelling, then pieces."""
    counts = {"zaza": 3, "baba": 3, "babab": 4, "aa": 5, "ab": 5, "é": 3, "aéa": 2, "ñ": 1, "bñ": 1}
    counts |= {"abbbb": 1, "bbbb": 1, "babbbb": 1, "a" * 101: 9}
    wordpiece = vocabulary(*LETTERS, "z", "##z")
    assert choose_entries(wordpiece, counts, 100) == NewEntries(
        # é occurs 5 times, ñ twice; both at the beginning of a word and within one.
        characters=("é", "##é", "ñ", "##ñ"),
        # 4 x 4, then 3 x 3 twice, which saves more than 5 x 1 and 2 x 2; bñ occurs once. aa and ab are equal.
        words=("babab", "baba", "zaza", "aa", "ab", "aéa"),
        # ab ##b ##b ##b, b ##b ##b ##b, b ##a ##b ##b ##b ##b: ##bb 7 times; then ##bb ##b twice.
        pieces=("##bb", "##bbb"),
    )
    assert choose_entries(wordpiece, counts, 5).all == ("é", "##é", "ñ", "##ñ", "babab")
    # Two entries for the first character, and none left for both forms of the second; a word takes the last one.
    assert choose_entries(wordpiece, counts, 3).all == ("é", "##é", "babab")


def test_a_word_is_measured_again_after_each_entry() -> None:
    """aaaa saves 6 tokens before aaa is an entry, which saves 8, and 2 after that; bbb saves 4."""
    wordpiece = vocabulary(*LETTERS)
    assert choose_entries(wordpiece, {"aaaa": 2, "aaa": 4, "bbb": 2}, 3).words == ("aaa", "bbb", "aaaa")


def test_a_rare_character_of_a_long_text_is_not_added() -> None:
    counts = {"a": 50 * 30 * 9 - 12, "é": 3, "ü": 9}  # 30 entries at the end, so a character must occur 9 times
    assert choose_entries(vocabulary(*LETTERS, *(f"a{n}" for n in range(10))), counts, 11).characters == ("ü",)


@pytest.fixture(scope="module")
def german(prepared: Path, tmp_path_factory) -> tuple[Path, dict]:
    """An extension of the vocabulary of 600 English words, and its report."""
    folder = tmp_path_factory.mktemp("german")
    (folder / "german.txt").write_text(GERMAN, encoding="utf-8")
    arguments = ["--tokenizer", str(prepared), "--source", str(folder / "german.txt"), "--words", "25"]
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda text="", **_: printed.append(text))
        arguments += ["--old", str(prepared.parent / "old.txt"), "--out", str(folder / "tok"), "--json"]
        (prepared.parent / "old.txt").write_text("Congress in Kugeln. Das in das; Inger")
        assert main(["extend-vocab", *arguments]) == 0
    return folder / "tok", json.loads(printed[-1])


def test_transformers_opens_the_folder_with_the_same_ids(german, prepared) -> None:
    """It cuts text as fastbert's choice assumed: the old ids are unchanged, and words without new entries cut alike."""
    folder, _ = german
    theirs, before = AutoTokenizer.from_pretrained(folder), load_tokenizer(prepared)
    after = load_tokenizer(folder)
    assert after.extends(before) and len(after.tokens) == 625 and not before.extends(after)
    assert theirs.get_vocab() == after.ids and not theirs.added_tokens_encoder.keys() - set(SPECIAL_TOKENS)
    assert {"kugel", "brunnen", "schon", "großer"} & set(after.tokens[600:]) == {"kugel", "brunnen", "schon"}
    old = AutoTokenizer.from_pretrained(prepared / "tokenizer")
    words = count_words([GERMAN], before)
    assert words["schon"] == 2 and words["konig"] == 1 and words[","] > 10
    for word in words:
        assert theirs.tokenize(word) == pieces_of(word, after.ids)
        if not any(token.removeprefix("##") in word for token in after.tokens[600:]):
            assert theirs.tokenize(word) == old.tokenize(word)
    text = "The Congress shall assemble at least once in every year"
    assert theirs(text)["input_ids"] == old(text)["input_ids"]


def test_the_report_counts_what_transformers_counts(german, prepared) -> None:
    folder, result = german
    assert result["entries"] == {"before": 600, "after": 625} and sum(result["added"].values()) == 25
    for text, part in ((GERMAN, result["source"]), ("Congress in Kugeln. Das in das; Inger", result["old"])):
        for name, path in (("before", prepared / "tokenizer"), ("after", folder)):
            tokens = AutoTokenizer.from_pretrained(path).tokenize(text)
            assert part["tokens_per_word"][name] == pytest.approx(len(tokens) / part["words"])
            assert part["unknown_words"][name] == pytest.approx(tokens.count("[UNK]") / part["words"])
    assert result["source"]["unknown_words"]["before"] > 0 == result["source"]["unknown_words"]["after"]  # ß
    # das is a new word, twice, and kugeln begins with one.
    assert result["old"]["words"] == 9 and result["old"]["cut_differently"] == pytest.approx(3 / 9)


def test_words_are_counted_as_the_library_counts_them() -> None:
    text = 'Ein, "zwei" Hunde-Hütte\x0bx\u2003y 東京 US-$5_000 ÄÖÜ İ [MASK] a\u200bb'
    for lowercase in (True, False):
        wordpiece = WordPiece((*SPECIAL_TOKENS, "a"), lowercase=lowercase)
        library = wordpiece.build()
        expected = library.pre_tokenizer.pre_tokenize_str(library.normalizer.normalize_str(text))
        counts = count_words([text, text], wordpiece)
        words = [word for word, _ in expected]
        assert counts == {word: 2 * words.count(word) for word in words}


def test_what_a_word_too_long_costs() -> None:
    before = WordPiece((*SPECIAL_TOKENS, "a", "##a"), longest_word=3)
    after = WordPiece((*before.tokens, "aa"), longest_word=3)
    figures = compared({"aaaa": 1, "aa": 3, "a": 4}, before, after)
    assert figures["unknown_words"] == {"before": 1 / 8, "after": 1 / 8} and figures["cut_differently"] == 3 / 8
    assert figures["tokens_per_word"] == {"before": 11 / 8, "after": 1.0}
    assert choose_entries(before, {"aaaa": 9, "aa": 3}, 5).words == ("aa",)


def test_the_table_and_a_column(prepared, tmp_path, capsys) -> None:
    (tmp_path / "new.jsonl").write_text("".join(json.dumps({"body": line}) + "\n" for line in GERMAN.split("\n\n")))
    (tmp_path / "old.txt").write_text("the kugeln")
    arguments = ["--tokenizer", prepared, "--source", tmp_path / "new.jsonl", "--column", "body", "--words", "999"]
    arguments += ["--old", tmp_path / "old.txt", "--out", tmp_path / "tok"]
    assert main(["extend-vocab", *map(str, arguments)]) == 0
    printed = capsys.readouterr()
    found = len(load_tokenizer(tmp_path / "tok").tokens) - 600
    assert f"{found:,} entries are appended instead of 999" in printed.err and 25 < found < 60
    lines = printed.out.splitlines()
    assert lines[1].split() == ["entries", "600", str(600 + found)]
    assert next(line for line in lines if "differently" in line).split()[-1] == "50.00%"
    assert lines[-1] == f"wrote {tmp_path / 'tok'}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--words": "0"}, "--words must be at least 1, not 0"),
        ({"--words": "1048577"}, "--words must be at most 1,048,576"),
        ({"--tokenizer": "none"}, "there is no folder none"),
        ({"--tokenizer": "empty"}, "empty has no tokenizer"),
        ({"--source": "none.txt"}, "source 'none.txt' does not exist"),
        ({"--old": "none.txt"}, "source 'none.txt' does not exist"),
        ({"--out": "empty"}, "empty exists; choose another --out or remove it"),
        ({"--old": "none-visible.txt"}, "none-visible.txt has no words; give a text with words"),
        ({"--source": "once.txt"}, "nothing to append to the tokenizer in "),
        ({"--column": "body"}, "is text without columns"),
    ],
)
def test_refused_with_nothing_written(change, message, prepared, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "once.txt").write_text("the of , a")
    (tmp_path / "none-visible.txt").write_text("\u200b\u200b")  # removed by the normalization
    (tmp_path / "new.txt").write_text(GERMAN)
    (tmp_path / "empty").mkdir()
    given = {"--tokenizer": str(prepared), "--source": "new.txt", "--words": "9", "--out": "tok"} | change
    assert main(["extend-vocab", *(word for flag in given.items() for word in flag)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "tok").exists()
