"""`fastbert select`: scores, exclusions, samples, output and errors, with models of random weights."""

import csv
import gzip
import json
import random
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from sklearn.metrics import cohen_kappa_score

from fastbert.data.tables import whole_rows
from fastbert.data.tokenizer import WordPiece
from fastbert.dataset_work.selection import pool, queries, scoring
from fastbert.dataset_work.selection.agreement import Agreement
from fastbert.dataset_work.selection.pool import Chosen, key, order_of
from fastbert.dataset_work.selection.reader import Reader
from fastbert.finetuning.ensemble import open_ensemble
from fastbert.finetuning.kinds import KINDS
from fastbert.finetuning.model import TaskModel
from fastbert.finetuning.rows import Example
from fastbert.finetuning.saved import TaskRecord, save_task_model
from fastbert.training.options import MachineOptions
from tests.finetuning.conftest import FILLERS, WORDS, tiny_config, write_rows
from tests.flags import main

LABELS = {"classes": ("bad", "good", "so-so"), "multi-label": ("a", "b", "c"), "tokens": ("O", "X", "Y"), "number": ()}
CPU = ("--machine.threads", "1", "--machine.precision", "fp32", "--machine.device", "cpu")


def make_model(folder: Path, kind: str, seed: int = 0, is_pair: bool = False, max_length: int = 12) -> Path:
    """A fine-tuned model with random weights, whose logits have mean 0 and standard deviation 2 over the pool."""
    WordPiece(WORDS).save(folder / "tokenizer")
    record = TaskRecord(kind, KINDS[kind](LABELS[kind]), is_pair, is_pair, max_length, seed, {})
    model = TaskModel(tiny_config(), {kind: record.kind})
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    with torch.no_grad():
        examples = [Example(n, text, None, None, spans(text)) for n, text in enumerate(sentences(60, 1))]
        encoded = record.kind.encode(examples, WordPiece(WORDS), max_length)
        (logits,) = model(encoded.batch(np.arange(len(encoded))), [kind])
        logits, classifier = logits.flatten(0, -2), model.head(kind).classifier
        classifier.weight *= (2 / logits.std(0))[:, None]
        classifier.bias.copy_(2 / logits.std(0) * (classifier.bias - logits.mean(0)))
    save_task_model(model, record, folder / "tokenizer", folder / f"{kind}-{seed}")
    return folder / f"{kind}-{seed}"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    made = {kind: make_model(folder, kind) for kind in LABELS}
    return made | {"other": make_model(folder, "classes", 1), "pairs": make_model(folder / "pairs", "classes", 2, True)}


def sentences(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(FILLERS, k=rng.randint(2, 12))) for _ in range(count)]


@pytest.fixture
def task(tmp_path, monkeypatch) -> Path:
    """A folder with the task of each kind: four labelled texts, and a pool with those, 60 others and a copy."""
    monkeypatch.chdir(tmp_path)
    labelled, free = sentences(4, 0), sentences(60, 1)
    labels = {"classes": "good", "multi-label": ["a"], "number": 0.5}
    for kind, label in labels.items():
        for split, texts in (("train", labelled[:3]), ("dev", labelled[3:])):
            write_rows(tmp_path / f"{kind}-{split}.jsonl", [{"text": text, "label": label} for text in texts])
        names = f"labels: {','.join(LABELS[kind])}\n" if LABELS[kind] else ""
        (tmp_path / f"{kind}.yaml").write_text(
            f"kind: {kind}\ntrain: {kind}-train.jsonl\ndev: {kind}-dev.jsonl\n{names}"
        )
    for split, texts in (("train", labelled[:3]), ("dev", labelled[3:])):
        rows = [{"tokens": text.split(), "tags": ["O"] * len(text.split())} for text in texts]
        write_rows(tmp_path / f"tokens-{split}.jsonl", rows)
    (tmp_path / "tokens.yaml").write_text(
        'kind: tokens\ntrain: tokens-train.jsonl\ndev: tokens-dev.jsonl\nlabels: "O,X,Y"\n'
    )
    texts = [*free, *labelled, free[0]]
    write_rows(tmp_path / "pool.jsonl", [{"id": n, "text": text, "more": {"n": [n]}} for n, text in enumerate(texts)])
    write_rows(tmp_path / "words.jsonl", [{"id": n, "tokens": text.split()} for n, text in enumerate(texts)])
    return tmp_path


