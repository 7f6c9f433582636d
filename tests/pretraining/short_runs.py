"""Runs of a few steps without the pages at their end, and the moments of several processes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from fastbert.config import from_dict
from fastbert.pretraining.budget import resolve_steps
from fastbert.pretraining.build import build_trainer, describe_experiment
from fastbert.pretraining.initial import keep_moments
from fastbert.pretraining.options import PretrainOptions, science
from fastbert.pretraining.run import RunFolder
from fastbert.pretraining.setup import PretrainSetup, data_fingerprint, prepare_setup
from fastbert.training.interrupts import Interrupts
from fastbert.training.optimizer_state import flatten_optimizer
from fastbert.training.parallel import Ranks, start


def short_options(data: Path, **more: Any) -> dict[str, Any]:
    """Options of three steps in float32; a network of 2 layers of 32 unless it comes from a model."""
    given = {"data": str(data), "length": 32, "batch_size": 4, "steps": 3, "eval_sequences": 4}
    machine = {"threads": 1, "precision": "fp32"}
    return given | {"machine": machine} | {name: str(one) if name == "init_from" else one for name, one in more.items()}


def short_setup(data: Path, **more: Any) -> PretrainSetup:
    return prepare_setup(from_dict(PretrainOptions, short_options(data, **more), "the test"))


def short_run(out: Path, data: Path, **more: Any) -> Path:
    """Trains, with a checkpoint at the end; the export is not written."""
    setup = short_setup(data, out=str(out), **more)
    setup.options = resolve_steps(setup)
    experiment = describe_experiment(setup, science(setup.options, data_fingerprint(setup.dataset)))
    trainer = build_trainer(setup, RunFolder(out), experiment, resumed=False, quiet=True)
    with trainer.logbook:
        trainer.run(Interrupts())
    return out


def write_moments(options: dict[str, Any], out: str) -> None:
    """Writes the moments with which a run starts on several ranks, each of which has a part of every weight."""
    with start(60.0) as world:
        setup = prepare_setup(from_dict(PretrainOptions, options, "the test"))
        given = {"timeout": 60.0, "store": world.store, "messages": world.messages}
        ranks = Ranks(world.rank, world.size, world.local_rank, True, **given)
        ranks.connect(setup.device)
        setup = replace(setup, world=ranks)
        objective = setup.objective()
        optimizer = setup.updater(objective).optimizer
        keep_moments(optimizer, objective, setup.options, setup.vocabulary, ranks)
        whole = ranks.full_on_first({"optimizer": flatten_optimizer(optimizer)[0]})
        if whole is not None:
            save_file(whole["optimizer"], out)
