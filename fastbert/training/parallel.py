"""Several processes (ranks) that train one model together, on torch.distributed: each computes its rows of the global
batch. This is the only module that imports torch.distributed.

    DDP     (default) every rank has all weights; gradients are summed while the backward pass runs
    FSDP2   (machine.shard blocks) every rank holds a part of each weight, gradient and moment, and gathers the weights
            of a block when it is computed

The ranks meet at the store of their launcher. The first one decides and writes files, and the others wait for its words
(`first_decides`). The process group for tensors, NCCL on GPUs and Gloo on CPUs, starts only once the data is prepared.

If a rank fails, the others notice that its connection is closed, and end with its exit code, which it has left in the
store. If there is none, it was killed, and one of them reports that.
"""

import inspect
import itertools
import math
import os
import re
import secrets
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

from fastbert.errors import UserError
from fastbert.records import json_text, parse_json
from fastbert.streams import echo, mute
from fastbert.system_errors import user_error
from fastbert.training.interrupts import Interrupts
from fastbert.training.world import World

Result = TypeVar("Result")

RESTARTED = "restarted"  # key of the number of processes that were restarted after a failure
ENDED = "ended"  # key of the exit code of the first rank that failed
PATIENCE = 5.0  # seconds for the first rank to report the same error as another one
READY = 60.0  # seconds, at least, between the setup of the first rank and that of the last
ARRIVAL = 1.0  # seconds for an exit code to arrive at the store after the connection was closed
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
    if dist.is_initialized():
        store, rank, size = dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size()
    else:
        store, rank, size = _launcher_store(timeout)
    if rank > 0:
        mute()
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    shared = dist.PrefixStore("fastbert", store)
    own = dist.PrefixStore(_meet(shared, rank, size, max(READY, timeout)), shared)
    # A machine whose processes have not failed does not count the restart.
    again = rank == 0 and own.add(RESTARTED, _restarted()) > 0
    return Ranks(rank, size, local_rank, shard != "none", again, own, timeout)


def _meet(store: dist.Store, rank: int, size: int, timeout: float) -> str:
    """A new name that only these processes know. Restarted processes find the store of those before them, whose words
    they must not read, and the machines of one run may count different numbers of restarts.

    Raises:
        UserError: a process is missing.
    """
    own, until = secrets.token_hex(8), time.monotonic() + timeout
    store.set(f"hello/{rank}", own)
    while time.monotonic() < until:
        if rank > 0 and store.check([f"welcome/{own}"]):
            name = store.get(f"welcome/{own}").decode()
            store.add(f"{name}/{RESTARTED}", _restarted())
            store.add(f"met/{name}", 1)
            return name
        if rank == 0:
            for other in range(1, size):  # again and again: the first ones may be those of processes before
                if store.check([f"hello/{other}"]):
                    store.set(f"welcome/{store.get(f'hello/{other}').decode()}", own)
            if store.add(f"met/{own}", 0) == size - 1:
                return own
        time.sleep(LONGEST_PAUSE / 5)
    raise UserError(
        f"not all {size} processes have started after {timeout:g} s; start all of them with torchrun, or set a longer "
        "--machine.timeout"
    )


