"""Models with random weights, and a pool for each kind of task."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from fastbert.data.tokenizer import WordPiece
from fastbert.finetuning.kinds import KINDS
from fastbert.finetuning.model import TaskModel
from fastbert.finetuning.rows import Example
from fastbert.finetuning.saved import TaskRecord, save_task_model
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


@pytest.fixture(scope="session")
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


def spans(text: str) -> tuple[tuple[int, int], ...]:
    found, end = [], -1
    for word in text.split():
        found.append((end + 1, end + 1 + len(word)))
        end = found[-1][1]
    return tuple(found)
