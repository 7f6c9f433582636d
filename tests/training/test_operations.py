"""Number of operations of a training step. Each is at least one launch on a GPU, where a small step waits for the host;
on a CPU each costs microseconds."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from fastbert.config import from_dict
from fastbert.pretraining.build import build_trainer
from fastbert.pretraining.options import PretrainOptions
from fastbert.pretraining.run import RunFolder
from fastbert.pretraining.setup import prepare_setup

VIEWS = {"view", "_unsafe_view", "t", "transpose", "expand", "detach", "lift_fresh", "unsqueeze", "slice", "permute"}
VIEWS |= {"select", "split", "split_with_sizes", "unbind", "alias", "as_strided", "squeeze", "_reshape_alias"}


class Operations(TorchDispatchMode):
    """Counts the operations that compute something: no views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
        name = function.overloadpacket.__name__
        self.count += name not in VIEWS and not name.startswith("_record_function")
        return function(*args, **(kwargs or {}))


@contextmanager
def counted(owner: Any, name: str) -> Iterator[Operations]:
    """Counts the operations in all calls of a method."""
    operations, method = Operations(), getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        with operations:
            return method(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, call)
        yield operations


# Name -> operations with one block, and of each further one, as they are on a CPU now. A change may lower them.
MOST = {
    0.0: {"sample": (43, 0), "forward": (103, 29), "step": (305, 71)},
    0.1: {"sample": (43, 0), "forward": (194, 98), "step": (408, 149)},
}


@pytest.mark.parametrize("dropout", MOST)
def test_operations_of_a_step(prepared, tmp_path, dropout) -> None:
    found = {}
    for layers in (1, 2):
        shape = {"layers": layers, "width": 16, "heads": 2, "length": 16, "batch_size": 8, "steps": 9, "norm": "pre"}
        values = {"data": str(prepared), **shape, "dropout": dropout, "attention_dropout": dropout}
        setup = prepare_setup(from_dict(PretrainOptions, values, "the test"))
        folder = RunFolder(tmp_path / str(layers))
        trainer = build_trainer(setup, folder, {"science": {}, "sessions": []}, resumed=False, quiet=True)
        trainer.objective.train()
        step = count()
        trainer.train_step(next(step))
        for name in ("sample", "forward"):
            with counted(trainer.objective, name) as operations:
                trainer.train_step(next(step))
            found[name, layers] = operations.count
        with Operations() as operations:
            trainer.train_step(next(step))
        found["step", layers] = operations.count
    for name, (first, each) in MOST[dropout].items():
        assert found[name, 1] <= first and found[name, 2] - found[name, 1] <= each, (name, found)
