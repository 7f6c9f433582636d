"""Rows that are read ahead are those of the step, errors appear where they belong, and the thread ends."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from fastbert.data.batches import InMemory, PackedRows, TrainingBatches
from fastbert.data.stages import BatchPlan, Stage
from fastbert.errors import UserError
from fastbert.training.read_ahead import ReadAhead

CPU = torch.device("cpu")
PLAN = BatchPlan((Stage(0, 8, 10), Stage(3, 4, 20)))


def batches(stream: InMemory | None = None, device: torch.device = CPU) -> TrainingBatches:
    stream = stream or InMemory(np.arange(5, 1005, dtype=np.uint16))
    rows = {length: PackedRows(stream, length, 2, 3, document_mask=True) for length in PLAN.lengths}
    return TrainingBatches(rows, PLAN, 3, 0, device)


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def test_rows_are_those_of_the_step() -> None:
    """From any step, of two lengths, also if a step is read twice or only in part, as before a resumed run."""
    plain = batches()
    for first in (0, 2, 5):
        with ReadAhead(plain, 7, threaded=True) as rows:
            next(iter(rows.at(first)))
            for step in (first, *range(first, 7)):
                found, expected = list(rows.at(step)), list(plain.at(step))
                assert len(found) == len(expected) > 1
                for one, other in zip(found, expected, strict=True):
                    for name in ("input_ids", "row_indices", "document_ids", "position_ids"):
                        assert torch.equal(getattr(one, name), getattr(other, name))
            assert readers()
        assert not readers()


class Watched(InMemory):
    """A stream that records which threads read, and fails from a step on."""

    def __init__(self, fails_at: int = 10**9) -> None:
        super().__init__(np.arange(5, 1005, dtype=np.uint16))
        self.fails_at, self.rows, self.names, self.changed = fails_at, 0, set(), threading.Condition()

    def read(self, start: int, stop: int) -> np.ndarray:
        with self.changed:
            self.rows += 1
            self.names.add(threading.current_thread().name)
            self.changed.notify_all()
            if self.rows > self.fails_at:
                raise UserError("shard 7 is damaged")
        return super().read(start, stop)


def test_the_next_step_is_read_while_a_step_is_computed() -> None:
    stream = Watched()
    with ReadAhead(batches(stream), 2, threaded=True) as rows:
        assert sum(len(batch.input_ids) for batch in rows.at(0)) == 8
        with stream.changed:  # the step computes
            assert stream.changed.wait_for(lambda: stream.rows == 16, timeout=60)
        list(rows.at(1))
    assert stream.rows == 16 and not readers()  # step 2 is not in the run
    assert len(stream.names) == 1 and "read-ahead" in stream.names.pop()


def test_an_error_of_the_thread_appears_at_its_step() -> None:
    stream = Watched(fails_at=12)
    with ReadAhead(batches(stream), 7, threaded=True) as rows:
        assert len(list(rows.at(0))) == 2
        with pytest.raises(UserError, match=r"^shard 7 is damaged$"):
            list(rows.at(1))
    assert not readers()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_the_thread_ends_with_the_loop(error: type[BaseException]) -> None:
    with pytest.raises(error), ReadAhead(batches(), 7, threaded=True) as rows:
        list(rows.at(0))
        raise error
    assert not readers()


def test_a_cpu_reads_without_a_thread() -> None:
    stream = Watched()
    with ReadAhead(batches(stream), 7) as rows:
        list(rows.at(0))
        assert not readers()
    assert stream.rows == 8 and stream.names == {threading.current_thread().name}


def test_a_gpu_copies_from_memory_that_the_thread_has_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for the GPU: the thread uses that of the process, each tensor has pinned memory of its own, and
    every copy is made by the thread of the loop, without waiting."""
    calls, pinned, to = [], set(), Tensor.to
    here, gpu = threading.current_thread().name, torch.device("cuda", 1)

    def pin(tensor: Tensor) -> Tensor:
        calls.append(("pin", threading.current_thread().name))
        out = tensor.clone()
        pinned.add(id(out))
        held.append(out)
        return out

    def copy(tensor: Tensor, device: object = None, non_blocking: bool = False, **more: object) -> Tensor:
        if device != gpu:
            return to(tensor, device, non_blocking=non_blocking, **more)
        calls.append(("copy", threading.current_thread().name, non_blocking, id(tensor) in pinned))
        return tensor.clone()

    held: list[Tensor] = []
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(current_device=lambda: 1, set_device=lambda n: calls.append(n)))
    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "is_pinned", lambda tensor: id(tensor) in pinned)
    monkeypatch.setattr(Tensor, "to", copy)
    expected = [batch.input_ids for batch in batches().at(0)]
    with ReadAhead(batches(device=gpu), 1) as rows:
        found = [batch.input_ids for batch in rows.at(0)]
    assert all(map(torch.equal, found, expected)) and len(found) == 2
    assert calls[0] == 1  # the GPU of the process, before anything is pinned
    assert calls[1:5] == [("pin", calls[1][1])] * 4 and "read-ahead" in calls[1][1]
    assert calls[5:] == [("copy", here, True, True)] * 4
    assert len(pinned) == 4  # input_ids and row_indices of two micro-batches
