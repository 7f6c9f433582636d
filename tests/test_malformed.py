"""Files of a model, a run and results, changed at random: each is read, or refused with a UserError, in bounded memory.

A seal does not help: whoever changes a file can compute it anew, as is done here.
"""

import copy
import hashlib
import io
import json
import shutil
import tracemalloc
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.data.partial import Partial
from fastbert.data.shards import open_dataset
from fastbert.errors import UserError, message_of
from fastbert.finetuning.kinds.classes import Classes
from fastbert.finetuning.model import TaskModel
from fastbert.finetuning.results import best_seed
from fastbert.finetuning.saved import TaskRecord, load_task_model, save_task_model
from fastbert.finetuning.submission import validate
from fastbert.hub.load import load_pretrained
from fastbert.inputs import read_input
from fastbert.model.config import EncoderConfig
from fastbert.pretraining.loop import STATE, Progress
from fastbert.records import Whole, check, parse_json, seal_of
from fastbert.studies.engine.store import read_result_rows
from fastbert.studies.shared.finetune_jobs import check_tuned
from fastbert.studies.shared.grid import read_seeds
from fastbert.training.checkpoints import Checkpointer
from fastbert.yaml_text import parse_yaml
from tests.finetuning.conftest import tiny_model

ODD = (
    *(None, True, 0, -1, 3, 1.5, 12.0, 1e308, float("nan"), 10**9, 2**63, 10**19, "", "12", "x\x1b[31m", "\ud800"),
    *("y" * 50_000, [], {}, [1], ["a"], {"a": 1}, [[[[]]]], {"a": {"b": [1]}}, "../../x", [[1, 2]]),
)


def paths_in(value: Any, at: tuple = ()) -> list[tuple]:
    """Where in `value` a value stands, outermost first."""
    inner = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    return [(*at, key) for key, _ in inner] + [found for key, one in inner for found in paths_in(one, (*at, key))]


@st.composite
def changes(sample, value: Any) -> Any:
    """`value` with one or two of its values removed or replaced."""
    value = copy.deepcopy(value)
    for _ in range(sample(st.integers(1, 2))):
        depth = sample(st.integers(1, 6))
        found = [at for at in paths_in(value) if len(at) <= depth]
        if not found:
            break
        *at, key = sample(st.sampled_from(found))
        around = value
        for step in at:
            around = around[step]
        if sample(st.integers(0, 3)) == 0:
            del around[key]
        else:
            around[key] = copy.deepcopy(sample(st.sampled_from(ODD)))
    return value


def sealed(value: dict[str, Any]) -> str:
    if "seal" in value:
        value["seal"] = seal_of(value)
    return json.dumps(value)


def fuzz(path: Path, read: Callable[[], Any], examples: int, after: Callable[[], None] = lambda: None) -> None:
    """Reads `path` changed in many ways; a part must be refused."""
    value, ends = json.loads(path.read_text()), Counter()

    @settings(max_examples=examples, derandomize=True, database=None)
    @given(changes(value))
    def once(changed: Any) -> None:
        path.write_text(sealed(changed))
        after()
        try:
            read()
        except UserError as error:
            ends["refused"] += 1
            shown = message_of(error)
            assert len(shown) <= 2100 and "\x1b" not in shown
        else:
            ends["read"] += 1

    once()
    assert ends["refused"] > examples // 8, ends


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("export"), layers=1, width=8, ffn=8, max_positions=8)


@pytest.fixture
def folder(export: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(export, tmp_path / "model"))


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_an_export(folder: Path, name: str) -> None:
    fuzz(folder / name, lambda: load_pretrained(folder), 24)


def test_a_task_record(folder: Path, tmp_path: Path) -> None:
    config = load_pretrained(folder).config
    record = TaskRecord("t", Classes(("a", "b")), False, False, 8, 0, {"dev": {"accuracy": 0.5}})
    save_task_model(TaskModel(config, {"t": record.kind}), record, folder, tmp_path / "tuned")
    torch.manual_seed(0)
    fuzz(tmp_path / "tuned" / "task.json", lambda: load_task_model(tmp_path / "tuned"), 24)


