"""Weights in several safetensors files with an index."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastbert.errors import UserError
from fastbert.hub.export import export_model
from fastbert.hub.load import load_pretrained
from tests.hub.conftest import named, random_models, small_config


@pytest.fixture(params=[{}, {"position": "tupe-r", "norm": "pre"}], ids=["bert", "own"])
def folder(request, tmp_path, tokenizer) -> Path:
    config = small_config(**request.param)
    export_model(config, named(*random_models(config)), tokenizer, tmp_path / "model")
    return tmp_path / "model"


def shard(folder: Path) -> dict[str, str]:
    """Splits model.safetensors into two files with an index, and returns the map in it."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    where = {name: files[number % 2] for number, name in enumerate(sorted(tensors))}
    for file in files:
        save_file({name: tensors[name] for name in where if where[name] == file}, folder / file, {"format": "pt"})
    write_index(folder, where)
    return where


def write_index(folder: Path, where: dict) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def test_weights_in_several_files_are_those_of_one(folder):
    expected = load_pretrained(folder)
    shard(folder)
    found = load_pretrained(folder)
    assert found.config == expected.config and found.weights.keys() == expected.weights.keys()
    assert all(torch.equal(found.weights[name], tensor) for name, tensor in expected.weights.items())


def test_shards_that_are_damaged_or_do_not_fit_their_index(folder):
    where = shard(folder)
    first, second = sorted(set(where.values()))
    name = min(name for name in where if where[name] == first)
    for changed, message in (
        ({name: "../x.safetensors"}, r"names the file '\.\./x.safetensors', and weights are read from .* next to it"),
        ({name: "/x.safetensors"}, r"names the file '/x.safetensors'"),
        ({name: "pytorch_model.bin"}, r"names the file 'pytorch_model.bin'"),
        (
            {name: "model-00003-of-00002.safetensors"},
            r"lacks model-00003-of-00002.safetensors, which .*index.json names",
        ),
        ({name: second}, rf"model-00002-of-00002.safetensors lacks {name}, which .* expects in it"),
        ({"more": first}, r"model-00001-of-00002.safetensors lacks more"),
        ({name: 3}, r"index of the weights .*weight_map"),
    ):
        write_index(folder, where | changed)
        with pytest.raises(UserError, match=message):
            load_pretrained(folder)
    write_index(folder, {})
    with pytest.raises(UserError, match="names no weights"):
        load_pretrained(folder)
    write_index(folder, where)
    save_file(load_file(folder / second) | {name: load_file(folder / first)[name].clone()}, folder / second)
    with pytest.raises(UserError, match=rf"00002.safetensors and another shard both have {name}"):
        load_pretrained(folder)
    (folder / first).unlink()
    with pytest.raises(UserError, match=rf"lacks {first}, which"):
        load_pretrained(folder)