def select(kind: str, model: Path | None, query: str, *more: str, out: str = "out.jsonl", count: int = 8) -> list[dict]:
    pool = "words.jsonl" if kind == "tokens" else "pool.jsonl"
    words = ["select", "--task", f"{kind}.yaml", "--pool", pool, "--query", query, "--count", str(count), "--out", out]
    assert main([*words, *([] if model is None else ["--model", str(model)]), *CPU, *more]) == 0
    return [json.loads(line) for line in Path(out).read_text().splitlines()] if out.endswith("l") else []


def mean_uncertainty(kind: str, query: str, p: np.ndarray) -> float:
    """The definition, from the probabilities of one text: [L], or [words, L]."""
    p = np.stack([1 - p, p], -1) if kind == "multi-label" else p
    first, second = np.sort(p, -1)[..., -1], np.sort(p, -1)[..., -2]
    entropy = -(p * np.log(p)).sum(-1)
    return float({"entropy": entropy, "least-confidence": 1 - first, "margin": 1 - first + second}[query].mean())


@pytest.mark.parametrize("kind", ["classes", "multi-label", "tokens"])
@pytest.mark.parametrize("query", ["entropy", "least-confidence", "margin"])
def test_the_most_uncertain_texts_are_selected(kind, query, models, task, monkeypatch, capsys) -> None:
    """In chunks of 16, as from the probabilities of all texts at once."""
    monkeypatch.setattr(scoring, "CHUNK", 16)
    found = select(kind, models[kind], query)
    printed = capsys.readouterr().out
    assert "65 rows, 3 labelled in train, 1 labelled in dev, 1 repeated; 60 remain" in printed
    ensemble = open_ensemble([str(models[kind])])
    texts = sentences(60, 1)
    words = [None if kind != "tokens" else spans(text) for text in texts]
    inputs = ensemble.encode([Example(n, text, None, None, words[n]) for n, text in enumerate(texts)])
    (scores,) = ensemble.scores(inputs, torch.device("cpu"), "fp32", 64, "auto")
    values = [mean_uncertainty(kind, query, p) for _, p in inputs[0].scored(scores)]
    best = np.argsort(-np.array(values), kind="stable")[:8]
    assert [row["id"] for row in found] == best.tolist()
    assert [row["score"] for row in found] == pytest.approx(np.array(values)[best], abs=2e-5)
    assert all(row["reason"].startswith(f"{query}: ") for row in found)
    if kind != "tokens":
        assert all(row["text"] == texts[row["id"]] and row["more"] == {"n": [row["id"]]} for row in found)
    reason = found[0]["reason"].split(": ", 1)[1]
    p = dict(zip(LABELS[kind], list(inputs[0].scored(scores))[best[0]][1].T, strict=True))
    if kind == "classes":
        (_, one), (second, two) = (part.split() for part in reason.split(", "))
        assert float(one) == pytest.approx(max(p.values()), abs=1e-3) and float(two) == pytest.approx(
            p[second], abs=1e-3
        )
    elif kind == "multi-label":
        assert reason.startswith(min(p, key=lambda label: abs(p[label] - 0.5)))
    else:
        word = int(np.argmin([np.sort(one)[-1] - np.sort(one)[-2] for one in np.stack(list(p.values()), -1)]))
        assert reason.startswith(f"{texts[best[0]].split()[word]!r} is ")


def spans(text: str) -> tuple[tuple[int, int], ...]:
    found, end = [], -1
    for word in text.split():
        found.append((end + 1, end + 1 + len(word)))
        end = found[-1][1]
    return tuple(found)


