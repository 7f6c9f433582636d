"""The benchmark of each option on a CPU is rehearsed with tiny shapes."""

import json

import pytest

pytest.importorskip("triton")
from fastbert_kernels.benchmarks import attention_cpu_options


def test_rehearsal(tmp_path, capsys) -> None:
    assert attention_cpu_options.main(["--toy", "--rounds", "1", "--json", "--out", str(tmp_path)]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert len(rows) == 2 * 2 * 2 * (4 * 3 + 2)  # shapes, types, passes; dropout has no SDPA
    assert {row["option"] for row in rows} == set(attention_cpu_options.OPTIONS)
    assert all(row["ms"] > 0 and row["peak_mib"] >= 0 for row in rows)
    assert (tmp_path / "attention-cpu-options.md").read_text().count("\n") > len(rows)
