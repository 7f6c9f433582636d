import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from fastbert_kernels.benchmarks import attention_cpu, compiled

from fastbert.cli import main


def test_compile_only(tmp_path: Path, monkeypatch, capsys) -> None:
    """One case of each capability; tables or JSON on standard output, the clock on standard error."""
    one = next(compiled.calls())
    monkeypatch.setattr(compiled, "calls", lambda: iter([one]))
    out = str(tmp_path / "kernels")
    assert main(["bench", "kernels", "--compile-only", "--out", out]) == 0
    output = capsys.readouterr()
    assert "| kernel | case | tiles | 8.0 | 8.9 | 9.0 | 10.0 | 12.0 |" in output.out and "| forward |" in output.out
    assert "5 of 5, 0 s left" in output.err and f"wrote {out}/kernels-compiled.json" in output.err
    assert main(["bench", "kernels", "--compile-only", "--json", "--out", out]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["capability"] for row in found["results"][0]["rows"]} == {80, 89, 90, 100, 120}
    assert found["machine"]["versions"]["torch"] == torch.__version__


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has benchmarks of its own")
def test_on_a_cpu(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(attention_cpu, "SHAPES", attention_cpu.TOY)
    assert main(["bench", "kernels", "--rounds", "2", "--json", "--out", str(tmp_path)]) == 0
    rows = json.loads(capsys.readouterr().out)["results"][0]["rows"]
    assert len(rows) == 2 * 2 * (4 + 3) and all(row["least"] <= row["ms"] <= row["most"] for row in rows)
    assert all(row["over"] == 1 for row in rows if row["contestant"] == "fastbert")
    assert "SDPA, concatenated" in (tmp_path / "attention-cpu.md").read_text()
    assert main(["bench", "kernels", "--rounds", "1", "--seconds", "1e-9", "--out", str(tmp_path / "short")]) == 0
    assert "| SDPA |" in capsys.readouterr().out  # one case at least


def test_user_errors(tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    for arguments, message in (
        ([], "usage: fastbert bench <benchmark>"),
        (["kernel"], "did you mean 'kernels'"),
        (["kernels", "--rounds", "0"], "rounds must be at least 1"),
        (["kernels", "--tune"], "torch finds none; --compile-only needs none"),
        (["kernels", "--tune", "--compile-only"], "not both"),
        (["kernels", "--out", str(tmp_path / "file" / "x")], "part of that path is a file; choose another folder"),
    ):
        assert main(["bench", *arguments]) == 2
        output = capsys.readouterr()
        assert message in output.out + output.err and "Traceback" not in output.err