def transformers_states(folder: Path, kind: str, texts: list[str]) -> np.ndarray:
    """The pooler's output, or the mean over the words, one text at a time."""
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    cls = AutoModelForTokenClassification if kind == "tokens" else AutoModelForSequenceClassification
    model = cls.from_pretrained(folder).eval()
    with torch.no_grad():
        for text in texts:
            ids = tokenizer(text, truncation=True, max_length=12 if kind != "tokens" else 30, return_tensors="pt")
            output = model.bert(**ids)
            found.append(output.last_hidden_state[0, 1:-1].mean(0) if kind == "tokens" else output.pooler_output[0])
    return torch.stack(found).numpy()


@pytest.mark.parametrize("kind", ["classes", "number"])
def test_k_centre_starts_from_the_texts_of_train(kind, models, task, monkeypatch) -> None:
    monkeypatch.setattr(scoring, "CHUNK", 16)
    found = select(kind, models[kind], "k-centre")
    states = transformers_states(models[kind], kind, [*sentences(60, 1), *sentences(4, 0)[:3]])
    expected = queries.k_centre(states[:60], 8, states[60:])
    assert [row["id"] for row in found] == expected.rows.tolist()
    assert [row["score"] for row in found] == pytest.approx(expected.values, abs=1e-4)
    first = np.linalg.norm(states[:60, None] - states[None, 60:], axis=-1).min(1)
    assert found[0]["id"] == int(first.argmax()) and found[0]["score"] == pytest.approx(first.max(), abs=1e-4)


def test_facility_location_covers_the_pool(models, task, tmp_path) -> None:
    weights = ("--entropy-weight", "2")
    found = select("classes", models["classes"], "facility-location", *weights)
    texts = sentences(60, 1)
    every = {row["id"]: row["score"] for row in select("classes", models["classes"], "entropy", count=60)}
    order = np.argsort([key(text, None, False) for text in texts])
    states = transformers_states(models["classes"], "classes", texts)[order]
    entropies = np.array([every[row] for row in order.tolist()])
    expected = queries.facility_location(queries.gaussian_similarity(states), 8, entropies, 2.0 * 60)
    assert [row["id"] for row in found] == order[expected.rows].tolist()
    assert [row["score"] for row in found] == pytest.approx(expected.values, rel=1e-4)
    assert select("classes", models["classes"], "facility-location", "--entropy-weight", "0") != found


def test_states_of_words_are_their_mean_and_those_of_models_are_joined(models, task) -> None:
    texts = sentences(5, 3)
    reader = Reader(open_ensemble([str(models["tokens"])]), MachineOptions(device="cpu", precision="fp32"))
    examples = [Example(n, text, None, None, spans(text)) for n, text in enumerate(texts)]
    seen: list[float] = []
    states = reader.read(examples, True, seen.append).states
    short = [n for n, text in enumerate(texts) if len(text.split()) <= 10]  # one window
    assert np.abs(states - transformers_states(models["tokens"], "tokens", texts))[short].max() < 1e-5
    assert seen[-1] == 1.0
    both = [str(models["classes"]), str(models["other"])]
    readers = [Reader(open_ensemble(paths), MachineOptions(device="cpu")) for paths in ([both[0]], [both[1]], both)]
    one, two, joined = (each.read(examples, True, lambda part: None).states for each in readers)
    expected = (queries.squared_distances(one, one) + queries.squared_distances(two, two)) / 2
    assert np.abs(queries.squared_distances(joined, joined) - expected).max() < 1e-4


def test_several_models_score_by_their_mean(models, task) -> None:
    found = select("classes", f"{models['classes']},{models['other']}", "margin", count=60)
    texts = sentences(60, 1)
    ensemble = open_ensemble([str(models["classes"]), str(models["other"])])
    inputs = ensemble.encode([Example(n, text, None, None) for n, text in enumerate(texts)])
    p = sum(ensemble.scores(inputs, torch.device("cpu"), "fp32", 64, "auto")) / 2
    assert [row["score"] for row in found] == pytest.approx([queries.margin(p)[row["id"]] for row in found], abs=2e-5)


