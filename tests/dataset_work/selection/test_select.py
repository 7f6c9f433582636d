"""`fastbert select`: scores and states of the models, and the texts that are selected by them."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import cohen_kappa_score

from fastbert.dataset_work.selection import queries, scoring
from fastbert.dataset_work.selection.agreement import Agreement
from fastbert.dataset_work.selection.pool import Chosen, key
from fastbert.dataset_work.selection.reader import Reader
from fastbert.finetuning.ensemble import open_ensemble
from fastbert.finetuning.rows import Example
from fastbert.training.options import MachineOptions
from tests.dataset_work.selection.conftest import CPU, LABELS, select, sentences, spans
from tests.flags import main


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


def test_equal_scores_are_ordered_by_the_hash() -> None:
    rows = [Chosen.of(0.5, 3, 0, "b"), Chosen.of(0.5, 1, 1, "a"), Chosen.of(0.7, 9, 2, "c")]
    assert [row.index for row in sorted(rows)] == [2, 1, 0] and Chosen.of(0.0, 1, 1, "").score == 0
