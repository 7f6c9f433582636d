"""scripts/growth/measure_growth.py: the fitted lines, the bends, and a measurement at toy size."""

import importlib
import lzma
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts" / "growth"


@pytest.fixture(scope="module")
def growth():
    """The module of the script."""
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("measure_growth")
    sys.path.remove(str(SCRIPTS))


def rows_of(times: dict[float, float]) -> list[dict]:
    """Two rounds around each time."""
    return [
        {"curve": "layers", "point": number, "x": x, "milliseconds": part * ms, "megabytes": 100 + x, "flops": 1e9 * x}
        for number, (x, ms) in enumerate(times.items())
        for part in (0.98, 1.02)
    ]


def test_a_line_is_found_exactly(growth):
    text = growth.table("layers", growth.medians(rows_of({x: 10 + 5 * x for x in (2, 4, 8, 16)}), "layers"))
    assert "| 8 | 50.0 (49.0 to 51.0) | 160 | 108 |" in text  # 8 GFLOP in 50 ms
    assert "Time = 10 + 5 x ms; largest deviation 0%" in text
    assert "Memory = 100 + 1 x MB" in text
    assert "bends" not in text


def test_a_bend_is_named(growth):
    text = growth.table("layers", growth.medians(rows_of({1: 10, 2: 20, 4: 40, 8: 80, 16: 320}), "layers"))
    assert "bends at" in text and "16" in text.split("bends at")[1].split("\n")[0]


def test_relative_errors_decide(growth):
    x, y = np.array([1.0, 2.0, 1000.0, 2000.0]), np.array([3.0, 4.0, 1001.0, 2300.0])
    absolute = np.polyval(np.polyfit(x, y, 1), x) / y - 1
    assert np.abs(growth.fit(x, y, 1)[1][:2]).max() < np.abs(absolute[:2]).max()


def test_toy(growth, tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt.xz"
    words = "\n\n".join(
        f"the number {i} follows the number {i - 1} and the word w{i % 97} x{i % 89}" for i in range(4000)
    )
    text.write_bytes(lzma.compress(words.encode()))
    out = tmp_path / "growth"
    command = ["x", "--text", str(text), "--out", str(out), "--toy", "--rounds", "1", "--steps", "6"]
    monkeypatch.setattr(sys, "argv", [*command, "--curves", "layers"])
    growth.main()
    assert (out / "growth.png").stat().st_size > 1000
    lines = (out / "rows.jsonl").read_text().splitlines()
    assert len(lines) == 2 and "GFLOP/s" in (out / "tables.md").read_text()
    assert 50 < float((out / "tables.md").read_text().splitlines()[4].split("|")[4]) < 2000  # MB of a process
    growth.main()  # nothing is measured again
    assert (out / "rows.jsonl").read_text().splitlines() == lines


def test_a_command_that_fails_is_shown(growth):
    with pytest.raises(growth.UserError, match="nothing there"):
        growth.run([sys.executable, "-c", "raise SystemExit('nothing there')"])


def test_memory_is_that_of_the_command_and_its_children(growth):
    child = "import time; x = bytearray(300_000_000); time.sleep(0.5)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    here = bytearray(600_000_000)  # is not counted
    assert 300 < growth.run([sys.executable, "-c", parent])[1] < 400 < len(here)
