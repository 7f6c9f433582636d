"""Machine options change speed and memory, but not the result beyond rounding: each is compared with plain PyTorch in
float32."""

import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fastbert.data.stages import StageOptions, all_shapes
from fastbert.errors import UserError
from fastbert.model.encoder import Block, Encoder, set_execution
from fastbert.model.options import EncoderOptions
from fastbert.pretraining.build import build_trainer
from fastbert.pretraining.options import PretrainMachineOptions, PretrainOptions
from fastbert.pretraining.run import RunFolder
from fastbert.pretraining.setup import check_networks, prepare_setup
from fastbert.training.interrupts import Interrupts
from fastbert.training.logbook import read_metrics
from fastbert.training.options import OptimizerOptions
from fastbert.training.parallel import Ranks
from fastbert.training.world import World

REFERENCE = PretrainMachineOptions(device="cpu", precision="fp32", kernels="reference", compile="off", threads=1)
VARIANTS = {
    "kernels": {"kernels": "auto"},
    "micro_batch_size": {"micro_batch_size": 3},
    "activation_checkpointing": {"activation_checkpointing": True},
    "threads": {"threads": 2},
    "compile": {"compile": "on"},
    "all": {"kernels": "auto", "micro_batch_size": 4, "activation_checkpointing": True, "compile": "on"},
    "precision": {"precision": "bf16"},
}


def losses(prepared: Path, folder: Path, machine: PretrainMachineOptions, **changes) -> torch.Tensor:
    """Loss and gradient norm of each of six steps, and the validation's losses."""
    options = PretrainOptions(
        data=str(prepared),
        encoder=EncoderOptions(layers=2, width=32, heads=2, position="tupe-r", norm="pre"),
        **{"length": 32, "batch_size": 8, "steps": 6, "eval_every": 6, "eval_sequences": 8, "checkpoint_every": 6},
        log_every=1,
        optimizer=OptimizerOptions(learning_rate=3e-3),
        machine=replace(machine, micro_batch_size=machine.micro_batch_size or 8),
        **changes,
    )
    threads = torch.get_num_threads()
    try:
        setup = prepare_setup(options)
        trainer = build_trainer(setup, RunFolder(folder), {"science": {}, "sessions": []}, resumed=False, quiet=True)
        with trainer.logbook:
            trainer.run(Interrupts())
    finally:
        torch.set_num_threads(threads)
    rows = read_metrics(folder / "metrics.jsonl")
    found = [row[name] for row in rows for name in ("loss", "grad_norm") if name in row]
    assert len(found) == 13
    return torch.tensor(found, dtype=torch.float64)


@pytest.fixture(scope="module")
def references(prepared: Path, tmp_path_factory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("reference")
    return {name: losses(prepared, folder / name, REFERENCE, objective=name) for name in ("mlm", "electra")}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("objective", ["mlm", "electra"])
def test_the_losses_are_the_same(name: str, objective: str, references, prepared, tmp_path, monkeypatch) -> None:
    """This runs the front end of the compiler; the generated code is in the test below."""
    torch.compiler.reset()
    monkeypatch.setattr(Block, "compile", lambda self: nn.Module.compile(self, backend="aot_eager"))
    found = losses(prepared, tmp_path / "run", replace(REFERENCE, **VARIANTS[name]), objective=objective)
    rounding = 2e-2 if name == "precision" else 2e-5
    torch.testing.assert_close(found, references[objective], rtol=rounding, atol=0)


def test_every_machine_option_is_tested() -> None:
    tested = {option for change in VARIANTS.values() for option in change}
    # A GPU in scripts/gpu/measure.py; the bytes of any number of workers in test_prepare; training/test_apex.py,
    # training/test_parallel.py and training/test_failures.py.
    elsewhere = {"device", "workers", "apex", "shard", "timeout"}
    assert {field.name for field in fields(PretrainMachineOptions)} == tested | elsewhere


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="the compiler needs one for C++")
def test_compiled_code() -> None:
    torch.compiler.reset()
    config = EncoderOptions(layers=1, width=16, heads=2, norm="pre").resolve(50, 12)
    encoder = Encoder(config, "auto").train()
    ids, keys = torch.arange(24).view(2, 12), torch.tensor([5, 6], dtype=torch.int32)
    found = []
    for compiled in (False, True):
        set_execution(encoder, compiled, checkpointing=False)
        hidden = encoder(ids, row_keys=keys)
        found.append([hidden, *torch.autograd.grad(hidden.square().sum(), list(encoder.blocks.parameters()))])
    for ours, eager in zip(*found, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)


