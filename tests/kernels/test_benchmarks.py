"""Dry runs of the GPU benchmarks on a machine without a GPU."""

import itertools
import json
import math

import pytest

pytest.importorskip("triton")
from fastbert_kernels.benchmarks import attention, compiled
from fastbert_kernels.benchmarks.__main__ import main
from fastbert_kernels.benchmarks.measuring import Settings
from fastbert_kernels.benchmarks.report import report
from fastbert_kernels.configurations import CANDIDATES, TENSOR_CLASSES


def test_dry_run(tmp_path) -> None:
    options = ["--toy", "--rounds", "2", "--commit", "abc123", "--out", str(tmp_path)]
    main(["tune", *options])
    main(["attention", *options, "--tiles", str(tmp_path / "attention-tune.json")])
    main(["vocabulary", *options])
    tuned, benched, words = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("attention-tune", "attention", "vocabulary")
    )
    assert tuned["rows"][-1]["best"].keys() == {"forward", "keys", "queries", "bias", "short"}
    assert all(row["correct"] for row in tuned["rows"][:-1])
    assert benched["tiles"] == tuned["rows"][-1]["best"] and benched["ceilings"]["tflops"] > 0
    named = {row["contestant"] for row in benched["rows"]}
    assert named >= {"fastbert", "fastbert, no bias", "plain", "fastbert, packed", "TUPE-R as a matrix"}
    missing = [row for row in benched["rows"] if "both" not in row]
    assert all(row["failed"].startswith("not installed: no module ") for row in missing)
    assert all(row["both"]["ms"] > 0 for row in benched["rows"] if row not in missing)
    assert {(row["operation"], row["contestant"]) for row in words["rows"]} >= {
        ("loss", "fastbert"),
        ("loss", "compiled"),
        ("candidates", "fastbert"),
        ("candidates", "compiled"),
    }
    written = {path.name for path in tmp_path.iterdir()}
    assert written >= {"attention.md", "attention.png", "attention-tune.md", "vocabulary.md"}
    text = (tmp_path / "attention.md").read_text()
    assert text.startswith("# Attention on a GPU\n")
    assert "dry run with tiny shapes" in text and "- commit: abc123" in text and "| fastbert, packed |" in text
    assert "| TransformerEngine, cuDNN | not installed: no module transformer_engine;" in text


def test_tuning_compares_the_forms_of_the_backward_pass_at_their_best(tmp_path, monkeypatch) -> None:
    """The candidates of a kernel are timed with the fastest of the kernels before it; here each is faster than all
    before it."""
    used, times = [], itertools.count(100, -1)
    monkeypatch.setattr(attention.configurations, "use", used.append)
    monkeypatch.setattr(attention, "timed", lambda *arguments: {"ms": next(times)})
    best = attention.tune(Settings(tmp_path, toy=True)).rows[-1]["best"]
    last = {kernel: {TENSOR_CLASSES[0]: choices[-1]} for kernel, choices in CANDIDATES.items()}
    assert best == {kernel: {TENSOR_CLASSES[0]: list(choices[TENSOR_CLASSES[0]])} for kernel, choices in last.items()}
    first, second = [choice for choice in used if list(choice)[-1:] == ["keys"]]
    before = {kernel: last[kernel] for kernel in ("forward", "queries", "bias")}
    assert first == {**before, "keys": {TENSOR_CLASSES[0]: CANDIDATES["keys"][0]}} and second["keys"] == last["keys"]
    assert CANDIDATES["keys"][0].stored == 0 and CANDIDATES["keys"][-1].stored > 0


def test_resources_of_compiled_kernels(tmp_path, monkeypatch) -> None:
    """One case, and a configuration that does not fit."""
    everything = list(compiled.calls())
    assert {one[3] for one in everything if one[1] == "forward"} == set(compiled.CANDIDATES["forward"])
    big = compiled.Tiles(128, 128, 8, 4)
    cases = [one for one in everything if one[0] == "16-bit, to 64, T 512"] + [
        (
            "too large",
            "forward",
            compiled.TENSOR_CLASSES[0],
            big,
            lambda: compiled.attend(512, *compiled.EXAMPLES[compiled.TENSOR_CLASSES[0]]),
        )
    ]
    monkeypatch.setattr(compiled, "calls", lambda: iter(cases))
    rows = compiled.compiled(Settings(tmp_path, toy=True)).rows
    assert [row["kernel"] for row in rows[:-1]] == ["forward_kernel", "delta_kernel", "keys_kernel", "queries_kernel"]
    assert all(row["spilled"] == 0 for row in rows[:-1]) and "shared memory" in rows[-1]["failed"]
    report(tmp_path)
    table = (tmp_path / "kernels-compiled.md").read_text()
    assert "| forward | too large | 128 128 8 4 0 | does not fit |" in table


def test_without_a_gpu_there_is_an_error(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as error:
        main(["attention", "--out", str(tmp_path)])
    assert error.value.code == 2 and "there is no GPU; use --toy" in capsys.readouterr().err


def test_errors_that_are_not_finite(tmp_path, monkeypatch) -> None:
    """A kernel that returns NaN exceeds the bound; its error is null in JSON and inf in the table."""
    from fastbert_kernels.benchmarks.measuring import ResultRows
    from fastbert_kernels.benchmarks.report import attention_tables

    rows = ResultRows("attention", Settings(tmp_path))
    timed = {"ms": 1.0, "least": 1.0, "most": 1.0, "tflops": 1.0}
    row = {
        "case": "batch",
        "contestant": "fastbert",
        "length": 8,
        "errors": {"q": [math.nan, 1e-6, math.nan]},
        "peak_mib": 1,
    }
    rows.add(**row, forward=timed, backward=timed, both=timed)
    found = json.loads(rows.path.read_text())
    assert found["rows"][0]["errors"] == {"q": [None, 1e-6, None]}
    monkeypatch.setattr("fastbert_kernels.benchmarks.report.roofline_fraction", lambda *arguments: 1.0)
    assert "| inf" in attention_tables(found).replace("  ", " ")
