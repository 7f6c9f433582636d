"""The page of a fine-tuning: its tables are those of results.json, and each seed has a line."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastbert.finetuning.options import FinetuneOptions
from fastbert.finetuning.results import seed_folder, summary, write_results
from fastbert.report.finetune_page import results_table, seeds_table, write_results_page
from tests.report.test_page import HOSTILE_NAME, Texts


def seed_result(seed: int, best: float, last: float | None) -> dict:
    figures = {"precision": best, "recall": best, "f1": best, "support": 7}
    return {
        **{"seed": seed, "best": {"epoch": 2, "dev": {"dev": {"accuracy": best, "loss": 0.5}}}},
        **{"last": {"epoch": 3, "dev": {"dev": {"accuracy": last, "loss": 0.6}}}, "train_examples": 100},
        "by_label": {"dev": {HOSTILE_NAME: figures}},
    }


@pytest.fixture
def results() -> dict:
    seeds = [seed_result(0, 0.5, 0.25), seed_result(1, 0.75, None)]
    parts = {epoch: summary([seed[epoch]["dev"] for seed in seeds]) for epoch in ("best", "last")}
    part = {"fraction": 1.0, "train_examples": 100, "summary": parts, "ensemble": None, "seeds": seeds}
    return {"task": HOSTILE_NAME, "model": "runs/a", "metrics": ["accuracy"], "fractions": [part]}


def test_tables(results: dict) -> None:
    row = ["100", "dev", "accuracy", "0.6250", "0.6250", "0.1768", "0.7500", "–", "–"]  # a last epoch was not finite
    assert results_table(results).rows == [row]
    results["fractions"][0]["ensemble"] = {"dev": {"accuracy": 0.875}}
    assert results_table(results).rows == [[*row[:-2], "0.8750", "–"]]
    assert seeds_table(results).rows == [["0", "100", "2", "0.5000"], ["1", "100", "2", "0.7500"]]


def test_the_page(results: dict, tmp_path: Path, capsys) -> None:
    paths = {}
    for seed in (0, 1):
        paths[seed] = seed_folder(tmp_path, 1.0, seed) / "metrics.jsonl"
        paths[seed].parent.mkdir()
        rows = [{"step": 5, "split": "dev", "epoch": epoch, "accuracy": epoch / 4} for epoch in (1, 2, 3)]
        rows += [
            {"step": 6, "split": "dev", "epoch": 4, "accuracy": None},
            {"step": 6, "split": "other", "epoch": 4, "accuracy": None},
        ]
        paths[seed].write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = SimpleNamespace(name=HOSTILE_NAME, metrics=("accuracy",))
    seeds = [seed | {"truncated": {"train": 0}} for seed in results["fractions"][0]["seeds"]]
    write_results(FinetuneOptions(model="runs/a", task="rte", seeds=2), task, "fp32", tmp_path, {1.0: seeds}, {})
    assert f"  {tmp_path / 'report.html'}\n" in capsys.readouterr().out
    text = (tmp_path / "report.html").read_text()
    page = Texts(text)
    assert "seed 0, dev" in page.text and "seed 1, dev" in page.text and "svg" in page.tags
    assert "seed 0, other" not in page.text
    ticks = re.findall(r">\s*(\d[\d.]*)\s*<", text[text.index("<svg") : text.index("</svg>")])
    assert "2" in ticks and all(float(tick) < 1 for tick in ticks if "." in tick)  # epochs are whole numbers
    assert HOSTILE_NAME in page.text and "script" not in page.tags
    assert "<td>--seeds</td>" in text.split("<details>")[0]


def test_without_records_of_epochs(results: dict, tmp_path: Path) -> None:
    write_results_page(tmp_path, results, {0: tmp_path / "absent.jsonl"}, FinetuneOptions())
    assert "Without curves: metrics.jsonl has no records of epochs." in (tmp_path / "report.html").read_text()
