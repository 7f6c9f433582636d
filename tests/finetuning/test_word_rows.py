"""Sentences with tags are the same from every kind of file; errors are reported with their line."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.errors import UserError
from fastbert.finetuning.custom import CustomTaskOptions
from fastbert.finetuning.rows import Example
from fastbert.finetuning.tasks import open_task
from fastbert.finetuning.word_rows import split_words

Sentences = Sequence[Sequence[tuple[str, str]]]
LABELS = ("O", "B-group", "I-group", "B-person", "I-person")


def columns(sentences: Sentences, separator: str = "\t") -> str:
    return "\n\n".join("\n".join(separator.join(pair) for pair in sentence) for sentence in sentences) + "\n"


def spans_of(sentence: Sequence[tuple[str, str]], as_lists: bool) -> dict:
    spans, end = [], -1
    for word, tag in sentence:
        start, end = end + 1, end + 1 + len(word)
        if tag.startswith("B"):
            spans.append([start, end, tag[2:]])
        elif tag.startswith("I"):
            spans[-1][1] = end
    keyed = spans if as_lists else [dict(zip(("start", "end", "label"), span, strict=True)) for span in spans]
    return {"text": " ".join(word for word, _ in sentence), "spans": keyed}


def parquet(path: Path, rows: list[dict], labels: tuple[str, ...] | None = None) -> None:
    data = datasets.Dataset.from_list(rows)
    if labels:
        features = datasets.Features(data.features | {"tags": datasets.List(datasets.ClassLabel(names=list(labels)))})
        rows = [row | {"tags": [labels.index(tag) for tag in row["tags"]]} for row in rows]
        data = datasets.Dataset.from_list(rows, features=features)
    data.to_parquet(str(path))


def universal(sentences: Sentences) -> str:
    blocks = []
    for sentence in sentences:
        lines = ["# text = comments are skipped", "1-2\tboth" + "\t_" * 8]
        lines += [f"{n}\t{word}\t_\t{tag}" + "\t_" * 6 for n, (word, tag) in enumerate(sentence, 1)]
        blocks.append("\n".join([*lines, "2.1\tempty" + "\t_" * 8]))
    return "\n\n".join(blocks) + "\n\n"


def write_all(folder: Path, sentences: Sentences) -> list[Path]:
    tokens = [{"tokens": [w for w, _ in s], "tags": [t for _, t in s]} for s in sentences]
    texts = {
        "tabs.conll": columns(sentences),
        "crlf.iob2": columns(sentences).replace("\n", "\r\n"),
        "spaces.txt": "-DOCSTART- -X- O\n\n" + columns(sentences, "  "),
        "blank.tsv": columns(sentences).replace("\n\n", "\n\t\n \n"),
        "ud.conllu": universal(sentences),
        "tokens.jsonl": "\n".join(map(json.dumps, tokens)),
        "tokens.json": json.dumps(tokens),
        "spans.jsonl": "\n".join(json.dumps(spans_of(s, False)) for s in sentences),
        "lists.jsonl": "\n".join(json.dumps(spans_of(s, True)) for s in sentences),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, newline="")
    (folder / "tabs.conll.gz").write_bytes(gzip.compress(texts["tabs.conll"].encode()))
    parquet(folder / "words.parquet", tokens)
    parquet(folder / "names.parquet", tokens, LABELS)
    return sorted(folder.iterdir())


WORD = st.text("abcdefgABCéß", min_size=1, max_size=6)


@st.composite
def tagged(sample) -> list[tuple[str, str]]:
    """A sentence with valid IOB2 tags."""
    sentence, before = [], "O"
    for word in sample(st.lists(WORD, min_size=1, max_size=6)):
        allowed = ["O", "B-person", "B-group", *([f"I-{before[2:]}"] if before != "O" else [])]
        before = sample(st.sampled_from(allowed))
        sentence.append((word, before))
    return sentence


@settings(max_examples=12)
@given(st.lists(tagged(), max_size=3))
def test_every_file_gives_the_same_examples(tmp_path_factory, sentences) -> None:
    sentences = [[("A", "B-person"), ("b", "I-person"), ("c", "B-group")], *sentences]
    folder = tmp_path_factory.mktemp("words")
    expected = []
    for index, sentence in enumerate(sentences):
        text = " ".join(word for word, _ in sentence)
        tags = tuple(LABELS.index(tag) for _, tag in sentence)
        ranges = tuple(split_words(text))
        assert [text[start:end] for start, end in ranges] == [word for word, _ in sentence]
        expected.append(Example(index, text, None, tags, ranges))
    for path in write_all(folder, sentences):
        task = open_task("mine", custom=CustomTaskOptions(train=str(path), kind="tokens"))
        assert task.kind.labels == LABELS, path.name
        assert task.examples("train") == expected, path.name
        assert task.metrics == ("entity_f1", "entity_precision", "entity_recall", "accuracy")


def task_of(folder: Path, name: str, content: str | list[dict], dev: str | None = None, **options):
    path = folder / name
    path.write_text(content if isinstance(content, str) else "\n".join(map(json.dumps, content)))
    if dev is not None:
        (folder / f"dev-{name}").write_text(dev)
        options["dev"] = str(folder / f"dev-{name}")
    return open_task("mine", custom=CustomTaskOptions(train=str(path), kind="tokens", **options))


def test_parts_of_speech_and_columns_by_number_or_name(tmp_path) -> None:
    ud = "1\tDogs\tdog\tNOUN\tNNS\tNumber=Plur\t2\tnsubj\t_\t_\n2\tbark\tbark\tVERB\tVBP\t_\t0\troot\t_\t_\n"
    task = task_of(tmp_path, "a.conllu", ud)
    assert task.kind.labels == ("NOUN", "VERB") and task.metrics == ("accuracy", "macro_f1")
    assert task.examples("train")[0].label == (0, 1)
    task = task_of(tmp_path, "b.conllu", ud, text="lemma", label="xpos")
    assert (task.kind.labels, task.examples("train")[0].text) == (("NNS", "VBP"), "dog bark")
    task = task_of(tmp_path, "c.txt", "1 Dogs NN x\n2 bark VB x\n", text="2", label="3")
    assert (task.kind.labels, task.examples("train")[0].text) == (("NN", "VB"), "Dogs bark")
    gimpel = task_of(tmp_path, "d.txt", "I O\nrun V\n", labels="V,O")
    assert gimpel.kind.labels == ("V", "O") and not gimpel.kind.has_entities


def test_text_is_split_as_in_the_tokenizer_and_spans_may_end_with_white_space(tmp_path) -> None:
    text = "New-York, 北京 is\u00a0big."
    assert [text[a:b] for a, b in split_words(text)] == ["New", "-", "York", ",", "北", "京", "is", "big", "."]
    task = task_of(tmp_path, "a.jsonl", [{"text": text, "spans": [[0, 8, "city"], [9, 13, "city"]]}])
    (example,) = task.examples("train")
    assert [task.kind.labels[tag] for tag in example.label] == [
        *("B-city", "I-city", "I-city", "O", "B-city", "I-city", "O", "O", "O")
    ]
    assert task.kind.file_label(example)[1] == {"start": 10, "end": 12, "label": "city", "text": "北京"}


@pytest.mark.parametrize(
    ("text", "span", "found"),
    [
        ("a\r\nbc d", [3, 5, "x"], (2, 4, "bc")),
        ("a\rbc d\r\n\r\ne", [10, 11, "x"], (8, 9, "e")),
        ("\ufeff\ufeffab c", [2, 4, "x"], (0, 2, "ab")),
        ("\U0001f600 ab", [2, 4, "x"], (2, 4, "ab")),
    ],
)
def test_spans_count_characters_of_the_text_in_the_file(tmp_path, text, span, found) -> None:
    task = task_of(tmp_path, "a.jsonl", [{"text": text, "spans": [span]}])
    (shown,) = task.kind.file_label(task.examples("train")[0])
    assert (shown["start"], shown["end"], shown["text"]) == found and text[span[0] : span[1]] == found[2]


def test_white_space_around_tags_is_dropped(tmp_path) -> None:
    task = task_of(tmp_path, "a.jsonl", [{"tokens": ["a", "b"], "tags": ["B-x ", " O"]}])
    assert task.kind.labels == ("O", "B-x", "I-x") and task.examples("train")[0].label == (1, 0)


FINE = "a\tB-x\nb\tI-x\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.conll", "a\tO\nb\tI-x\nc\tB-x\n", r"a\.conll, line 2: I-x follows O, which is not IOB2: an entity begins"),
        ("a.conll", "a\tB-x\n\nb\tI-x\n", r"line 3: I-x begins a sentence, which is not IOB2.*B-x.*IOB1"),
        ("a.conll", "a\tB-x\nb\tI-y\nc\tB-y\n", r"line 2: I-y follows B-x, which is not IOB2"),
        ("a.conll", "a\tB-x\nb\tE-x\n", r"line 2: the tag 'E-x' is not IOB2; convert IOBES or BILOU to O, B-x, I-x"),
        ("a.conll", "a\tB-x\nb\tx\n", r"line 2: the tag 'x' is not IOB2; write O, B-x or I-x"),
        ("a.conll", "a\tO\nb\tPER\n", r"line 2: the tag 'PER' is not IOB2; for entities write O, B-PER, I-PER; if O"),
        ("a.conll", FINE + "c\n", r"line 3 has 1 column and line 1 has 2"),
        ("a.conll", FINE + "c d O\n", r"line 3 has 3 columns and line 1 has 2"),
        ("a.conll", FINE + "\tO\n", r"line 3: the word is empty"),
        ("a.conll", FINE + "c\t\n", r"line 3: the tag is empty"),
        ("a.conll", "a\nb\n", r"line 1 has one column; give a word and its tag on each line"),
        ("a.conll", "", r"a\.conll has no rows"),
        ("a.csv", FINE, r"a\.csv: words and their tags are read from CoNLL columns \(\.conll,"),
        ("a.jsonl", [{"tokens": ["a", "b"], "tags": ["O"]}], r"line 1: 2 tokens and 1 tags; give a tag for every"),
        ("a.jsonl", [{"tokens": [], "tags": []}], r"line 1: the sentence is empty; drop the row"),
        ("a.jsonl", [{"tokens": ["a", " "], "tags": ["O", "O"]}], r"line 1: token 2 is empty"),
        ("a.jsonl", [{"tokens": ["a\tb"], "tags": ["O"]}], r"line 1: token 1 holds a tab or a line break"),
        ("a.jsonl", [{"tokens": ["a"], "tags": [3]}], r"line 1: tag 1 of 'tags' is 3, no text; write tags as words"),
        ("a.jsonl", [{"tokens": ["a"], "tags": "O"}], r"line 1: 'tags' is 'O', no list of tags"),
        ("a.jsonl", [{"tokens": None, "tags": ["O"]}], r"line 1: 'tokens' is missing, no list of tokens"),
        ("a.jsonl", [{"tokens": ["a"], "tags": None}], r"line 1 has no tags; training needs one for every word"),
        ("a.jsonl", [{"tokens": ["a", "b"], "tags": ["O", "I-x"]}], r"line 1, tag 2: I-x follows O"),
        ("a.jsonl", [{"text": "a b", "tags": ["O", "O"]}], r"line 1 has no column 'spans'"),
        ("a.jsonl", [{"words": ["a"], "tags": ["O"]}], r"line 1 has no column 'tokens'.*choose the columns"),
        ("a.jsonl", [{"text": " ", "spans": []}], r"line 1: the text 'text' is empty"),
        ("a.jsonl", [{"text": "a b", "spans": ["O", "O"]}], r"line 1: 'spans' is \['O', 'O'\]; the labels of a text"),
        ("a.jsonl", [{"text": "abc", "spans": [[1, 3, "x"]]}], r"span 1: 'bc' begins or ends within a word of 'abc'"),
        ("a.jsonl", [{"text": "a b", "spans": [[0, 3, "x"], [2, 3, "y"]]}], r"span 2: 'b' overlaps another span"),
        ("a.jsonl", [{"text": "a b", "spans": [[2, 4, "x"]]}], r"span 1: characters 2 to 4 are not within the 3"),
        ("a.jsonl", [{"text": "a b", "spans": [[1, 2, "x"]]}], r"line 1, span 1 contains only white space; drop it"),
        ("a.jsonl", [{"text": "a", "spans": [{"start": 0, "label": "x"}]}], r"span 1: .* is not a span; write"),
        ("a.jsonl", [{"text": "a", "spans": [["0", 1, "x"]]}], r"start and end must be whole numbers.*'0' and 1"),
        ("a.jsonl", [{"text": "a", "spans": [[0, 1, ""]]}], r"span 1: the label is ''; give a word"),
        ("a.jsonl", [{"tokens": ["\ud800"], "tags": ["B-x"]}], r"line 1: 'tokens' contains half of a surrogate pair"),
        ("a.jsonl", [{"text": "a", "spans": [[0, 1, "\udfff"]]}], r"line 1: 'spans' contains half of a surrogate pair"),
        ("a.jsonl", [{"tokens": ["a", "b"], "tags": ["O", " "]}], r"line 1: tag 2 of 'tags' is empty; write O"),
        ("a.conll", "a\tO\nb\tO\n", r"every word of the training file has the tag O; give a file with entities"),
        ("a.conllu", "1\ta\t_\n", r"line 1 has 3 columns, and a \.conllu file has 10 with tabs between"),
        ("a.conll", "# id 5\nb\tO\n", r"line 2 has 2 columns and line 1 has 3; if line 1 is a comment, drop it"),
        ("a.conll", "b\tO\n\n# id 5\n", r"line 3 has 3 columns and line 1 has 2; if line 3 is a comment, drop it"),
    ],
)
def test_errors_in_a_file(tmp_path, name, content, message) -> None:
    with pytest.raises(UserError, match=message):
        task_of(tmp_path, name, content).examples("train")


def named_classes(path: Path, names: list[str], tags: list[int], in_list: bool) -> None:
    """Parquet as `datasets` writes it, or as older versions wrote lists."""
    table = pyarrow.table({"tokens": [["a"] * len(tags)], "tags": [tags]})
    names = {"_type": "ClassLabel", "names": names}
    feature = [names] if in_list else {"_type": "List", "feature": names}
    features = json.dumps({"info": {"features": {"tags": feature}}})
    pyarrow.parquet.write_table(table.replace_schema_metadata({"huggingface": features}), path)


def test_names_of_classes_in_lists_of_older_versions(tmp_path) -> None:
    named_classes(tmp_path / "a.parquet", ["N", " V"], [1, 0], in_list=True)
    task = open_task("mine", custom=CustomTaskOptions(train=str(tmp_path / "a.parquet"), kind="tokens"))
    assert task.kind.labels == ("N", "V") and task.examples("train")[0].label == (1, 0)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["O", "B-x", "O"], r"a\.parquet: the ClassLabel of the labels names O, B-x, O; give it two or more different"),
        (["O"], "names O; give it two or more different"),
        (["O", ""], "name 1 is empty; write the file with another name"),
        (["O", "B-x\ty"], "name 1 contains a line break or another control character"),
    ],
)
def test_class_names_that_cannot_be_labels(tmp_path, names, message) -> None:
    named_classes(tmp_path / "a.parquet", names, [0], in_list=False)
    with pytest.raises(UserError, match=message):
        open_task("mine", custom=CustomTaskOptions(train=str(tmp_path / "a.parquet"), kind="tokens"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dev": "c\tO\nd\tB-y\n"}, r"dev-a\.conll, line 2: unknown tag 'B-y'.*those of the training file"),
        ({"labels": "O,B-x"}, r"a\.conll, line 2: unknown tag 'I-x'"),
        ({"labels": "O,O"}, "give two or more different names"),
        ({"label": "3"}, "line 1 has 2 columns, not column 3"),
        ({"label": "tag"}, "line 1: no column 'tag'; give the number of a column"),
        ({"label": "1"}, "word and tag are both column 1"),
        ({"pair": "b"}, "kind tokens labels the words of one text; drop pair"),
        ({"metrics": "f1"}, "the metric f1 does not fit labels that are tags of words; give one of: entity_f1"),
    ],
)
def test_errors_in_a_declaration(tmp_path, options, message) -> None:
    with pytest.raises(UserError, match=message):
        task = task_of(tmp_path, "a.conll", FINE, **options)
        task.examples("train")
        task.examples("dev")


def test_metrics_of_entities_are_not_for_other_tags(tmp_path) -> None:
    with pytest.raises(UserError, match="the metric entity_f1 is for entities"):
        task_of(tmp_path, "a.conll", "a\tN\nb\tV\n", metrics="entity_f1")
    task = task_of(tmp_path, "a.conll", FINE)
    with pytest.raises(UserError, match="entity F1 needs entities, and every word has the tag O"):
        task.check_scorable([(0, 0), (0,)])


def test_columns_are_for_tokens_and_text_is_not_in_columns(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("a text of words\nanother one\n")
    for options, message in (
        ({"train": "a.conll"}, r"a\.conll: columns of words and tags are read with kind tokens"),
        (
            {"test": str(tmp_path / "a.txt"), "kind": "tokens", "labels": "N,V"},
            "text that is not in columns is read",
        ),
    ):
        with pytest.raises(UserError, match=message):
            open_task("mine", custom=CustomTaskOptions(**options)).examples("test")


def test_a_test_split_needs_no_tags(tmp_path) -> None:
    (tmp_path / "test.conll").write_text("a\nb\n\nc\n")
    task = task_of(tmp_path, "a.conll", FINE, test=str(tmp_path / "test.conll"))
    assert [(e.text, e.label) for e in task.examples("test")] == [("a b", None), ("c", None)]
