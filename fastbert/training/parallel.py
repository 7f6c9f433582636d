"""Several processes (ranks) that train one model together, on torch.distributed: each computes its rows of the global
batch. This is the only module that imports torch.distributed.

    DDP     (default) every rank has all weights; gradients are summed while the backward pass runs
    FSDP2   (machine.shard blocks) every rank holds a part of each weight, gradient and moment, and gathers the weights
            of a block when it is computed

The ranks meet at the store of their launcher. The first one decides and writes files, and the others wait for its words
there (`first_says`). The process group for tensors, NCCL on GPUs and Gloo on CPUs, starts only once the data is
prepared.
"""

import inspect
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from fastbert.records import json_text, parse_json
from fastbert.streams import echo, mute
from fastbert.system_errors import user_error
from fastbert.training.world import World

Result = TypeVar("Result")

ENDED = "ended"  # key of the exit code of the first rank that failed
PATIENCE = 5.0  # seconds for the reason of a failure to arrive from another rank
SHORTEST_PAUSE, LONGEST_PAUSE = 0.001, 0.1  # seconds between two looks at the store
_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")  # the second before torch 2.13
    if name in inspect.signature(DistributedDataParallel).parameters
)
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
_LOST = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "Socket")
"""Parts of the messages of errors of a connection, which have no class of their own in Gloo."""
_NOTHING = torch.empty(0)


class OtherRankEndedError(SystemExit):
    """Another rank has failed and has reported the reason; `code` is its exit code."""


def start(timeout: float, shard: str = "none") -> World:
    """Joins the processes that torchrun or Ray has started, and their process group if it exists already.

    Args:
        timeout: seconds that a rank waits for the others before it gives up.
        shard: none, or blocks for FSDP2.
    """
    joined = dist.is_initialized()
    if joined:
        store, rank, size = dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size()
    else:
        store, rank, size = next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=timeout))))
    if rank > 0:
        mute()
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    # After a restart, torchrun's c10d rendezvous gives the processes the same store, with the values of those before.
    # (Ray gives them another one, and the first of them alone knows how often they were restarted.)
    attempt = "0" if joined else os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    own = dist.PrefixStore(f"fastbert/{attempt}", store)
    return Ranks(rank, size, local_rank, shard != "none", own, timeout, joined=joined)


