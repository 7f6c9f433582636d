"""Expected memory of trainings, compared with peaks that were measured (VmHWM of the process, one CPU thread)."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fastbert.model.config import EncoderConfig
from fastbert.model.memory import training_memory
from fastbert.model.options import EncoderOptions
from fastbert.pretraining.budget import expected_memory
from fastbert.pretraining.options import PretrainOptions

PRETRAININGS = [  # layers, width, tokens in a forward pass, parameters, peak in MB
    (2, 32, 128, 165_088, 506),
    (2, 128, 4096, 991_936, 614),
    (2, 128, 8192, 1_041_088, 761),
    (6, 256, 4096, 6_023_552, 1217),
    (6, 256, 1024, 6_023_552, 805),
    (4, 512, 1024, 15_568_640, 1013),
]


def encoder(layers: int, width: int, vocab_size: int = 4096) -> EncoderConfig:
    return EncoderOptions(layers=layers, width=width, heads=width // 32).resolve(vocab_size, 512)


@pytest.mark.parametrize(("layers", "width", "tokens", "parameters", "peak"), PRETRAININGS)
def test_measured_pretrainings(layers: int, width: int, tokens: int, parameters: int, peak: int) -> None:
    options = PretrainOptions(batch_size=2 * tokens // 64, length=64)
    options = replace(options, machine=replace(options.machine, micro_batch_size=tokens // 64))
    setup = SimpleNamespace(options=options, config=encoder(layers, width), device=torch.device("cpu"))
    assert 0.8 < 1e6 * peak / expected_memory(setup, parameters) < 1.25
    setup.device = torch.device("cuda")
    assert expected_memory(setup, parameters) == 0


def test_measured_fine_tunings() -> None:
    """6 layers of 384 with 22.7M parameters, batches of 32 and of 8 texts of at most 128 and 253 tokens."""
    for tokens, peak in ((32 * 128, 1922), (8 * 253, 1574), (32 * 35, 1522)):
        found = training_memory(22_700_000, [encoder(6, 384, 30_522)], tokens, 7, predicts_words=False)
        assert 0.8 < 1e6 * peak / found < 1.25
