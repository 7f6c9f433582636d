"""The options of `fastbert bench`."""

import os
from dataclasses import dataclass, field

from fastbert.config import MACHINE
from fastbert.errors import UserError, choose
from fastbert.model.positions import POSITIONS
from fastbert.training.options import MachineOptions

PEERS = ("fp32", "bf16", "compiled")


@dataclass(frozen=True)
class BenchThroughputOptions:
    """fastbert's training loop beside transformers' BertForMaskedLM on the same rows: dropout 0.1, 15 % masks, clipping
    and logging on either side. Writes JSON and a table."""

    data: str = "sotu"
    """A prepared folder, or a source to prepare first."""
    vocab_size: int = 8192
    """Words of the tokenizer that is trained where --data is a source."""
    layers: int = 4
    """Transformer blocks."""
    width: int = 256
    """Hidden size; heads of 64, feed-forward layers of 4 times the width."""
    length: int = 128
    """Tokens in a sequence."""
    batch_size: int = 64
    """Sequences in a step."""
    positions: str = "absolute,tupe-r"
    """fastbert's position schemes; the peer is held against each, and each against the first."""
    peers: str | None = None
    """transformers' in fp32, in bf16 (autocast), and compiled (in bf16), with commas between, or none (default:
    fp32,bf16 on a CPU, bf16,compiled on a GPU)."""
    rounds: int = 5
    """In each, every contestant trains for --seconds; the median, the least and the most are shown."""
    seconds: float = 4.0
    """Of training in a round, at least one step."""
    machine: MachineOptions = field(default_factory=MachineOptions, metadata=MACHINE)
    """Of fastbert's contestants; the peer takes its device and threads."""
    out: str = "bench/throughput"
    """Folder for the results."""
    json: bool = False
    """One JSON object on standard output instead of the table."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "layers", "width", "batch_size", "rounds"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.length < 2:
            raise UserError(f"length must be at least 2, not {self.length}")
        if not self.seconds > 0:
            raise UserError(f"seconds must be above 0, not {self.seconds}")
        for position in self.schemes:
            choose("position scheme", position, POSITIONS)
        for peer in self.chosen_peers or ():
            choose("peer", peer, PEERS)

    @property
    def schemes(self) -> list[str]:
        return [name.strip() for name in self.positions.split(",")]

    @property
    def chosen_peers(self) -> list[str] | None:
        """None: the default, which depends on the device."""
        if self.peers is None:
            return None
        return [] if self.peers == "none" else [name.strip() for name in self.peers.split(",")]


@dataclass(frozen=True)
class BenchDataOptions:
    """Preparing text beside the tokenizers library, and drawing batches beside a training step of a 4 x 256 encoder.
    Writes JSON and a table."""

    data: str = "sotu"
    """Where the text is, as for fastbert prepare --source."""
    megabytes: float = 60.0
    """How much of it is used, if it has more."""
    vocab_size: int = 8192
    """Words of the tokenizer, trained on the text first."""
    length: int = 128
    """Tokens in a sequence."""
    batch_size: int = 64
    """Sequences in a step."""
    rounds: int = 5
    """In each, every contestant runs once; the median, the least and the most are shown."""
    workers: int = 0
    """Processes and threads that tokenize; 0 is one for each core."""
    out: str = "bench/data"
    """Folder for the results."""
    json: bool = False
    """One JSON object on standard output instead of the table."""

    def __post_init__(self) -> None:
        for name, least in (("rounds", 1), ("vocab_size", 1), ("length", 2), ("batch_size", 1), ("workers", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if not self.megabytes > 0:
            raise UserError(f"megabytes must be above 0, not {self.megabytes}")

    @property
    def cores(self) -> int:
        return self.workers or len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class BenchKernelsOptions:
    """The kernels beside their peers: on a GPU with what PyTorch and its compiler have, on a CPU with PyTorch's own
    attentions. Writes JSON, tables and pictures."""

    out: str = "bench/kernels"
    """Folder for the results."""
    compile_only: bool = False
    """Compile every kernel and configuration for GPUs of capability 8.0, 9.0 and 10.0, which need not be there, and
    list what they take: registers, spills, shared memory, tensor-core instructions."""
    tune: bool = False
    """Check and time every configuration on this GPU, and keep the fastest for trainings on it."""
    seconds: float = 480.0
    """No new case is begun after this."""
    rounds: int = 20
    """Timed rounds of each case; their median, least and most are shown."""
    json: bool = False
    """One JSON object on standard output instead of the tables."""

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise UserError(f"rounds must be at least 1, not {self.rounds}")
        if not self.seconds > 0:
            raise UserError(f"seconds must be above 0, not {self.seconds}")
        if self.compile_only and self.tune:
            raise UserError("give --compile-only or --tune, not both")
