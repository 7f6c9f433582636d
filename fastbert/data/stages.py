"""Sequence length and batch size of each optimizer step, which may change during a run.

There are two such schedules: short sequences first and long ones at the end, as in BERT, and a growing batch. Both are
converted before the first step to a list of stages, from the options and the number of steps alone, so the batch of a
step does not depend on where a run was resumed.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

from fastbert.errors import OptionError, UserError
from fastbert.ranges import LARGEST, Count, Fraction, Length, Range, check_values

GROWTH_STAGES = 8  # maximum number of stages in which the batch grows
NOMINAL_STEPS = 10**6  # assumed for a run whose number of steps is not known yet


@dataclass(frozen=True)
class StageOptions:
    """Short sequences and small batches at the beginning of a run."""

    first_length: Length | None = None
    """Sequence length in the first part of the run, before --length (BERT: 128, then 512). A step then has more
    sequences, so that its number of tokens is the same."""
    first_fraction: Fraction = 0.9
    """Fraction of the steps with the first sequence length."""
    first_offset: bool = False
    """The positions of the short sequences have an offset, a random one in each step, so that all positions of --length
    are trained. [CLS] keeps position 0."""
    initial_batch_size: Count | None = None
    """Sequences per step at the beginning; the batch then grows to --batch-size in equal increments."""
    batch_warmup: Annotated[float, Range(above=0, most=LARGEST)] = 0.1
    """Duration of the batch growth: a fraction of all steps if below 1, otherwise a number of steps."""

    def __post_init__(self) -> None:
        check_values(self)
        warmup = self.batch_warmup
        if warmup >= 1 and warmup != int(warmup):
            problem = f"must be a fraction of the steps in (0, 1) or a whole number of steps, not {warmup}"
            raise OptionError(self, "batch_warmup", problem)

    def inactive(self) -> set[str]:
        """Names of the options without effect."""
        first = {"first_length", "first_fraction"} if self.first_length is None else set()
        if not self.first_offset:
            first.add("first_offset")
        return first | ({"initial_batch_size", "batch_warmup"} if self.initial_batch_size is None else set())

    def check(self, batch_size: int, length: int) -> None:
        """Raises a UserError if the first length or batch is not smaller than the final one, or does not divide it, or
        if there is an offset without a first length."""
        first, start = self.first_length, self.initial_batch_size
        if first is None and self.first_offset:
            raise UserError("first_offset has no effect without first_length; add --first-length or --no-first-offset")
        if first is not None and first >= length:
            raise UserError(
                f"first_length {first} is not shorter than length {length}: sequences only grow during a run; give the "
                "longest as --length and the shorter one as --first-length"
            )
        if start is not None and (start >= batch_size or batch_size % start):
            raise UserError(
                f"initial_batch_size {start} does not divide batch_size {batch_size}, and the batch grows in multiples "
                "of its initial size; give a smaller number that divides it"
            )
        if first is not None and (start or batch_size) * length % first:
            raise UserError(
                f"{start or batch_size} sequences of {length} tokens cannot be cut into whole sequences of {first}; "
                "choose a first_length that divides length"
            )

    @property
    def least_steps(self) -> int:
        """Number of steps of the shortest possible run."""
        return int(self.batch_warmup) if self.initial_batch_size is not None and self.batch_warmup >= 1 else 1


@dataclass(frozen=True)
class Stage:
    """Consecutive steps with the same batch size and length."""

    first: int
    """First step."""
    batch_size: int
    """Sequences in a step."""
    length: int
    """Tokens in a sequence."""
    largest_offset: int = 0
    """Largest offset of the positions."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.batch_size, self.length

    @property
    def tokens(self) -> int:
        """Tokens in a step."""
        return self.batch_size * self.length