@pytest.mark.parametrize("query", ["random", "margin", "k-centre", "facility-location"])
def test_the_order_of_the_pool_changes_nothing(query, models, task) -> None:
    more = ("--pool-size", "40", "--seed", "3")
    found = select("classes", models["classes"], query, *more)
    lines = Path("pool.jsonl").read_text().splitlines()[:-1]  # of copies, the first row is used
    random.Random(5).shuffle(lines)
    Path("pool.jsonl").write_text("\n".join(lines) + "\n")
    assert select("classes", models["classes"], query, *more) == found
    assert select("classes", models["classes"], query, *more[:2]) != found


def test_a_sample_of_the_pool_is_uniform_and_part_of_every_larger_one(task) -> None:
    small, large = (
        {row["id"] for row in select("classes", None, "random", "--pool-size", str(size), count=size)}
        for size in (10, 30)
    )
    assert len(small) == 10 and small < large
    keys = np.array([key(text, None, False) for text in sentences(4000, 7)], np.uint64)
    order = order_of(np.unique(keys), 0, "pool")
    assert len(np.unique(order)) == len(np.unique(keys))
    counts = np.histogram(order / 2.0**64, 10, (0, 1))[0]
    assert np.abs(counts - len(order) / 10).max() < 5 * np.sqrt(len(order) / 10)
    assert abs(np.corrcoef(order / 2.0**64, order_of(np.unique(keys), 1, "pool") / 2.0**64)[0, 1]) < 0.1