def _restarted() -> bool:
    """Returns whether torchrun has restarted the processes of this machine after a failure."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def _launcher_store(timeout: float) -> tuple[dist.Store, int, int]:
    """Store of the launcher, rank and number of processes.

    Raises:
        UserError: it cannot be reached.
    """
    try:
        return next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=timeout))))
    except (dist.DistError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"process {os.environ['RANK']} cannot reach its launcher at {where} ({_first_line(error)}); start all "
            "processes with torchrun, and check that the machines reach each other"
        ) from None


@dataclass(eq=False)
class Ranks(World):
    """One of several processes."""

    store: dist.Store | None = None
    timeout: float = 600.0
    messages: Iterator[int] = field(default_factory=itertools.count)
    """Numbers of the messages of the first rank."""
    device: torch.device | None = None
    """Set by `connect`."""
    own_group: bool = False
    """The process group was started here, and not by a launcher."""
    _words: Any = field(default=None, repr=False)
    """Process group for the words of the first rank, on CPUs; the default one if None."""
    _mesh: Any = field(default=None, repr=False)

    # --- the store

    def first_decides(self, function: Callable[[], Any]) -> Any:
        word = json_text(function()) if self.first else ""
        return parse_json(self._word(word), "the word of the first process")

    def _word(self, word: str) -> str:
        """The `word` of the first rank, from the store. Once the ranks are connected it is sent by Gloo, because the
        store does not notice that the first process was killed."""
        if self.device is None:
            key = f"messages/{next(self.messages)}"
            if self.first:
                self.store.set(key, word)
            else:
                self._wait(lambda: self.store.check([key]))
            return self.store.get(key).decode()
        data = torch.frombuffer(bytearray(word.encode() or b" "), dtype=torch.uint8)
        size = torch.tensor([len(data)])
        dist.broadcast(size, 0, group=self._words)
        data = data if self.first else torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(data, 0, group=self._words)
        return data.numpy().tobytes().decode()

    def first_before_others(self, function: Callable[[], Result]) -> Result:
        if self.first:
            result = function()
            self.first_decides(lambda: None)
            return result
        self.first_decides(lambda: None)
        return function()

    def _wait(self, arrived: Callable[[], bool], timeout: float = math.inf) -> None:
        """Waits until `arrived()`, by default without a limit, because the first rank may be preparing data.

        Raises:
            OtherRankEndedError: another rank failed.
        """
        begin, pause = time.monotonic(), SHORTEST_PAUSE
        while not arrived():
            self._check_others()
            if time.monotonic() - begin > timeout:
                raise dist.DistStoreError(f"not all processes are ready after {timeout:g} s")
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST_PAUSE)

    def _check_others(self) -> None:
        """Raises an OtherRankEndedError if another rank has reported a failure."""
        if self.store.check([ENDED]):
            raise OtherRankEndedError(int(self.store.get(ENDED)))

    # --- the end

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """After an error on several ranks, the first rank reports it, or else the one that has failed."""
        if error is None:
            if self.own_group:
                dist.destroy_process_group()
        elif not isinstance(error, OtherRankEndedError):
            # After an error the process group is not left: its connections may be gone, and waiting for them would
            # hang. A launcher ends the others at once by SIGTERM, which must not suppress the report.
            with Interrupts():
                self._lost(error) if is_lost(error) else self._failed(error)

    def _lost(self, error: BaseException) -> None:
        """Ends after a lost connection, with the exit code of the rank that has failed, if it has left one; otherwise
        one rank reports the loss."""
        with suppress(RuntimeError):  # the store may have ended too
            self._wait_for_reason(ARRIVAL)
            if self.store.add("lost", 1) > 1:
                raise SystemExit(1) from None
        mute(False)
        echo(
            f"error: process {self.rank} has lost the others: one was killed, hangs or lost its connection "
            f"({_first_line(error)}); start them again, a run with --resume"
        )
        raise SystemExit(1) from None

    def _failed(self, error: BaseException) -> None:
        """Leaves the exit code of an error to the others; reports a user error that the first rank does not have."""
        if not self.first:  # sooner than the others lose their patience
            self._wait_for_reason(min(PATIENCE, self.timeout / 4))
        with suppress(RuntimeError):
            self.store.set(ENDED, str(exit_code(error)))
        if not self.first and isinstance(error, Exception) and (found := user_error(error)) is not None:
            mute(False)
            echo(f"error: process {self.rank} of {self.size}: {found}")
            raise SystemExit(2) from None

    def _wait_for_reason(self, seconds: float) -> None:
        """Raises an OtherRankEndedError if another rank reports a failure within this time."""
        until = time.monotonic() + seconds
        with suppress(RuntimeError):  # the store has ended too
            while time.monotonic() < until:
                self._check_others()
                time.sleep(LONGEST_PAUSE)

    # --- results of all ranks

    def connect(self, device: torch.device) -> None:
        if self.device is not None:
            return
        timeout = timedelta(seconds=self.timeout)
        self.store.add("ready", 1)
        # A rank that fails before this would not be noticed by those that wait for it in torch.
        self._wait(lambda: self.store.add("ready", 0) >= self.size, max(READY, self.timeout))
        if not dist.is_initialized():
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=dist.PrefixStore("group", self.store),
                rank=self.rank,
                world_size=self.size,
                timeout=timeout,
                device_id=device if device.type == "cuda" else None,
            )
            self.own_group = True
        if dist.get_backend() != "gloo":
            self._words = dist.new_group(backend="gloo", timeout=timeout)
        self.device = device
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
        described = self.first_decides(
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

    def distributed(
        self,
        module: nn.Module,
        device: torch.device,
        blocks: Sequence[nn.ModuleList] = (),
        partly_used: bool = False,
    ) -> nn.Module:
        if not self.sharded:
            # Buffers are equal on all ranks; broadcasting them would send the note dictionary in every step.
            settings = {_BUFFERS: False, "find_unused_parameters": partly_used}
            return DistributedDataParallel(module, **settings, gradient_as_bucket_view=True)
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
    """Returns whether an error means that a connection between the ranks has ended or timed out."""
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


def _first_line(error: BaseException) -> str:
    """The message, without the source file that PyTorch names first and the advice that follows."""
    return re.sub(r"^\[\S+\] ", "", str(error).strip().partition("\n")[0]).partition(". ")[0]
