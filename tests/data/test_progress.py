"""What a long job says where standard error is no terminal."""

import os
import re

import pytest

from fastbert.data import progress as room
from fastbert.data.corpus import BYTES_PER_WORKER, workers_for
from fastbert.data.progress import progress
from fastbert.data.sources import Source


@pytest.mark.parametrize(
    ("total", "line"), [(4_000_000, r"reading: 50%, .* MB/s, .* s left"), (0, r"reading: 2 MB, .*")]
)
def test_known_and_unknown_totals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], total: int, line: str
) -> None:
    monkeypatch.setattr(room, "SECONDS_BETWEEN_LINES", 0)
    with progress("reading", total) as report:
        report(2_000_000)
    first, last = capsys.readouterr().err.splitlines()
    assert re.fullmatch(line, first) and re.fullmatch(r"reading: done in \d+ s", last)


def test_workers_follow_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)

    def workers(size: int, asked: int = 0) -> int:
        return workers_for(Source("a", "a", {}, size, lambda: iter(())), asked)

    assert [workers(1), workers(BYTES_PER_WORKER), workers(100 * BYTES_PER_WORKER)] == [1, 2, 4]
    assert workers(0) == 4, "of unknown size"
    assert workers(1, asked=3) == 3
