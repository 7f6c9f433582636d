"""`fastbert bench data` at a tiny size: what it measures, writes and refuses. No test looks at a time."""

import json
import os
from pathlib import Path

import pytest

from fastbert.bench import data as bench_data
from fastbert.bench.data import results
from fastbert.bench.options import BenchDataOptions
from fastbert.errors import UserError


def test_ratios_are_of_the_same_round() -> None:
    loader = {"rows": 0.001, "masks": 0.002, "step": 0.1}
    rounds = [
        {"prepare": {"seconds": 2.0}, "encode_batch_fast": {"seconds": 1.0}, "loader": loader},
        {"prepare": {"seconds": 4.0}, "encode_batch_fast": {"seconds": 6.0}, "loader": {**loader, "step": 0.2}},
        {"prepare": {"seconds": 1.0}, "encode_batch_fast": {"seconds": 1.0}, "loader": {**loader, "rows": 0.004}},
    ]
    prepare, library, rows, masks, step = results(rounds, 8_000_000, BenchDataOptions(length=10, batch_size=5))
    assert (prepare["median"], prepare["least"], prepare["most"], prepare["ratio"]) == (4.0, 2.0, 8.0, 1.0)
    assert library["median"] == 8.0 and "ratio" not in library
    assert (rows["median"], rows["most"], rows["ratio"]) == (1.0, 4.0, 0.01)
    assert (masks["ratio"], masks["tokens_per_second"], step["rows_per_second"]) == (0.02, 25_000, 50)


def test_writes_results_and_table(corpus: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """In this process: fresh ones would take seconds each to start."""
    monkeypatch.setattr(bench_data, "in_new_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(bench_data, "STEP_SECONDS", 0.0)
    monkeypatch.setattr(bench_data, "STEPS", 2)
    monkeypatch.setattr(bench_data, "ENCODER", bench_data.EncoderOptions(layers=1, width=16, heads=2))
    out = tmp_path / "bench"
    tiny = {"megabytes": 0.1, "vocab_size": 600, "length": 16, "batch_size": 4, "rounds": 2, "workers": 1}
    options = BenchDataOptions(str(corpus), **tiny, out=str(out), json=True)
    assert bench_data.bench_data(options) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((out / "data.json").read_text())
    assert 100_000 <= found["text_bytes"] < 110_000  # up to the end of a document
    assert len(found["rows"]) == 5 and all(0 < row["least"] <= row["median"] <= row["most"] for row in found["rows"])
    table = (out / "data.md").read_text()
    assert "| fastbert prepare | " in table and "% of encode_batch_fast |" in table and "% of the step |" in table
    assert sorted(path.name for path in out.iterdir()) == ["data.json", "data.md"]


def square(number: int) -> dict[str, float]:
    return {"square": number**2, "process": os.getpid()}


def test_contestants_run_in_new_processes() -> None:
    found = bench_data.in_new_process(square, 3)
    assert found["square"] == 9 and found["process"] != os.getpid()


def test_user_errors(tmp_path: Path) -> None:
    for wrong in ({"rounds": 0}, {"length": 1}, {"megabytes": 0.0}, {"workers": -1}):
        with pytest.raises(UserError, match=f"{next(iter(wrong))} must be"):
            BenchDataOptions(**wrong)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="choose another folder"):
        bench_data.bench_data(BenchDataOptions(out=str(tmp_path / "file" / "x")))
    with pytest.raises(UserError, match="no-such"):
        bench_data.bench_data(BenchDataOptions(data=str(tmp_path / "no-such.txt"), out=str(tmp_path / "x")))
