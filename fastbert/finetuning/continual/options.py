"""Methods of training on labels that arrive in rounds, and the options of their replay (arXiv 2305.06408)."""

from dataclasses import dataclass, fields
from typing import Any

from fastbert.errors import OptionError
from fastbert.ranges import Count, NotNegative, Positive, check_values


@dataclass(frozen=True)
class Method:
    """Training of a round: where its weights start, which losses it has, and which old examples it replays."""

    from_last: bool
    """Start from the weights of the round before, not from the pretrained ones."""
    loss: str | None = None
    """Loss of a step with replay (`losses.LOSSES`); None for training on all labelled examples without replay."""
    choice: str = "uniform"
    """Choice of the replayed examples: uniform, interference (MIR) or submodular (SDS2)."""
    uses: tuple[str, ...] = ()
    """Options of the replay that have an effect."""

    @property
    def continual(self) -> bool:
        """True if a round trains on its new examples and a replay, not on all labelled examples."""
        return self.loss is not None


METHODS = {
    "anew": Method(from_last=False),
    "warm": Method(from_last=True),
    "er": Method(True, "er", "uniform", ("replay",)),
    "mir": Method(True, "er", "interference", ("replay", "candidates")),
    "der": Method(True, "der", "uniform", ("replay", "alpha", "beta")),
    "sd": Method(True, "sd", "uniform", ("replay", "alpha")),
    "sds2": Method(True, "sd", "submodular", ("replay", "alpha", "candidates", "entropy_weight", "width")),
}
"""Name -> method. anew and warm are the baselines: training on all labelled examples."""


@dataclass(frozen=True)
class ReplayOptions:
    """Replay of the examples that earlier rounds have labelled; each method uses part of these options."""

    replay: Count | None = None
    """Replayed examples in a step, all of them if there are fewer (default: the batch size)."""
    alpha: NotNegative = 0.5
    """Weight of the distance to the stored logits: alpha of DER, SD and SDS2; at most 1 for SD and SDS2."""
    beta: NotNegative = 0.5
    """Weight of the replayed examples' cross-entropy: beta of DER."""
    candidates: Count = 100
    """Old examples, sampled uniformly in each step, from which MIR and SDS2 choose the replayed ones; at least
    `replay`."""
    entropy_weight: NotNegative = 0.1
    """Weight of the entropies in the function of SDS2: lambda, in units of the number of candidates."""
    width: Positive | None = None
    """Width sigma of the Gaussian kernel of SDS2 (default: the median distance of two candidates)."""

    def __post_init__(self) -> None:
        check_values(self)

    def check(self, name: str) -> None:
        """Checks the values for a method.

        Raises:
            OptionError: alpha of SD and SDS2 is above 1.
        """
        if METHODS[name].loss == "sd" and self.alpha > 1:
            raise OptionError(self, "alpha", f"must be at most 1 for {name}, not {self.alpha:g}")

    def used(self, name: str, batch_size: int) -> dict[str, Any]:
        """The options that have an effect for a method, with the default of `replay` resolved."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["replay"] = self.replay or batch_size
        values["candidates"] = max(self.candidates, values["replay"])
        return {option: values[option] for option in METHODS[name].uses}