@dataclass(eq=False)
class Ranks(World):
    """This process as one of several."""

    store: dist.Store | None = None
    timeout: float = 600.0
    said: Iterator[int] = field(default_factory=itertools.count)
    """Numbers of the words of the first rank."""
    device: torch.device | None = None
    """Set by `connect`."""
    joined: bool = False
    """The process group had existed before and ends later: the first rank may have the store that others still
    read."""
    _mesh: Any = field(default=None, repr=False)

    # --- the store

    def first_says(self, function: Callable[[], Any]) -> Any:
        key = f"said/{next(self.said)}"
        if self.first:
            self.store.set(key, json_text(function()))
        else:
            self._wait(key)
        return parse_json(self.store.get(key), "the word of the first process")

    def first_before_others(self, function: Callable[[], Result]) -> Result:
        if self.first:
            result = function()
            self.first_says(lambda: None)
            return result
        self.first_says(lambda: None)
        return function()

    def _wait(self, key: str) -> None:
        """Waits until the store has `key`; before the ranks are connected, without a limit, because the first one may
        be preparing data.

        Raises:
            OtherRankEndedError: another rank failed.
        """
        begin, pause = time.monotonic(), SHORTEST_PAUSE
        while not self.store.check([key]):
            self._check_others()
            if self.device is not None and time.monotonic() - begin > self.timeout:
                raise dist.DistStoreError(f"the first process has not answered for {self.timeout:g} s")
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST_PAUSE)

    def _check_others(self) -> None:
        """Raises an OtherRankEndedError if another rank has reported a failure."""
        if self.store.check([ENDED]):
            raise OtherRankEndedError(int(self.store.get(ENDED)))

    # --- the end

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """After an error on several ranks, the first rank reports it, or else the one that has failed."""
        try:
            if error is None or isinstance(error, OtherRankEndedError):
                return
            lost = is_lost(error)
            if lost or not self.first:
                self._wait_for_reason()
            if lost:
                echo_lost(self.rank, error)
                raise SystemExit(1) from None
            with suppress(RuntimeError):
                self.store.set(ENDED, str(exit_code(error)))
            if not self.first and isinstance(error, Exception) and (found := user_error(error)) is not None:
                mute(False)
                echo(f"error: process {self.rank} of {self.size}: {found}")
                raise SystemExit(2) from None
        finally:
            self._close(error is None)

    def _wait_for_reason(self) -> None:
        """Ends quietly if another rank reports the reason of a failure soon."""
        until = time.monotonic() + PATIENCE
        with suppress(RuntimeError):  # the store has ended too
            while time.monotonic() < until:
                self._check_others()
                time.sleep(LONGEST_PAUSE)

    def _close(self, whole: bool) -> None:
        """Leaves the process group. After an error its connections may be gone, and waiting for them would hang."""
        if self.device is not None and whole and not self.joined:
            dist.destroy_process_group()

    # --- results of all ranks

    def connect(self, device: torch.device) -> None:
        if self.device is not None:
            return
        self.device = device
        if not dist.is_initialized():
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(
                backend,
                store=dist.PrefixStore("group", self.store),
                rank=self.rank,
                world_size=self.size,
                timeout=timedelta(seconds=self.timeout),
                device_id=device if device.type == "cuda" else None,
            )
        if self.sharded:
            self._mesh = init_device_mesh(device.type, (self.size,))

    def sum(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor

    def sums(self, scalars: Mapping[str, Tensor]) -> dict[str, Tensor]:
        total = self.sum(torch.stack([value.detach().double() for value in scalars.values()]))
        return {name: part.to(value.dtype) for (name, value), part in zip(scalars.items(), total, strict=True)}

    def gather(self, part: Tensor) -> Tensor:
        whole = part.new_empty(self.size * part.shape[0], *part.shape[1:])
        _gather(whole, part.contiguous())
        return whole

    def from_first(self, tensors: dict[str, dict[str, Tensor]] | None) -> dict[str, dict[str, Tensor]]:
        described = self.first_says(
            lambda: {
                group: [
                    [name, str(value.dtype).removeprefix("torch."), list(value.shape)] for name, value in named.items()
                ]
                for group, named in tensors.items()
            }
        )
        found: dict[str, dict[str, Tensor]] = {}
        for group, values in described.items():
            found[group] = {}
            for name, dtype, shape in values:
                if self.first:
                    sent = tensors[group][name].to(self.device).contiguous()
                else:
                    sent = torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
                dist.broadcast(sent, 0)
                found[group][name] = tensors[group][name] if self.first else sent.cpu()
        return found

    # --- the network

    def distributed(self, module: nn.Module, device: torch.device, blocks: Sequence[nn.ModuleList] = ()) -> nn.Module:
        if not self.sharded:
            # Buffers are equal on all ranks; broadcasting them would send the note dictionary in every step.
            return DistributedDataParallel(module, **{_BUFFERS: False}, gradient_as_bucket_view=True)
        if isinstance(module, FSDPModule):
            return module
        for stack in blocks:
            for index, block in enumerate(stack):
                # The backward pass needs the last block first, so it stays gathered.
                fully_shard(block, mesh=self._mesh, reshard_after_forward=index < len(stack) - 1)
        fully_shard(module, mesh=self._mesh)
        return module

    def accumulating(self, network: nn.Module, last: bool) -> AbstractContextManager[None]:
        if isinstance(network, FSDPModule):
            network.set_requires_gradient_sync(last)
            return nullcontext()
        return nullcontext() if last else network.no_sync()

    # --- sharded tensors

    def local(self, tensor: Tensor) -> Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def full(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def like(self, full: Tensor, other: Tensor) -> Tensor:
        if not isinstance(other, DTensor):
            return full
        return distribute_tensor(full.to(other.device), other.device_mesh, other.placements, src_data_rank=None)

    def full_on_first(self, tensors: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]] | None:
        if not self.sharded:
            return tensors if self.first else None
        found: dict[str, dict[str, Tensor]] = {}
        for group, named in tensors.items():
            known: dict[int, Tensor] = {}  # a tied weight has several names
            found[group] = {}
            for name, tensor in named.items():
                if id(tensor) not in known:
                    whole = self.full(tensor.detach())
                    known[id(tensor)] = whole.cpu() if self.first else _NOTHING
                found[group][name] = known[id(tensor)]
        return found if self.first else None


def is_lost(error: BaseException) -> bool:
    """Returns whether an error says that a connection between the ranks has ended or timed out."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(part in str(error) for part in _LOST)
    )


def exit_code(error: BaseException) -> int:
    """Exit code of a process that ends with this error."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    return 2 if isinstance(error, Exception) and user_error(error) is not None else 1


def echo_lost(rank: int, error: BaseException) -> None:
    first_line = str(error).strip().partition("\n")[0]
    mute(False)
    echo(f"error: process {rank} has lost the others: one was killed, hangs or lost its connection ({first_line})")
