"""What the ranks of test_parallel.py do: each case is trained on all of them, and in one process."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastbert.config import from_dict
from fastbert.pretraining.options import PretrainOptions
from fastbert.pretraining.setup import PretrainSetup, prepare_setup
from fastbert.training.parallel import Ranks, start
from fastbert.training.step import objective_step
from fastbert.training.world import ONE_PROCESS, World


class LocalCounts(Ranks):
    """Negative control: each rank divides by the counts of its own rows."""

    def sums(self, scalars: dict[str, Tensor]) -> dict[str, Tensor]:
        summed = super().sums(scalars)
        return summed if "loss" in scalars else {name: value * self.size for name, value in scalars.items()}


class OwnNotes(Ranks):
    """Negative control: each rank writes the notes of its own rows."""

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.ndim == 2 else super().sum(tensor)


CONTROLS = {"local counts": LocalCounts, "own notes": OwnNotes}


def trained(setup: PretrainSetup, world: World, case: dict[str, Any]) -> dict[str, Tensor] | None:
    """Weights, notes, moments, scalars of the steps and figures of a validation; None on all ranks but the first."""
    setup = replace(setup, world=world)
    objective = setup.objective().train()
    if case["double"]:
        objective = objective.double()
    updater, batches = setup.updater(objective), setup.batches()
    if case["double"] and case["optimizer"] == "muon":
        updater.optimizer.dtype = torch.float64
    found: dict[str, Any] = {}
    for step in range(setup.options.steps):
        scalars = objective_step(updater, batches.at(step), setup.options.seed, step, case["rate"])
        found |= {f"{name} of step {step}": value.double() for name, value in scalars.items()}
    for name, value in setup.validate(objective)["new"].items():
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
    """The largest difference, relative to the largest value of the same tensor, and the name of the tensor."""
    assert ranks.keys() == alone.keys()
    found = {}
    for name, value in alone.items():
        value, other = value.detach().double(), ranks[name].detach().double()
        assert value.isfinite().all() and value.shape == other.shape, name
        found[name] = ((value - other).abs().max() / value.abs().max().clamp(min=1e-9)).item() if value.numel() else 0.0
    name = max(found, key=found.get)
    return found[name], name


def compare(cases: dict[str, dict[str, Any]], folder: str) -> None:
    """Trains all cases on all ranks, then each in one process, a part of them on every rank. Writes the distances to
    distances-0.json and so on in `folder`."""
    saved = {name: Path(folder) / f"{number}.safetensors" for number, name in enumerate(cases)}
    with start(60.0) as world:
        for name, case in cases.items():
            setup = prepare_setup(from_dict(PretrainOptions, case["options"], name))
            given = {"timeout": 60.0, "store": world.store, "messages": world.messages}
            kind = CONTROLS.get(case["control"], Ranks)
            ranks = kind(world.rank, world.size, world.local_rank, case["shard"], **given)
            ranks.connect(setup.device)
            together = trained(setup, ranks, case)
            if world.first:
                save_file({key: value.detach().clone() for key, value in together.items()}, saved[name])
        world.connect(setup.device)
        world.first_decides(lambda: None)
        groups: dict[str, list[str]] = {}  # DDP and FSDP2 are compared with the same training
        for name, case in cases.items():
            groups.setdefault(json.dumps([case["options"], case["double"]]), []).append(name)
        found = {}
        for names in list(groups.values())[world.rank :: world.size]:
            case = cases[names[0]]
            setup = prepare_setup(from_dict(PretrainOptions, case["options"], names[0]))
            alone = trained(setup, ONE_PROCESS, case)
            found |= {name: distance(load_file(saved[name]), alone) for name in names}
        (Path(folder) / f"distances-{world.rank}.json").write_text(json.dumps(found))
