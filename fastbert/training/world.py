"""Interface to the processes (ranks) that train one model together, for the loop, batches, step, optimizers, note
dictionary and evaluation. Here a single process; `fastbert.training.parallel` has several."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Result = TypeVar("Result")


@dataclass(eq=False)
class World:
    """One process: every sum over the ranks is the tensor itself.

    All methods except `rows`, `parts` and `local` must be called by all ranks in the same order.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Index of the process on its machine."""
    sharded: bool = False
    """True if every rank holds only a part of each weight."""
    restarted: bool = False
    """True on the first rank if the launcher has restarted the processes of a machine after a failure."""

    def __enter__(self) -> "World":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Ends the communication. After an error the other ranks end with the same exit code."""

    @property
    def first(self) -> bool:
        """Returns whether this rank writes the files of the run."""
        return self.rank == 0

    # --- batches

    def rows(self, count: int) -> slice:
        """Rows that this rank computes, of a global batch of `count` rows."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def parts(self, count: int, size: int) -> Iterator[slice]:
        """The rows of this rank in parts of at most `size`. All ranks have the same number of parts, at least one, so a
        part may be empty."""
        mine, most = self.rows(count), -(-count // self.size)
        for start in range(mine.start, mine.start + max(1, most), size):
            yield slice(min(start, mine.stop), min(start + size, mine.stop))

    # --- results of all ranks

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, on each rank. May write into `tensor`."""
        return tensor

    def sums(self, scalars: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sums of named scalars over all ranks, computed in float64 in one message."""
        return dict(scalars)

    def gather(self, part: Tensor) -> Tensor:
        """Concatenates tensors of equal shape along dimension 0, in the order of the ranks."""
        return part

    def first_decides(self, function: Callable[[], Any]) -> Any:
        """Result of `function` on the first rank, a value for JSON; the other ranks wait for it."""
        return function()

    def first_before_others(self, function: Callable[[], Result]) -> Result:
        """Calls `function` on every rank, on the first one before the others, which then find its files."""
        return function()

    def from_first(self, tensors: dict[str, dict[str, Tensor]] | None) -> dict[str, dict[str, Tensor]]:
        """The tensors of the first rank, on the CPU; those of the others are ignored."""
        return tensors

    # --- the network

    def connect(self, device: torch.device) -> None:
        """Connects the ranks for computing on `device`; a second call has no effect."""

    def distributed(
        self,
        module: nn.Module,
        device: torch.device,
        blocks: Sequence[nn.ModuleList] = (),
        partly_used: bool = False,
    ) -> nn.Module:
        """The module whose forward passes train `module`, with gradients that are means over the ranks.

        Args:
            blocks: lists of submodules, called in their order, that may be sharded one by one.
            partly_used: steps may use only a part of the parameters, the same on all ranks, and the others then have no
                gradient.
        """
        return module

    def accumulating(self, network: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Context of forward and backward pass of a micro-batch; gradients are averaged over the ranks in the `last`
        of a step."""
        return nullcontext()

    # --- sharded tensors

    def local(self, tensor: Tensor) -> Tensor:
        """The part of a tensor that this rank holds, sharing its memory."""
        return tensor

    def full(self, tensor: Tensor) -> Tensor:
        """The whole of a tensor that may be sharded."""
        return tensor

    def like(self, full: Tensor, other: Tensor) -> Tensor:
        """`full`, sharded as `other` is."""
        return full

    def full_on_first(self, tensors: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]] | None:
        """The whole of tensors that may be sharded, on the first rank; None on the others."""
        return tensors


ONE_PROCESS = World()
