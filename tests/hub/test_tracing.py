"""Exported models as graphs: one graph serves every batch size and length."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.export import Dim
from transformers import AutoModelForMaskedLM, PreTrainedModel

from fastbert.hub.export import export_model
from fastbert.model.positions import POSITIONS
from tests.hub.conftest import named, random_models, small_config

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@pytest.fixture(scope="module", params=POSITIONS)
def model(request, tokenizer, tmp_path_factory) -> PreTrainedModel:
    """Of our own class, so with pre-norm where post-norm would be transformers' BERT."""
    norm = "pre" if request.param == "absolute" else "post"
    config = small_config(position=request.param, norm=norm, layers=1, max_positions=64)
    folder = tmp_path_factory.mktemp("tracing") / request.param
    export_model(config, named(*random_models(config)), tokenizer, folder)
    return AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True).eval()


def batch(rows: int, length: int) -> dict[str, torch.Tensor]:
    """Rows of which each is two tokens shorter than the one before."""
    index = torch.arange(length).expand(rows, -1)
    real = length - 2 * torch.arange(rows)[:, None]
    return {
        "input_ids": torch.randint(5, 27, (rows, length), generator=torch.Generator().manual_seed(length)),
        "attention_mask": (index < real).long(),
        "token_type_ids": (index >= length // 2).long(),
    }


@torch.no_grad()
def test_compiles_once_for_all_lengths(model) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, dynamic=True, fullgraph=True)
    beyond = () if model.config.position == "absolute" else (100,)
    for length in (8, 9, 23, 40, 64, *beyond):
        inputs = batch(3, length)
        assert torch.equal(compiled(**inputs).logits, model(**inputs).logits), length
    assert counter.frame_count == 1


@torch.no_grad()
def test_exported_program_takes_other_batch_sizes_and_lengths(model) -> None:
    longest = 64 if model.config.position == "absolute" else None  # 64 positions
    shapes = {name: {0: Dim("batch"), 1: Dim("length", max=longest)} for name in INPUTS}
    program = torch.export.export(model, (), batch(2, 9), dynamic_shapes=shapes).module()
    for rows, length in ((2, 9), (1, 5), (3, 20), (5, longest or 100)):
        inputs = batch(rows, length)
        assert torch.equal(program(**inputs).logits, model(**inputs).logits), (rows, length)