def test_results(tmp_path: Path) -> None:
    seed = {"seed": 0, "best": {"epoch": 1, "dev": {"dev": {"accuracy": 0.5, "loss": 1.0}}}}
    results = {"task": "t", "metrics": ["accuracy"], "fractions": [{"fraction": 1.0, "seeds": [seed]}], "seal": ""}
    (tmp_path / "seed-0" / "model").mkdir(parents=True)
    (tmp_path / "results.json").write_text(json.dumps(results))
    fuzz(tmp_path / "results.json", lambda: best_seed(tmp_path), 60)
    figures = {"epoch": 1, "dev": {"dev": {"accuracy": 0.5, "loss": None}}}
    row = {
        **{"id": "a", "status": "done", "model": "m", "task": "t", "seed": 0, "precision": "fp32", "seconds": 1.0},
        **{"learning_rate": 1e-3, "batch_size": 8, "epochs": 1, "train_examples": 8, "metrics": ["accuracy"]},
        **{"best": figures, "last": figures, "seal": ""},
    }
    (tmp_path / "results.jsonl").write_text(json.dumps(row))
    fuzz(tmp_path / "results.jsonl", lambda: read_result_rows(tmp_path / "results.jsonl", check_tuned), 60)
    without = row | {"last": {"epoch": 1, "dev": {"dev": {"loss": None}}}}
    with pytest.raises(UserError, match=r"last\.dev\.dev\.accuracy is missing"):
        check_tuned(without, "a row")


def test_a_prepared_folder(prepared: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(prepared, tmp_path / "data"))
    fuzz(data / "dataset.json", lambda: open_dataset(data).split("train").documents, 24)


@pytest.mark.parametrize("name", ["state.json", "manifest.json"])
def test_a_checkpoint(export: Path, tmp_path: Path, name: str) -> None:
    pretrained = load_pretrained(export)
    run = tmp_path / "run"
    shutil.copytree(export, run / "tokenizer")
    state = {
        "encoder": pretrained.config.to_dict(),
        "objective": "mlm",
        "progress": asdict(Progress(2, 16)),
        "science": {},
    }
    path = Checkpointer(run / "checkpoints", 1, print).save(2, {"model": dict(pretrained.weights)}, state)

    def hash_anew() -> None:
        if name == "state.json":
            manifest = json.loads((path / "manifest.json").read_text())
            content = (path / name).read_bytes()
            manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            (path / "manifest.json").write_text(sealed(manifest))

    fuzz(path / name, lambda: load_pretrained(run), 24, hash_anew)


def test_an_encoders_options() -> None:
    config = EncoderConfig(8, 1, 4, 1, 8, 8)
    assert EncoderConfig.from_dict(config.to_dict()) == config
    with pytest.raises(UserError, match="layers is '1', not a whole number"):
        EncoderConfig.from_dict(config.to_dict() | {"layers": "1"})
    with pytest.raises(UserError, match="initializer_std must be at most 1,000,000, not 10000000000000000000"):
        EncoderConfig.from_dict(config.to_dict() | {"initializer_std": 10**19})  # torch multiplies by no such number
    with pytest.raises(UserError, match="width is missing"):
        EncoderConfig.from_dict({name: value for name, value in config.to_dict().items() if name != "width"})


