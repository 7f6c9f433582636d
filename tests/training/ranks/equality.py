"""Program for several processes: trains each case on all ranks and, on the first one, in one process; prints how far
they are apart. Started by tests/training/test_parallel.py with torchrun.

    equality.py CASES.json RESULTS.json
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastbert.config import from_dict
from fastbert.pretraining.options import PretrainOptions
from fastbert.pretraining.setup import PretrainSetup, prepare_setup
from fastbert.training.parallel import Ranks, start
from fastbert.training.step import objective_step
from fastbert.training.world import ONE_PROCESS, World


def trained(setup: PretrainSetup, world: World, double: bool, steps: int, rate: float) -> dict[str, Tensor] | None:
    """Weights, notes, moments, scalars of the steps and figures of a validation, on the first rank."""
    setup = replace(setup, world=world)
    objective = setup.objective().train()
    if double:
        objective = objective.double()
    updater, batches = setup.updater(objective), setup.batches()
    if double and hasattr(updater.optimizer, "dtype"):
        updater.optimizer.dtype = torch.float64
    found: dict[str, Any] = {}
    for step in range(steps):
        scalars = objective_step(updater, batches.at(step), setup.options.seed, step, rate, {})
        found |= {f"{name} of step {step}": value.double() for name, value in scalars.items()}
    for name, value in setup.validate(objective).items():
        found[f"{name} of a validation"] = torch.tensor(value, dtype=torch.float64)
    moments = {
        f"{key} of {name}": value
        for group in updater.optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
        for key, value in updater.optimizer.state[parameter].items()
    }
    whole = world.full_on_first({"model": objective.state_dict(keep_vars=True), "moments": moments})
    return None if whole is None else found | whole["model"] | whole["moments"]


def distance(ranks: dict[str, Tensor], alone: dict[str, Tensor]) -> tuple[float, str]:
    """The largest difference, relative to the largest value of the same tensor, and its name."""
    assert ranks.keys() == alone.keys(), ranks.keys() ^ alone.keys()
    found = {}
    for name, value in alone.items():
        value, other = value.detach().double(), ranks[name].detach().double()
        assert value.isfinite().all() and value.shape == other.shape, name
        found[name] = ((value - other).abs().max() / value.abs().max().clamp(min=1e-9)).item() if value.numel() else 0.0
    name = max(found, key=found.get)
    return found[name], name


class LocalCounts(Ranks):
    """Negative control: each rank divides by its own counts, and the ranks take the mean."""

    def sums(self, scalars: dict[str, Tensor]) -> dict[str, Tensor]:
        summed = super().sums(scalars)
        return summed if "loss" in scalars else {name: value * self.size for name, value in scalars.items()}


class OwnNotes(Ranks):
    """Negative control: each rank writes the notes of its own rows."""

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.ndim == 2 else super().sum(tensor)


def main() -> None:
    torch.set_num_threads(1)
    cases, results = json.loads(Path(sys.argv[1]).read_text()), {}
    with start(60.0) as world:
        for name, case in cases.items():
            setup = prepare_setup(from_dict(PretrainOptions, case["options"], name))
            kind = {"local counts": LocalCounts, "own notes": OwnNotes}.get(case.get("control"), Ranks)
            shared = {"timeout": 60.0, "store": world.store, "said": world.said}
            ranks = kind(world.rank, world.size, world.local_rank, case["shard"] != "none", **shared)
            ranks.connect(setup.device)
            arguments = (case["double"], case["steps"], case["rate"])
            together = trained(setup, ranks, *arguments)
            if world.first:
                results[name] = distance(together, trained(setup, ONE_PROCESS, *arguments))
                print(name, results[name], flush=True)
    if world.first:
        Path(sys.argv[2]).write_text(json.dumps(results))


main()
