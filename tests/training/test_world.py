"""The rows and micro-batches of each rank, and the words of the first rank."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastbert import streams
from fastbert.data.batches import InMemory, PackedRows, validation_batches
from fastbert.pretraining.pretrain import connect
from fastbert.training import parallel
from fastbert.training.launch import resume_command
from fastbert.training.world import ONE_PROCESS, World


def test_rows_of_the_ranks_are_the_batch() -> None:
    for count in (1, 5, 8):
        for size in (1, 2, 3):
            rows = [row for rank in range(size) for row in range(count)[World(rank, size).rows(count)]]
            assert rows == list(range(count))


@pytest.mark.parametrize("count", [1, 2, 7, 16])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("micro", [1, 2, 3, 100])
def test_all_ranks_have_the_same_number_of_parts(count: int, size: int, micro: int) -> None:
    parts = [list(World(rank, size).parts(count, micro)) for rank in range(size)]
    assert len({len(mine) for mine in parts}) == 1 and len(parts[0]) >= 1
    assert [row for mine in parts for part in mine for row in range(count)[part]] == list(range(count))
    assert all(0 <= part.stop - part.start <= micro for mine in parts for part in mine)


def test_one_process_has_no_empty_part() -> None:
    assert [part.stop - part.start for part in ONE_PROCESS.parts(7, 3)] == [3, 3, 1]


def test_ranks_divide_the_rows_of_a_validation() -> None:
    """A rank without rows of its own reads the first one, which does not count."""
    rows = PackedRows(InMemory(np.arange(200)), 8, 2, 3)

    def read(count: int, size: int) -> list[list[tuple[list[int], bool]]]:
        device = torch.device("cpu")
        parts = (validation_batches(rows, count, 2, device, World(rank, size)) for rank in range(size))
        return [[(batch.row_indices.tolist(), batch.counted) for batch in part] for part in parts]

    assert read(7, 2) == [[([0, 4], True), ([8], True)], [([12, 16], True), ([20, 24], True)]]
    assert read(2, 3) == [[([0], False)], [([0], True)], [([14], True)]]


def test_command_that_resumes_in_as_many_processes() -> None:
    several = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    assert resume_command({}, "runs/x") == "fastbert pretrain --resume runs/x"
    assert resume_command(several, "runs/x") == "fastbert pretrain --resume runs/x --launch ray --processes 4"
    torchrun = several | {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert resume_command(torchrun, "a run") == "torchrun ... -m fastbert pretrain --resume 'a run'"


def test_a_batch_of_fewer_rows_than_processes_warns(capsys) -> None:
    for rows in (3, 4):
        options = SimpleNamespace(batch_size=rows)
        connect(SimpleNamespace(fingerprint="", device=None, world=World(0, 4), options=options))
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1 and "a batch of 3 is divided between 4 processes" in warnings[0]


def test_restarted_ranks_do_not_read_the_words_of_those_before(monkeypatch) -> None:
    """torchrun's c10d rendezvous gives them the same store."""
    store = parallel.dist.HashStore()
    monkeypatch.setattr(streams, "_muted", False)  # restored after the test

    def ranks(restarts: str) -> list[World]:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
        left = [1, 0]
        monkeypatch.setattr(parallel.dist, "rendezvous", lambda *_, **__: iter([(store, left.pop(), 2)]))
        with ThreadPoolExecutor(2) as pool:
            found = pool.map(parallel.start, (10.0, 10.0))
            return sorted(found, key=lambda world: world.rank)

    for restarts, word in (("0", "old"), ("1", "new")):
        first, second = ranks(restarts)
        assert first.restarted is (restarts == "1") and not second.store.check(["messages/0"])
        assert first.first_decides(lambda word=word: word) == word
        assert second.first_decides(lambda: "not asked") == word
