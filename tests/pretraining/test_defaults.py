"""Defaults without a configuration are those of base.yaml, and small.yaml is the model of its paper."""

from pathlib import Path

import pytest

from fastbert.config import leaves, load_yaml
from fastbert.flags import parse
from fastbert.model.flops import TRAINING, encoder_flops, encoder_parameters
from fastbert.pretraining.options import PretrainOptions
from fastbert.training.schedules import warmup_steps

CONFIGS = Path(__file__).parents[2] / "configs" / "pretrain"


def test_defaults_are_those_of_base_yaml() -> None:
    base = load_yaml(PretrainOptions, CONFIGS / "base.yaml")
    given, default = ({leaf.name: leaf.value for leaf in leaves(one)} for one in (base, parse(PretrainOptions, [], "")))
    different = {name for name in given if given[name] != default[name]}
    # What to train on, and what follows from the length of the run.
    assert different == {"data", "steps", "eval_every", "checkpoint_every"}
    assert warmup_steps(base.schedule, base.steps) == 10_000  # as in the paper


def test_small_yaml_is_the_model_of_its_paper() -> None:
    small = load_yaml(PretrainOptions, CONFIGS / "small.yaml")
    config = small.encoder.resolve(30522, small.length)
    beyond = (30522 + small.length + 2) * (256 - 128) - 128 * 256  # the paper's embeddings are projected from 128
    assert encoder_parameters(config) - beyond == pytest.approx(14e6, rel=0.05)
    flops = TRAINING * encoder_flops(config, small.batch_size, small.length)
    assert flops * small.steps == pytest.approx(1.4e18, rel=0.1)
    assert warmup_steps(small.schedule, small.steps) == 10_000
