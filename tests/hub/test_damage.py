"""Exports of equal weights are equal bytes, and one that was damaged in any bit is refused by name."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import BertForMaskedLM

from fastbert.cli import main
from fastbert.errors import UserError
from fastbert.hub.export import SETTINGS, export_model
from fastbert.hub.load import load_pretrained
from fastbert.training.tensors import HASH, read_tensors, serialized
from tests.hub.conftest import named, random_models, small_config
from tests.hub.test_load import change_settings

EXPORT = """
import sys
from pathlib import Path
from fastbert.hub.export import export_model
from tests.hub.conftest import named, random_models, small_config
config = small_config(position="tupe-r")
export_model(config, named(*random_models(config)), Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def export(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config, out = small_config(position="tupe-r"), tmp_path_factory.mktemp("damage") / "model"
    export_model(config, named(*random_models(config)), tokenizer, out)
    return out


@pytest.fixture
def copy(export: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(export, tmp_path / "model"))


def test_two_processes_export_the_same_bytes(export: Path, tokenizer: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": "17"}
    subprocess.run([sys.executable, "-c", EXPORT, tokenizer, tmp_path / "model"], env=environment, check=True)
    files = sorted(path.name for path in export.iterdir())
    assert files == sorted(path.name for path in (tmp_path / "model").iterdir())
    for name in files:
        assert (export / name).read_bytes() == (tmp_path / "model" / name).read_bytes(), name


def test_files_are_the_librarys_with_a_fixed_order_and_a_hash(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 5), "a": torch.ones(2, dtype=torch.bfloat16), "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5), "counts": torch.arange(5), "flags": torch.tensor([True, False, True]),
    }  # fmt: skip
    content = serialized(tensors, {})
    (tmp_path / "one").write_bytes(content)
    read, metadata = read_tensors(tmp_path / "one")
    assert content == safetensors.torch.save(tensors, metadata=metadata) and metadata.keys() == {HASH}
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in tensors)
    several = {"ö": "é\n", "format": "pt", **{f"key {n}": str(n) for n in range(20)}}
    content = serialized(tensors, several)
    assert all(serialized(dict(reversed(tensors.items())), several) == content for _ in range(4))
    assert int.from_bytes(content[:8], "little") % 8 == 0
    (tmp_path / "several").write_bytes(content)
    read, metadata = read_tensors(tmp_path / "several")
    assert {key: value for key, value in metadata.items() if key != HASH} == several
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_flipped_bit_or_a_cut_is_refused(copy: Path, name: str) -> None:
    path = copy / name
    whole = path.read_bytes()
    load_pretrained(copy)
    header = 8 + int.from_bytes(whole[:8], "little") if name == "model.safetensors" else len(whole)

    def refused(content: bytes) -> None:
        path.write_bytes(content)
        with pytest.raises(UserError, match=name):
            load_pretrained(copy)

    @settings(max_examples=60, database=None)
    @given(st.one_of(st.integers(0, header - 1), st.integers(0, len(whole) - 1)), st.integers(0, 7))
    def check(index: int, bit: int) -> None:
        refused(bytes([*whole[:index], whole[index] ^ 1 << bit, *whole[index + 1 :]]))
        if whole[:index].rstrip() != whole.rstrip():  # a line break at the end means nothing in JSON
            refused(whole[:index])

    check()


def test_every_job_that_reads_an_export_checks_its_hash(copy: Path, tmp_path: Path, capsys) -> None:
    path = copy / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    (tmp_path / "text.txt").write_text("the state " * 50)
    model = str(copy)
    jobs = (
        ["export", "--run", model, "--out", str(tmp_path / "out")],
        ["evaluate", "--model", model, "--source", str(tmp_path / "text.txt"), "--length", "8"],
        ["pretrain", "--data", str(tmp_path / "text.txt"), "--init-from", model, "--steps", "1", "--length", "8"],
    )
    for job in jobs:
        assert main(job) == 2
        assert "model.safetensors is damaged (its content does not match its hash" in capsys.readouterr().err
    # Such a file written by other programs has no hash, and looks like a complete one.
    save_file({name: tensor.clone() for name, tensor in load_file(path).items()}, path)
    load_pretrained(copy)


def test_precisions_and_types_must_be_those_of_the_configuration(copy: Path, tokenizer: Path, tmp_path: Path) -> None:
    path = copy / "model.safetensors"
    weights = load_file(path)

    def refused(change, message: str) -> None:
        save_file({name: change(name, tensor.clone()) for name, tensor in weights.items()}, path)
        with pytest.raises(UserError, match=message):
            load_pretrained(copy)

    refused(lambda _, tensor: tensor.half(), r"config\.json names the dtype float32, and \S+ in its .* has float16")
    refused(lambda name, tensor: tensor.bfloat16() if "words" in name else tensor, r"words\.weight .* has bfloat16")
    refused(lambda _, tensor: tensor.int(), "holds int32 instead of floating-point numbers")
    refused(lambda _, tensor: tensor > 0, "holds bool instead of floating-point numbers")
    refused(lambda _, tensor: tensor.to(torch.complex64), "holds complex64 instead of floating-point numbers")
    save_file({name: tensor.half() for name, tensor in weights.items()}, path)
    for named_as in ({"dtype": "float16"}, {"dtype": ..., "torch_dtype": "float16"}, {"dtype": ...}, {"dtype": None}):
        change_settings(copy, **named_as)
        assert {tensor.dtype for tensor in load_pretrained(copy).weights.values()} == {torch.float16}
    # An export has one precision for all, whatever it was given.
    config = small_config()
    mixed = {name: w.half() if "norm" in name else w for name, w in named(*random_models(config)).items()}
    export_model(config, mixed, tokenizer, tmp_path / "mixed")
    again = load_pretrained(tmp_path / "mixed").weights
    assert all(torch.equal(again[name], mixed[name].float()) for name in mixed)
    BertForMaskedLM.from_pretrained(tmp_path / "mixed")


def test_settings_that_were_changed_are_shown(copy: Path) -> None:
    change_settings(copy, layer_norm_eps=1e-5)
    with pytest.raises(
        UserError, match=r"config\.json was changed since it was written \(layer_norm_eps: 0\.001 -> 1e-05\)"
    ):
        load_pretrained(copy)
    change_settings(copy, layer_norm_eps=0.001, transformers_version="5.0.0")  # what others add is theirs
    load_pretrained(copy)


def test_settings_without_their_hash_are_damage(copy: Path) -> None:
    path = copy / "model.safetensors"
    tensors, metadata = read_tensors(path)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, {SETTINGS: metadata[SETTINGS]})
    with pytest.raises(UserError, match="its hash is missing"):
        load_pretrained(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "24"}, "has hidden_size '24', which must be of type int"),
        ({"vocab_size": True}, "has vocab_size True, which must be of type int"),
        ({"layer_norm_eps": [1]}, r"has layer_norm_eps \[1\], which must be of type float"),
        ({"layer_norm_eps": -1.0}, r"norm_eps must be at least 0, not -1\.0"),
        ({"type_vocab_size": -1}, "type_vocab_size must be at least 0, not -1"),
        ({"num_hidden_layers": 10**9}, r"has num_hidden_layers 1000000000, and the weights lack those layers"),
    ],
)
def test_settings_of_another_type_or_range_are_named(copy: Path, changes: dict, message: str) -> None:
    save_file({name: tensor.clone() for name, tensor in load_file(copy / "model.safetensors").items()}, copy / "x")
    (copy / "x").replace(copy / "model.safetensors")  # a folder of others
    change_settings(copy, **changes)
    with pytest.raises(UserError, match=rf"config\.json.*{message}"):
        load_pretrained(copy)
    assert json.loads((copy / "config.json").read_text())["model_type"] == "fastbert"