@pytest.mark.parametrize(
    ("value", "shape", "message"),
    [
        ({"a": {"b": [1, "x"]}}, {"a": {"b": [int]}}, r"f is damaged: a\.b\[1\] is 'x', not a whole number"),
        ({"a": True}, {"a": int}, "a is True, not a whole number"),
        ({"a": 2.0}, {"a": Whole(0, 9)}, r"a is 2\.0, not a whole number from 0 to 9"),
        ({"a": 10}, {"a": Whole(0, 9)}, "a is 10, not a whole number from 0 to 9"),
        ({"a": float("inf")}, {"a": float}, "a is inf, not a finite number"),
        ({}, {"a": {"b": int}}, "a is missing"),
        ({"a": None}, {"a?": str}, "a is null, not text"),
        (
            {"a": {"x": 1, "y": None}},
            {"a": {str: (int, float)}},
            r"a\.y is null, not a whole number or a finite number",
        ),
        ([1], {"a": int}, "it holds no JSON object, but a list"),
        ({"progress": {}}, STATE, r"progress\.step is missing"),
    ],
)
def test_shapes(value: Any, shape: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(value, shape, "f")


def test_shapes_that_fit() -> None:
    shape = {"a": [{"b": (int, type(None))}], "c?": {str: float}, "d": object}
    for value in ({"a": [], "d": {}}, {"a": [{"b": 1}, {"b": None}], "c": {"x": 1, "y": 0.5}, "d": 3, "more": []}):
        assert check(value, shape, "f") is value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "more than 64 lists and objects"),
        ("[" * 65 + "]" * 65, "more than 64 lists and objects"),
        ("1" * 5000, "the number 1{100}"),
        ('{"a": "\\ud800"}', "is not Unicode text"),
        ('{"\\udc00": 1}', "is not Unicode text"),
        ("[" + "0," * 2**21 + "0]", "f has more than 2,097,152 values"),
        ('{"a": ', "f is damaged: Expecting value"),
        (b'{"a": "\xff"}', "f is damaged: 'utf-8' codec"),
    ],
)
def test_json_beyond_use(text: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_json(text, "f")
    assert parse_json("[" * 64 + "]" * 64, "f")
    assert parse_json(str(int(1e30)), "f") == int(1e30)  # model_max_length, where transformers knows none
    assert parse_json(f'{{"a": {2**64 - 1}, "b": "\\ud83d\\ude00"}}', "f") == {"a": 2**64 - 1, "b": "😀"}


def test_what_a_file_claims_takes_no_memory(folder: Path, tmp_path: Path) -> None:
    settings_of_model = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings_of_model | {"num_hidden_layers": 900, "vocab_size": 2**28}))
    with zipfile.ZipFile(tmp_path / "glue.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("CoLA.tsv", bytes(2**24))
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(2**40)
    laughs = "a: &a [x,x,x,x]\n" + "".join(f"{b}: &{b} [*{a},*{a},*{a}]\n" for a, b in pairwise("abcdefghijklmnop"))
    for read in (
        lambda: load_pretrained(folder),
        lambda: validate(tmp_path / "glue.zip"),
        lambda: read_input(tmp_path / "sparse", most=2**22),
        lambda: parse_yaml(laughs, "x.yaml"),
        lambda: read_seeds(10**9, "x.yaml"),
        lambda: parse_json("[" * 2**20, "x.json"),
    ):
        tracemalloc.start()
        try:
            with pytest.raises(UserError):
                read()
            assert tracemalloc.get_traced_memory()[1] < 2**26
        finally:
            tracemalloc.stop()


def test_arrays_of_unfinished_work_that_claim_too_much(tmp_path: Path) -> None:
    partial = Partial(tmp_path)
    numbers = np.arange(6, dtype=np.int32).reshape(2, 3)
    partial.save({"a": 1}, {"numbers": numbers})
    record, arrays = partial.load()
    assert record == {"a": 1} and np.array_equal(arrays["numbers"], numbers) and arrays["numbers"].dtype == np.int32
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<i8", "fortran_order": False, "shape": (2**50,)})
    for method, content, message in (
        (zipfile.ZIP_STORED, header.getvalue(), "numbers.npy does not have the length in its header"),
        (zipfile.ZIP_DEFLATED, bytes(2**20), "its entries are longer than the file"),
    ):
        with zipfile.ZipFile(tmp_path / ".state.npz", "w", method) as archive:
            archive.writestr("numbers.npy", content)
        with pytest.raises(UserError, match=message):
            partial.load()


def test_messages_for_terminals() -> None:
    assert message_of(UserError("a\x1b[31m\nb\n  c\r\u202e")) == "a\\x1b[31m\\nb\n  c\\r\\u202e"
    shown = message_of(UserError("first " + "x" * 1_600_000 + " last"))
    assert len(shown) < 2100 and shown.startswith("first x") and shown.endswith("x last")
    assert "[... 1,598,111 characters ...]" in shown
