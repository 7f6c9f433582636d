"""Reading of the next step's rows in a thread, while the device computes the present step.

The rows of a step are a function of its number, so reading them early changes nothing: no state is saved, and a resumed
run reads the same rows. The thread only reads, into memory of the host. The thread of the loop copies them to the
device, on the stream of the loop, so that each step finds its rows complete.

On a GPU the thread reads into pinned memory, from which a copy needs no waiting. PyTorch allocates that memory and does
not use it again before all copies from it have ended, although the loop no longer refers to it then.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
from torch import Tensor

from fastbert.data.batches import Batch, TrainingBatches, map_tensors


class ReadAhead:
    """Batches of a run in a `with` block, at whose end the thread ends.

    Attributes:
        threaded: whether rows are read ahead.
    """

    def __init__(self, batches: TrainingBatches, steps: int, threaded: bool | None = None) -> None:
        """
        Args:
            steps: steps of the run; later ones are not read.
            threaded: None reads ahead for a GPU only: on a CPU the thread would use a core of the step.
        """
        self.batches, self.steps = batches, steps
        self.threaded = batches.device.type == "cuda" if threaded is None else threaded
        self._thread: ThreadPoolExecutor | None = None
        self._next: tuple[int, Future[list[Batch]]] | None = None
        # A new thread would use the first GPU, and reserve memory there, whichever GPU this process trains on.
        self._gpu = torch.cuda.current_device() if batches.device.type == "cuda" else None

    def __enter__(self) -> "ReadAhead":
        if self.threaded:
            self._thread = ThreadPoolExecutor(1, "read-ahead")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Waits until the thread has read the rows that it is reading."""
        self._next = None
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def at(self, step: int) -> Iterator[Batch]:
        """Micro-batches of this rank in `step`, as by `TrainingBatches.at`. The next step is then read.

        Raises:
            UserError: the thread could not read them.
        """
        if self._thread is None:
            yield from self.batches.at(step)
            return
        ahead, self._next = self._next, None
        reading = ahead[1] if ahead is not None and ahead[0] == step else self._thread.submit(self._read, step)
        if step + 1 < self.steps:
            self._next = step + 1, self._thread.submit(self._read, step + 1)
        for batch in reading.result():
            yield self.batches.moved(batch, step)

    def _read(self, step: int) -> list[Batch]:
        """The micro-batches of a step on the host, in pinned memory for a GPU. Runs in the thread."""
        if self._gpu is None:
            return list(self.batches.on_host(step))
        torch.cuda.set_device(self._gpu)
        return [map_tensors(batch, Tensor.pin_memory) for batch in self.batches.on_host(step)]