def test_random_needs_no_model_and_reads_the_same_texts_from_any_format(task, capsys) -> None:
    found = select("classes", None, "random")
    assert found == sorted(found, key=lambda row: -row["score"]) and all(0 <= row["score"] < 1 for row in found)
    rows = [json.loads(line) for line in Path("pool.jsonl").read_text().splitlines()]
    with open("pool.csv", "w", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerows([["id", "text"], *([row["id"], row["text"]] for row in rows)])
    columns = {name: [row[name] for row in rows] for name in ("id", "text")}
    pyarrow.parquet.write_table(pyarrow.table(columns), "pool.parquet")
    Path("array.json").write_text(json.dumps(rows, indent=1))
    Path("pool.jsonl.gz").write_bytes(gzip.compress(Path("pool.jsonl").read_bytes()))
    Path("pool.tsv").write_text("id\ttext\n" + "".join(f"{row['id']}\t{row['text']}\n" for row in rows))
    for name in ("array.json", "pool.jsonl.gz", "pool.parquet", "pool.tsv"):
        again = select("classes", None, "random", "--pool", name)
        assert [int(row["id"]) for row in again] == [row["id"] for row in found]
        assert again[0].keys() - {"more"} == {"id", "text", "score", "reason"} and ("more" in again[0]) == (
            "json" in name
        )
    select("classes", None, "random", "--pool", "pool.csv", out="out.csv")
    with open("out.csv", newline="") as file:
        read = list(csv.DictReader(file))
    assert [(int(row["id"]), row["text"], float(row["score"]), row["reason"]) for row in read] == [
        (row["id"], row["text"], row["score"], "random") for row in found
    ]


def test_pairs_are_labelled_in_either_order_if_the_task_is_symmetric(models, task) -> None:
    rows = [{"text": "the a", "pair": "of and", "label": "good"}]
    for split in ("train", "dev"):
        write_rows(task / f"p-{split}.jsonl", rows)
    texts = sentences(20, 4)
    pool = [
        {"text": "of and", "pair": "the a"},
        *({"text": a, "pair": b} for a, b in zip(texts, texts[::-1], strict=True)),
    ]
    write_rows(task / "pool.jsonl", pool)
    text = 'train: p-train.jsonl\ndev: p-dev.jsonl\npair: pair\nlabels: "bad,good,so-so"\n'
    (task / "one.yaml").write_text(text)
    (task / "both.yaml").write_text(text + "symmetric: true\n")
    assert len(select("one", models["pairs"], "margin", count=21)) == 21
    assert {row["text"] for row in select("both", models["pairs"], "margin", count=10)} <= set(texts)
    assert len(select("both", models["pairs"], "k-centre", count=10)) == 10


def test_columns_of_words_are_a_pool(models, task) -> None:
    """Texts that differ in white space alone are the same."""
    texts = sentences(9, 1)
    Path("words.conll").write_text("".join("\n".join(f"{word}\tO" for word in text.split()) + "\n\n" for text in texts))
    found = select("tokens", models["tokens"], "margin", "--pool", "words.conll", count=9)
    assert sorted(" ".join(row["tokens"]) for row in found) == sorted(texts)
    assert all(row["tags"] == ["O"] * len(row["tokens"]) for row in found)
    write_rows(
        task / "pool.jsonl", [{"text": "  " + text.replace(" ", "  ")} for text in sentences(4, 0)] + [{"text": "a"}]
    )
    (row,) = select("classes", None, "random", count=1)
    assert row["text"] == "a"


def test_labelled_texts_of_test_are_excluded(models, task, capsys) -> None:
    texts = sentences(60, 1)
    write_rows(task / "test.jsonl", [{"text": texts[5], "label": "bad"}, {"text": texts[6], "label": None}])
    with open("classes.yaml", "a") as file:
        file.write("test: test.jsonl\n")
    found = select("classes", models["classes"], "margin", count=59)
    assert {row["id"] for row in found} == {*range(60)} - {5}
    assert "1 labelled in test" in capsys.readouterr().out


def test_agreement_is_cohens_kappa() -> None:
    rng = np.random.default_rng(0)
    a = rng.integers(0, 4, 500)
    b = np.where(rng.random(500) < 0.7, a, rng.integers(0, 4, 500))
    agreement = Agreement(4)
    agreement.add(a[:200].reshape(50, 4), b[:200].reshape(50, 4))
    agreement.add(a[200:], b[200:])
    assert agreement.kappa() == pytest.approx(cohen_kappa_score(a, b))
    assert agreement.fraction == np.mean(a == b)
    assert "you can stop" not in agreement.line("x")
    same = Agreement(2)
    same.add(a > 1, a > 1)
    assert same.kappa() == 1 and "you can stop" in same.line("x")
    single = Agreement(2)
    single.add(np.ones(3, int), np.ones(3, int))
    assert single.kappa() is None and "single label" in single.line("x")


def test_models_of_two_rounds_are_compared_on_the_pool(models, task, monkeypatch, capsys) -> None:
    monkeypatch.setattr(scoring, "CHUNK", 16)
    select("classes", models["classes"], "random", "--previous", str(models["other"]))
    printed = capsys.readouterr().out
    decided = []
    for name in ("classes", "other"):
        ensemble = open_ensemble([str(models[name])])
        inputs = ensemble.encode([Example(n, text, None, None) for n, text in enumerate(sentences(60, 1))])
        decided.append(ensemble.scores(inputs, torch.device("cpu"), "fp32", 64, "auto")[0].argmax(1))
    kappa = cohen_kappa_score(*decided)
    assert abs(kappa) < 0.9 and f"Cohen's kappa {kappa:.3f}" in printed and "of 60 predictions" in printed
    given = ["--task", "classes.yaml", "--pool", "pool.jsonl", "--count", "3", "--out", "x.jsonl", *CPU]
    given += ["--model", str(models["classes"]), "--previous", str(models["classes"])]
    assert main(["select", *given]) == 2
    assert "is given twice" in capsys.readouterr().err


def test_chunks_bound_the_texts_in_memory_and_truncated_texts_are_counted(models, task, monkeypatch, capsys) -> None:
    chunks, read = [], Reader.read
    monkeypatch.setattr(scoring, "CHUNK", 16)
    monkeypatch.setattr(Reader, "read", lambda self, chunk, *more: chunks.append(chunk) or read(self, chunk, *more))
    select("classes", models["classes"], "margin")
    assert [len(chunk) for chunk in chunks] == [16, 16, 16, 12]
    keys = [[key(example.text, None, False) for example in chunk] for chunk in chunks]
    assert keys == [sorted(chunk) for chunk in keys]  # batches do not depend on the order of the pool
    longer = sum(len(text.split()) > 10 for text in sentences(60, 1))
    assert f"{longer} texts had more tokens than the model reads" in capsys.readouterr().out


def test_a_pool_that_changes_is_refused_and_the_earlier_output_remains(models, task, monkeypatch, capsys) -> None:
    first = select("classes", models["classes"], "margin")
    text = Path("pool.jsonl").read_text()
    for changed in (text + '{"text": "new"}\n', text.replace("the", "he", 1), "\n".join(text.splitlines()[:40])):
        Path("pool.jsonl").write_text(text)
        read = Reader.read

        def change(self, *given, changed=changed, read=read):
            Path("pool.jsonl").write_text(changed)
            return read(self, *given)

        with monkeypatch.context() as patch:
            patch.setattr(Reader, "read", change)
            words = ["--task", "classes.yaml", "--pool", "pool.jsonl", "--count", "8", "--out", "out.jsonl", *CPU]
            assert main(["select", *words, "--model", str(models["classes"])]) == 2
        assert "pool.jsonl was changed while it was read" in capsys.readouterr().err
    assert [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()] == first


def test_cells_of_any_type_are_written(task) -> None:
    columns = {
        "text": ["the a\rof", 'and "to"\rin; was'],
        "list": [["x", "ü"], None],
        "day": pyarrow.array([0, 1], pyarrow.date32()),
        "real": [0.5, float("nan")],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), task / "pool.parquet")
    found = select("classes", None, "random", "--pool", "pool.parquet", count=2)
    rest = [{name: row[name] for name in columns} for row in sorted(found, key=lambda row: row["day"])]
    assert rest == [
        {"text": "the a\rof", "list": ["x", "ü"], "day": "1970-01-01", "real": 0.5},
        {"text": 'and "to"\rin; was', "list": None, "day": "1970-01-02", "real": None},
    ]
    select("classes", None, "random", "--pool", "pool.parquet", out="out.csv", count=2)
    again = dict(sorted((cells["day"], cells) for _, cells in whole_rows(Path("out.csv"))))
    assert again["1970-01-01"]["list"] == '["x", "ü"]' and again["1970-01-02"]["list"] == ""
    assert [again[f"1970-01-0{day}"]["real"] for day in (1, 2)] == ["0.5", ""]
    assert [again[f"1970-01-0{day}"]["text"] for day in (1, 2)] == ["the a\nof", 'and "to"\nin; was']


