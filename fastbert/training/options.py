"""Options of the optimizer, the learning rate schedule and the machine."""

import re
from dataclasses import dataclass
from typing import Annotated

from fastbert.config import choice
from fastbert.errors import OptionError, choose
from fastbert.ranges import (
    LARGEST,
    Count,
    NotNegative,
    Part,
    Positive,
    Probability,
    Range,
    Rate,
    Workers,
    check_values,
)
from fastbert.registry import Registry, Variant

# name -> function (parameter groups, options, device) -> optimizer for `guarded_step`
OPTIMIZERS = Registry(
    {
        "adamw": "fastbert.training.optimizers:build_adamw",
        "muon": Variant("fastbert.training.optimizers:build_muon", uses=("momentum",)),
        "lamb": "fastbert.training.optimizers:build_lamb",
    }
)
PRECISIONS = ("auto", "fp32", "bf16")
SCHEDULES = ("linear", "cosine", "constant", "wsd")
COOLDOWNS = ("cosine", "inverse-root")
Steps = Annotated[float, Range(0, LARGEST)]
"""A fraction of all steps if below 1, otherwise a number of steps."""


@dataclass(frozen=True)
class OptimizerOptions:
    """The optimizer and its constants."""

    name: str = choice("adamw", OPTIMIZERS, "optimizer")
    """Optimizer: adamw (arXiv 1711.05101), muon (arXiv 2502.16982) for the matrices of the blocks and TUPE's two
    projections with adamw for the rest, or lamb (arXiv 1904.00962) for large batches."""
    learning_rate: Positive = 1e-4
    """Peak learning rate, scaled by the schedule. Muon's updates are as large as adamw's, so one rate suits both."""
    momentum: Rate = 0.95
    """Decay of the running mean of the gradient of muon's matrices."""
    beta1: Rate = 0.9
    """Decay of the running mean of the gradient."""
    beta2: Rate = 0.999
    """Decay of the running mean of the squared gradient."""
    eps: Positive = 1e-6
    """Constant added to the root of the second moment."""
    weight_decay: NotNegative = 0.01
    """Decoupled weight decay; vectors (biases, LayerNorm weights) are never decayed."""
    clip_norm: NotNegative = 1.0
    """Largest norm of the whole gradient; 0 disables clipping."""

    def __post_init__(self) -> None:
        check_values(self)

    def inactive(self) -> set[str]:
        """Names of the options without effect."""
        return OPTIMIZERS.unused(self.name)


@dataclass(frozen=True)
class PretrainOptimizerOptions(OptimizerOptions):
    """The optimizer and its constants."""

    keep: bool = False
    """Start with the moments and step counters of the run or checkpoint of --init-from, which must have the same
    objective, optimizer and parameters; the moments of new words are zero. Otherwise the optimizer is fresh."""

    def inactive(self) -> set[str]:
        return super().inactive() | (set() if self.keep else {"keep"})


@dataclass(frozen=True)
class ScheduleOptions:
    """Learning rate schedule, as a fraction of the peak."""

    name: str = choice("linear", SCHEDULES, "schedule")
    """Shape after the warm-up: linear, cosine, constant, or wsd (stable, then decay; arxiv.org/abs/2404.06395)."""
    warmup: Steps = 0.06
    """Linear warm-up: a fraction of all steps if below 1, otherwise a number of steps."""
    final: Probability = 0.0
    """Fraction of the peak reached at the end (linear, cosine, and the decay of wsd)."""
    decay: Probability = 0.2
    """Length of wsd's linear decay as a fraction of all steps."""

    def __post_init__(self) -> None:
        check_values(self)
        self.check_steps("warmup")

    def check_steps(self, *names: str) -> None:
        """Raises a UserError if one of the options `names` is neither a fraction nor a whole number of steps."""
        for name in names:
            value = getattr(self, name)
            if value >= 1 and value != int(value):
                problem = f"must be a fraction of the steps in [0, 1) or a whole number of steps, not {value}"
                raise OptionError(self, name, problem)

    @property
    def minimum(self) -> float:
        """Fraction of the peak at the end."""
        return self.final

    def inactive(self) -> set[str]:
        """Names of the options without effect."""
        names = {"decay"} if self.name != "wsd" else set()
        return names | ({"final"} if self.name == "constant" else set())