@dataclass(frozen=True)
class BatchPlan:
    """Stages of a run. The first starts at step 0; the last is open-ended."""

    stages: tuple[Stage, ...]

    @classmethod
    def constant(cls, batch_size: int, length: int) -> "BatchPlan":
        return cls((Stage(0, batch_size, length),))

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Distinct sequence lengths, in the order of the run."""
        return tuple(dict.fromkeys(stage.length for stage in self.stages))

    def spans(self, start: int, stop: int) -> Iterator[tuple[Stage, int]]:
        """Stages with steps in start ... stop - 1, and the number of these steps."""
        ends = [*(stage.first for stage in self.stages[1:]), stop]
        for stage, end in zip(self.stages, ends, strict=True):
            if (count := min(stop, end) - max(start, stage.first)) > 0:
                yield stage, count

    def at(self, step: int) -> Stage:
        return next(stage for stage, _ in self.spans(step, step + 1))

    def tokens(self, start: int, stop: int) -> int:
        """Tokens in the steps start ... stop - 1."""
        return sum(stage.tokens * count for stage, count in self.spans(start, stop))

    def sequences_before(self, step: int) -> int:
        """Number of sequences with the length of `step` that the steps before it used."""
        length = self.at(step).length
        return sum(stage.batch_size * count for stage, count in self.spans(0, step) if stage.length == length)

    def sequences(self, steps: int) -> dict[int, int]:
        """Length -> number of sequences of this length in the first `steps` steps."""
        found = dict.fromkeys(self.lengths, 0)
        for stage, count in self.spans(0, steps):
            found[stage.length] += stage.batch_size * count
        return found

    def total(self, cost: Callable[[int, int], float], start: int, stop: int) -> float:
        """Total cost of the steps start ... stop - 1; `cost(batch_size, length)` is the cost of one step."""
        return sum(cost(*stage.shape) * count for stage, count in self.spans(start, stop))

    def describe(self, steps: int) -> str:
        """Description such as "1000 steps: 900 of 256 x 128 tokens, 100 of 64 x 512 tokens"."""
        parts = [(count, f"of {stage.batch_size} x {stage.length} tokens") for stage, count in self.spans(0, steps)]
        if len(parts) == 1:
            return f"{steps} steps {parts[0][1]}"
        return f"{steps} steps: " + ", ".join(f"{count} {what}" for count, what in parts)


def make_plan(options: StageOptions, batch_size: int, length: int, steps: int) -> BatchPlan:
    """Builds the plan of a run of `steps` steps.

    A batch that grows from b to B = k b sequences has n = min(k - 1, 8) sizes before B, each for an n-th of the
    warm-up: b (1 + (k - 1) i // n) for i = 0 ... n - 1. The first fraction of the steps has sequences of the first
    length; such a step has batch x length / first length sequences, so its number of tokens is the same. With
    first_offset its positions have an offset of at most length - first length.

    Raises:
        UserError: the growth of the batch takes longer than the run.
    """
    sizes = growth(options, batch_size, steps)
    lengths = [(0, length)]
    if options.first_length is not None and steps > 1:
        lengths = [(0, options.first_length), (min(max(round(options.first_fraction * steps), 1), steps - 1), length)]
    stages = []
    for first in sorted({begin for begin, _ in (*sizes, *lengths)}):
        size, tokens = (max(pair for pair in pairs if pair[0] <= first)[1] for pairs in (sizes, lengths))
        offset = length - tokens if options.first_offset else 0
        stages.append(Stage(first, size * length // tokens, tokens, offset))
    return BatchPlan(tuple(stages))


def growth(options: StageOptions, batch_size: int, steps: int) -> list[tuple[int, int]]:
    """Pairs (first step, sequences of the final length per step), in order."""
    if options.initial_batch_size is None:
        return [(0, batch_size)]
    warmup = int(options.batch_warmup) if options.batch_warmup >= 1 else round(options.batch_warmup * steps)
    if warmup > steps:
        raise UserError(
            f"the batch grows for {warmup} steps, longer than the run of {steps}; lower --batch-warmup or raise --steps"
        )
    times = batch_size // options.initial_batch_size
    count = min(times - 1, GROWTH_STAGES)
    # If several stages begin at the same step, only the last one has steps.
    begins = {
        warmup * i // count: options.initial_batch_size * (1 + (times - 1) * i // count) for i in range(count + 1)
    }
    return list(begins.items())


def all_shapes(options: StageOptions, batch_size: int, length: int) -> set[tuple[int, int]]:
    """All possible (sequences in a step, tokens in a sequence), for any number of steps."""
    sizes = [size for _, size in growth(options, batch_size, NOMINAL_STEPS)]
    return {(size * length // tokens, tokens) for size in sizes for tokens in (options.first_length or length, length)}


def steps_within(budget: float, cost: Callable[[int], float], least: int) -> int:
    """Largest number of steps that costs no more than `budget`, but at least `least`.

    Args:
        cost: number of steps -> cost of a run; increasing.
        least: steps of the shortest run.
    """
    most = 2 * least
    while cost(most) <= budget:
        most *= 2
    return max(least, least - 1 + bisect_right(range(least, most), budget, key=cost))
