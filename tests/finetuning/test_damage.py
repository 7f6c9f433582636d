"""A fine-tuned model that was damaged in its weights, its settings or its task's record is refused."""

import shutil
from pathlib import Path

import pytest
import torch

from fastbert.errors import UserError
from fastbert.finetuning.kinds.classes import Classes
from fastbert.finetuning.model import TaskModel
from fastbert.finetuning.saved import TaskRecord, load_encoder, load_task_model, save_task_model
from fastbert.model.encoder import initialize
from tests.finetuning.conftest import FAST, make_task, tiny_config
from tests.flags import main
from tests.hub.test_load import change_settings

RECORD = TaskRecord("words", Classes(("bad", "good")), False, False, 16, 0, {"dev": {"accuracy": 0.5}})


@pytest.fixture(scope="module", params=["absolute", "tupe-r"])
def model(request: pytest.FixtureRequest, bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    classifier = TaskModel(tiny_config(position=request.param), {"words": RECORD.kind})
    initialize(classifier, 0, 0.1)
    folder = tmp_path_factory.mktemp("tuned")
    for name in ("model", "again"):
        save_task_model(classifier, RECORD, bert, folder / name)
    return folder / "model"


def test_equal_models_are_equal_bytes(model: Path) -> None:
    for path in model.iterdir():
        assert path.read_bytes() == (model.parent / "again" / path.name).read_bytes(), path.name
    assert load_task_model(model).record == RECORD


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "task.json"])
def test_a_flipped_bit_is_refused_by_name(model: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    whole = (copy / name).read_bytes()
    end = len(whole) - 1  # without its last line's end JSON is whole
    offsets = torch.randint(0, end, (25,), generator=torch.Generator().manual_seed(0)).tolist()
    for number, offset in enumerate([*offsets, end - 2]):
        flipped = bytes([*whole[:offset], whole[offset] ^ 1 << number % 8, *whole[offset + 1 :]])
        for content, load in ((flipped, load_task_model), (whole[:offset], load_encoder)):
            (copy / name).write_bytes(content)
            with pytest.raises(UserError, match=name):
                load(copy)


def test_the_task_record_is_compared_with_its_copy(model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    text = (copy / "task.json").read_text()
    (copy / "task.json").write_text(text.replace('"max_length": 16', '"max_length": 18'))
    with pytest.raises(UserError, match=r"task\.json was changed since it was written \(max_length: 16 -> 18\)"):
        load_task_model(copy)
    (copy / "task.json").write_text(text)
    change_settings(copy, hidden_dropout_prob=0.3)
    with pytest.raises(UserError, match=r"config\.json was changed .*hidden_dropout_prob: 0\.1 -> 0\.3"):
        load_task_model(copy)


def test_damaged_results_are_refused_by_name(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Results of a fine-tuning that is continued or used as a start: flipped bits, and JSON with another structure."""
    task = make_task(tmp_path, "words", train=32, dev=16)
    command = ["finetune", "--model", str(bert), *task, *FAST, "--epochs", "1", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    first = ["finetune", "--init-from", str(tmp_path / "out"), *task, *FAST, "--out", str(tmp_path / "next")]
    for name, asked in (("manifest.json", command), ("seed-0/result.json", command), ("results.json", first)):
        path = tmp_path / "out" / name
        whole = path.read_bytes()
        score = whole.rindex(b"0.")  # a digit of it
        for content in (
            bytes([*whole[: score + 2], whole[score + 2] ^ 1, *whole[score + 3 :]]),
            b"[]",
            b"{}",
            whole[: len(whole) // 2],
        ):
            path.write_bytes(content)
            stamp = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
            assert main(asked) == 2, (name, content)
            assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == stamp  # refused before writing
            printed = capsys.readouterr().err
            assert f"{path} is damaged" in printed and "Traceback" not in printed
        path.write_bytes(whole)
    assert main(command) == 0