@dataclass(frozen=True)
class PretrainScheduleOptions(ScheduleOptions):
    """Learning rate schedule, as a fraction of the peak (--optimizer.learning-rate)."""

    name: str = choice("linear", (*SCHEDULES, "infinite"), "schedule")
    """Shape after the warm-up: linear, cosine, constant, wsd (stable, then decay; arxiv.org/abs/2404.06395), or
    infinite (cooldown to a constant rate, then a short annealing; arxiv.org/abs/2403.08763): the run can be lengthened
    (--resume with more --steps) until its annealing begins, and annealed from any checkpoint before it (--branch)."""
    warmup: Steps = 0.01
    """Linear warm-up: a fraction of all steps if below 1, otherwise a number of steps."""
    final: Probability | None = None
    """Fraction of the peak reached at the end (linear, cosine, the decay of wsd, the annealing of infinite). Default:
    0; 0.1 for infinite, whose annealing is exponential and does not reach 0."""
    cooldown: Steps = 0.6
    """Length of infinite's cooldown from the peak to the constant rate: a fraction of all steps if below 1, otherwise a
    number of steps. Fractions of infinite (warm-up, cooldown, annealing) become numbers of steps when a run starts."""
    cooldown_shape: str = choice("cosine", COOLDOWNS)
    """Shape of infinite's cooldown: cosine, or inverse-root, which falls faster at the beginning."""
    constant: Part = 0.55
    """Constant rate of infinite, as a fraction of the peak."""
    annealing: Annotated[float, Range(above=0, most=LARGEST)] = 0.1
    """Length of infinite's exponential annealing at the end: a fraction of all steps if below 1, otherwise a number of
    steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_steps("cooldown", "annealing")
        if self.name != "infinite":
            return
        if self.final == 0:
            problem = "must be greater than 0 for infinite, whose annealing is exponential; leave it out for 0.1"
            raise OptionError(self, "final", problem)
        if self.minimum > self.constant:
            problem = f"must not be greater than the constant rate, {self.constant:g} of the peak, not {self.minimum:g}"
            raise OptionError(self, "final", problem)

    @property
    def minimum(self) -> float:
        """Fraction of the peak at the end."""
        return (0.1 if self.name == "infinite" else 0.0) if self.final is None else self.final

    def inactive(self) -> set[str]:
        """Names of the options without effect."""
        infinite = {"cooldown", "cooldown_shape", "constant", "annealing"} if self.name != "infinite" else set()
        return super().inactive() | infinite


@dataclass(frozen=True)
class MachineOptions:
    """Options that change speed and memory, but not the result beyond rounding."""

    device: str = "auto"
    """Device: auto (a GPU if there is one), cpu, cuda, or cuda:N."""
    precision: str = choice("auto", PRECISIONS)
    """Precision: auto (bf16 if the machine supports it in hardware), fp32, or bf16 (autocast; weights and optimizer
    state remain fp32)."""
    threads: Workers = 0
    """Number of CPU threads per operation; 0: torch's default."""
    micro_batch_size: Count | None = None
    """Sequences in one forward pass; gradients are accumulated over the batch. Default: the whole batch."""
    kernels: str = choice("auto", ("auto", "reference"))
    """Kernels of attention, loss and sampling: auto (the fastest on this machine) or reference (plain PyTorch)."""

    def __post_init__(self) -> None:
        check_values(self)
        if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,4})?", self.device):
            choose("device", self.device, ("auto", "cpu", "cuda", "cuda:0"))


@dataclass(frozen=True)
class TrainingMachineOptions(MachineOptions):
    """Machine options of jobs that train."""

    apex: bool = False
    """Use NVIDIA apex's FusedAdam for adamw, on a GPU; an error if apex or its CUDA extensions are missing."""
    timeout: Positive = 600.0
    """Seconds that each of several processes (torchrun, Ray) waits for the others before it ends with an error."""
