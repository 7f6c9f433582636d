"""The interface for several processes: ranks that each compute their rows give the same step, notes and validation as
one process, up to the order of sums. The ranks are threads."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fastbert.config import from_dict
from fastbert.data.batches import InMemory, PackedRows, validation_batches
from fastbert.pretraining.options import PretrainOptions
from fastbert.pretraining.setup import PretrainSetup, prepare_setup
from fastbert.training.step import objective_step
from fastbert.training.world import World


class Room:
    """Communication between the ranks of a world."""

    def __init__(self, size: int) -> None:
        self.barrier, self.shared = threading.Barrier(size, timeout=60), [None] * size


@dataclass(frozen=True)
class ThreadWorld(World):
    room: Room | None = None

    def sum(self, tensor: Tensor) -> Tensor:
        self.room.shared[self.rank] = tensor.detach().clone()
        self.room.barrier.wait()
        total = sum(self.room.shared)
        self.room.barrier.wait()
        return tensor.detach().copy_(total)


def trained(setup: PretrainSetup, world: World) -> dict[str, Tensor]:
    """Weights, notes, scalars of the steps and figures of a validation, after three steps."""
    setup.world = world
    objective = setup.objective().train()
    updater, batches = setup.updater(objective), setup.batches()
    found = {}
    for step in range(3):
        scalars = objective_step(updater, batches.at(step), setup.options.seed, step, learning_rate=0.05)
        found |= {f"{name} of step {step}": value.double() for name, value in scalars.items()}
    for name, value in setup.validate(objective).items():
        found[f"{name} of a validation"] = torch.tensor(value, dtype=torch.float64)
    return found | dict(objective.state_dict())


@pytest.mark.parametrize("objective", ["mlm", "electra"])
def test_two_ranks_are_one_process(objective: str, prepared: Path) -> None:
    """Seven rows, three and four of them; micro-batches of two."""
    options = {"layers": 1, "width": 16, "heads": 2, "length": 32, "batch_size": 7, "steps": 3, "eval_sequences": 7}
    options |= {"data": str(prepared), "objective": objective, "notes": {"enabled": True}, "dropout": 0.2}
    options |= {"machine": {"micro_batch_size": 2, "precision": "fp32"}, "optimizer": {"clip_norm": 0.5}}
    # Plain steps: Adam's first updates have the gradient's sign, also where it is rounding alone.
    options["optimizer"] |= {"name": "lamb", "eps": 1.0}
    setups = [prepare_setup(from_dict(PretrainOptions, options, "the test")) for _ in range(3)]
    room = Room(2)
    with ThreadPoolExecutor(2) as pool:
        ranks = list(pool.map(trained, setups[:2], (ThreadWorld(rank, 2, room) for rank in range(2))))
    alone = trained(setups[2], World())
    assert {"loss of step 2", "notes_norm of step 2", "loss of a validation", "notes.table"} <= alone.keys()
    for rank in ranks:
        assert rank.keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(
                rank[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_a_rank_validates_on_its_rows_alone(prepared: Path) -> None:
    """Without a sum over the ranks, each has the figures of its rows."""
    options = {"layers": 1, "width": 16, "heads": 2, "length": 32, "batch_size": 4, "steps": 1, "eval_sequences": 4}
    setup = prepare_setup(from_dict(PretrainOptions, options | {"data": str(prepared)}, "the test"))
    objective, losses = setup.objective(), []
    for world in (World(0, 2), World(1, 2), World()):
        setup.world = world
        losses.append(setup.validate(objective)["loss"])
    assert losses[0] != losses[1] and losses[2] == pytest.approx((losses[0] + losses[1]) / 2, rel=1e-3)


def test_rows_of_the_ranks_are_the_batch() -> None:
    for count in (1, 5, 8):
        for size in (1, 2, 3):
            rows = [row for rank in range(size) for row in range(count)[World(rank, size).rows(count)]]
            assert rows == list(range(count))


def test_ranks_divide_the_rows_of_a_validation() -> None:
    rows = PackedRows(InMemory(np.arange(200)), 8, 2, 3)
    parts = [validation_batches(rows, 7, 2, torch.device("cpu"), World(rank, 2)) for rank in range(2)]
    read = [[index for batch in part for index in batch.row_indices.tolist()] for part in parts]
    assert [len(part) for part in read] == [3, 4] and [*read[0], *read[1]] == [28 * row // 7 for row in range(7)]