POOLS = {
    "empty": "",
    "column": '{"txt": "the"}\n',
    "score": '{"text": "the"}\n{"text": "a", "score": 1}\n',
    "twice": '{"text": "the", "id": 1, "id": 2}\n',
    "unread": '{"words": "the"}\n',
    "blank": '{"text": " "}\n',
}
MODEL = ("--model", "MODEL", "--query")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--pool", "empty.jsonl"), "the pool empty.jsonl holds no text; give a file with rows"),
        (
            ("--pool", "column.jsonl"),
            "line 1 has no column 'text', in which the task has its texts; did you mean 'txt'?",
        ),
        (("--task", "tokens.yaml", "--pool", "unread.jsonl"), "line 1 has no column 'tokens', in which the task has"),
        (("--pool", "score.jsonl"), "line 2 has a column 'score', which select adds; rename it in the pool"),
        (("--pool", "twice.jsonl"), "line 1 has 'id' twice"),
        (("--pool", "blank.jsonl"), "line 1: the text 'text' is empty"),
        (("--pool", "missing.jsonl"), "missing.jsonl does not exist"),
        (("--pool", "classes-train.jsonl"), "no text of the pool classes-train.jsonl remains (3 labelled in train)"),
        (
            ("--count", "61"),
            "--count is 61, and 60 texts of pool.jsonl remain (3 labelled in train, 1 labelled in dev, 1",
        ),
        (("--count", "5", "--pool-size", "4"), "--count 5 is larger than --pool-size 4"),
        (("--out", "pool.jsonl"), "--out pool.jsonl is an input of this command"),
        (("--out", "./classes-dev.jsonl"), "classes-dev.jsonl is an input of this command"),
        (("--out", "out.txt"), "name it .jsonl or .csv"),
        (("--query", "margin"), "--model is missing: --query margin"),
        (("--previous", "."), "--previous is compared with --model"),
        ((*MODEL, "k-centre", "--pool-size", "20001"), "--pool-size 20,001 is too large for --query k-centre"),
        ((*MODEL, "entropy", "--task", "number.yaml"), "the kind number has no scores for it"),
        ((*MODEL, "facility-location", "--task", "number.yaml"), "the kind number has no scores for it"),
        (
            (*MODEL, "k-centre", "--task", "number.yaml", "--previous", "MODEL"),
            "the kind number has none; leave it out",
        ),
        ((*MODEL, "margin", "--task", "multi-label.yaml"), "does not fit the task multi-label, which predicts"),
    ],
)
def test_user_errors(arguments, message, models, task, capsys) -> None:
    for name, text in POOLS.items():
        (task / f"{name}.jsonl").write_text(text)
    before = sorted((path, path.read_bytes()) for path in task.iterdir())
    given = [
        "--task",
        "classes.yaml",
        "--pool",
        "pool.jsonl",
        "--count",
        "5",
        "--out",
        "new.jsonl",
        "--query",
        "random",
    ]
    words = [word.replace("MODEL", str(models["classes"])) for word in arguments]
    assert main(["select", *given, *words]) == 2
    printed = capsys.readouterr()
    assert message in printed.err.splitlines()[-1] and printed.out == ""
    assert sorted((path, path.read_bytes()) for path in task.iterdir()) == before