def test_blocks_are_one_program(prepared: Path, tmp_path: Path) -> None:
    """For any number of blocks: what differs between them, the index of the dropout site, is a tensor."""
    torch.compiler.reset()
    config = EncoderOptions(layers=5, width=16, heads=2).resolve(50, 12)
    encoder = Encoder(config, "reference").train()
    programs = []

    def backend(graph, inputs):
        programs.append(graph)
        return graph

    for block in encoder.blocks:
        nn.Module.compile(block, backend=backend)
    keys = torch.arange(3, dtype=torch.int32)
    for batch in (3, 3):
        encoder(torch.ones(batch, 12, dtype=torch.long), row_keys=keys)
    assert len(programs) == 1


def test_a_block_on_several_processes_is_one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise torch cuts it after 1 MB of weights, the size of the first message of their gradients."""
    torch.compiler.reset()
    monkeypatch.setattr("torch._dynamo.config.optimize_ddp", True)  # torch's default, restored after the test
    encoder = Encoder(EncoderOptions(layers=1, width=320, heads=2).resolve(50, 8), "reference").train()
    programs = []

    def backend(graph, inputs):
        programs.append(graph)
        return graph

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Block, "compile", lambda self: nn.Module.compile(self, backend=backend))
        set_execution(encoder, compiled=True, checkpointing=False)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    network = None
    try:
        network = Ranks().distributed(encoder, torch.device("cpu"))
        network(torch.ones(2, 8, dtype=torch.long), row_keys=torch.arange(2, dtype=torch.int32)).sum().backward()
    finally:
        # While the group lives: a network that is the last to release it waits for the group's threads, with Python's
        # lock, for which a thread may wait that has just summed the gradients.
        del network
        dist.destroy_process_group()
    assert len(programs) == 1


def test_all_shapes_of_a_run_are_compiled() -> None:
    """All shapes that a run with stages has, trained on and validated: two lengths, batches that grow, what is left for
    the last micro-batch. Every call of a block is a call of one of its programs, whose number is known."""
    torch.compiler.reset()
    config = EncoderOptions(layers=1, width=8, heads=1).resolve(50, 16)
    encoder = Encoder(config, "reference")
    programs, calls = [], []

    def backend(graph, inputs):
        programs.append(graph)
        return lambda *given: calls.append(graph) or graph(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Block, "compile", lambda self: nn.Module.compile(self, backend=backend))
        set_execution(encoder, compiled=True, checkpointing=False)
    shapes = all_shapes(StageOptions(first_length=8, initial_batch_size=2), batch_size=4, length=16)
    assert shapes == {(4, 8), (8, 8), (2, 16), (4, 16)}
    parts = {(rows, length) for batch, length in shapes for rows in (min(3, batch), batch % 3 or 3)}
    for rows, length in sorted(parts, key=lambda part: (part[1], -part[0])):
        ids, only = torch.ones(rows, length, dtype=torch.long), torch.zeros(rows, 2, dtype=torch.long)
        encoder.train()(ids, row_keys=torch.arange(rows, dtype=torch.int32), only=only).sum().backward()
        with torch.no_grad():
            encoder.eval()(ids, only=only)
    assert len(calls) == 2 * len(parts)
    assert len(programs) == 2 * 5  # first, other batch, one row; other length, one row of it


def test_checkpointing_stores_less_and_gives_the_same_bits() -> None:
    config = EncoderOptions(layers=3, width=32, heads=2).resolve(50, 64)
    encoder = Encoder(config, "reference").train()
    ids, keys = torch.arange(128).view(2, 64) % 50, torch.tensor([5, 6], dtype=torch.int32)
    gradients, saved = [], []
    for checkpointing in (False, True):
        set_execution(encoder, compiled=False, checkpointing=checkpointing)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):  # noqa: B023 (called within)
            loss = encoder(ids, row_keys=keys).square().mean()
        gradients.append(torch.autograd.grad(loss, list(encoder.parameters()), allow_unused=True))
        saved.append(sum(sizes))
    assert saved[1] < saved[0] / 3
    for a, b in zip(*gradients, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_an_encoder_that_fits_if_it_is_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    """81 million parameters take 1291 MB, 108 MB on each of 12 GPUs and 129 MB on each of 10."""
    monkeypatch.setattr("fastbert.pretraining.setup.memory", lambda device: (0, 120 * 10**6))
    options, device = PretrainOptions(encoder=EncoderOptions(layers=1, width=2400, heads=2)), torch.device("cpu")
    options = replace(options, batch_size=12, length=8)
    check_networks(options, device, World(0, 12, sharded=True))
    for world in (World(0, 12), World(0, 10, sharded=True), World()):
        with pytest.raises(UserError, match="takes more than"):
            check_networks(options, device, world)


def test_wrong_value() -> None:
    with pytest.raises(UserError, match="unknown compile 'yes'"):
        PretrainMachineOptions(compile="yes")