def test_a_sample_of_the_default_size_may_be_too_small(models, task, monkeypatch, capsys) -> None:
    from fastbert.dataset_work.selection import options

    monkeypatch.setattr(options, "POOL_SIZE", 10)
    words = [
        "--task",
        "classes.yaml",
        "--pool",
        "pool.jsonl",
        "--count",
        "11",
        "--out",
        "x.jsonl",
        "--query",
        "k-centre",
    ]
    assert main(["select", *words, "--model", str(models["classes"])]) == 2
    assert "--query k-centre uses a sample of 10 texts; give --pool-size 11 or more" in capsys.readouterr().err


def test_equal_scores_are_ordered_by_the_hash() -> None:
    rows = [Chosen.of(0.5, 3, 0, "b"), Chosen.of(0.5, 1, 1, "a"), Chosen.of(0.7, 9, 2, "c")]
    assert [row.index for row in sorted(rows)] == [2, 1, 0] and Chosen.of(0.0, 1, 1, "").score == 0


@pytest.mark.parametrize("rows", [64, 66])
def test_a_pool_that_another_program_writes_is_refused(rows, task, monkeypatch, capsys) -> None:
    """Its texts and its cells have two readers, of which one sees another number of rows."""
    cells = [{"text": "a"}] * rows
    monkeypatch.setattr(pool, "cells_of_rows", lambda *given: iter(cells))
    words = ["--task", "classes.yaml", "--pool", "pool.jsonl", "--count", "8", "--out", "x.jsonl", "--query", "random"]
    assert main(["select", *words]) == 2
    assert "pool.jsonl was changed while it was read" in capsys.readouterr().err
