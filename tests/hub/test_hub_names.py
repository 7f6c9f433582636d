"""Names on the Hugging Face hub in place of folders. There is no network here: the cache is filled, or the download is
replaced."""

import json
import re
from dataclasses import dataclass, field, fields
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants, errors
from huggingface_hub.utils import filter_repo_objects, get_session

from fastbert.cli import OPTIONS
from fastbert.data.tokenizer import WordPiece
from fastbert.data.tokenizer_folders import load_tokenizer
from fastbert.downloads import (
    FILES,
    FROM_HUB,
    MODEL,
    TOKENIZER,
    HubName,
    check_downloaded,
    hub_name,
    local_folder,
    shown_folder,
    with_downloads,
)
from fastbert.errors import UserError
from fastbert.hub.export import export_model
from fastbert.hub.load import load_pretrained
from fastbert.registry import imported
from fastbert.studies.shared.grid import ModelEntry
from tests.flags import main
from tests.hub.cached import fill_cache
from tests.hub.conftest import named, random_models, small_config

OLD, NEW = "a" * 40, "b" * 40
TRAIN = ["--custom.train", "train.jsonl", "--custom.dev", "train.jsonl", "--seeds", "1", "--epochs", "1"]


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


def export(folder: Path, tokenizer: Path, seed: int = 0) -> Path:
    config = small_config()
    export_model(config, named(*random_models(config, seed)), tokenizer, folder)
    return folder


def test_names_and_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("runs", "here/name", "roberta-base"):
        (tmp_path / folder).mkdir(parents=True)
    for text, expected in {
        "owner/name": HubName("owner/name"),
        "owner/name@main": HubName("owner/name", "main"),
        "owner/name@refs/pr/1": HubName("owner/name", "refs/pr/1"),
        f"owner/name@{'1' * 40}": HubName("owner/name", "1" * 40),
        "bert-base-uncased": HubName("google-bert/bert-base-uncased"),
        "bert-base-uncased@v1": HubName("google-bert/bert-base-uncased", "v1"),
        "xlm-roberta-base": HubName("FacebookAI/xlm-roberta-base"),
        "distilbert-base-uncased": HubName("distilbert/distilbert-base-uncased"),
        # paths: existing, next to existing ones, or of another form
        **dict.fromkeys(("here/name", "here/other", "roberta-base", "runs/base", "runs/base@1000", "other/base@1000")),
        **dict.fromkeys(("results/x", "models/bert", "data/wiki")),
        **dict.fromkeys(("./x/y", "../x", "/x/y", "x", "a/b/c", "x/", "~/x", "a--b/c", "a/b.git", "a b/c", "-a/b", "")),
    }.items():
        assert hub_name(text) == expected, text


def test_a_path_that_does_not_exist_keeps_its_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text, message in {
        "runs/base": "there is no folder runs/base; give the folder of X, or owner/name of a repository on the Hug",
        "x": "there is no folder x; give the folder of X, or owner/name of a repository",
        "./x/y": "there is no folder x/y; give the folder of X$",
        "../x/y": r"there is no folder ../x/y; give the folder of X$",
        "/x/y": "there is no folder /x/y; give the folder of X$",
        "runs/base@20": r"for a checkpoint of a run give its folder, runs/base/checkpoints/step-00000020",
    }.items():
        with pytest.raises(UserError, match=message):
            check_downloaded(text, MODEL, "X")
    assert str(check_downloaded("owner/name", MODEL, "X")) == "owner/name"  # nothing is downloaded


def test_only_weights_in_safetensors_and_tokenizers_are_downloaded():
    files = ["config.json", "model.safetensors", "model.safetensors.index.json", "model-00001-of-00002.safetensors"]
    files += ["tokenizer.json", "tokenizer_config.json", "vocab.txt", "merges.txt", "vocab.json", "task.json"]
    others = ["pytorch_model.bin", "modeling_x.py", "tf_model.h5", "onnx/model.onnx", "onnx/model.safetensors"]
    others += ["optimizer.pt", "training_args.bin", "README.md", "adapter_model.safetensors", "a/config.json"]
    found = set(filter_repo_objects([*files, *others], allow_patterns=list(FILES[MODEL])))
    assert found == set(files)
    found = set(filter_repo_objects([*files, *others], allow_patterns=list(FILES[TOKENIZER])))
    assert found == {file for file in files if "safetensors" not in file} - {"task.json"}


def test_options_and_studies_get_the_folder_of_the_commit(cache, tokenizer, tmp_path):
    folder = export(tmp_path / "export", tokenizer)
    snapshot = fill_cache(cache, "google-bert/bert-base-uncased", folder, OLD)
    assert shown_folder(snapshot) == f"google-bert/bert-base-uncased@{OLD}"
    assert shown_folder(folder) == str(folder)
    assert load_pretrained("bert-base-uncased").source == f"the BERT in google-bert/bert-base-uncased@{OLD}"
    assert load_tokenizer("bert-base-uncased") == load_tokenizer(tokenizer)

    @dataclass(frozen=True)
    class Study:
        models: tuple[ModelEntry, ...]
        by_name: dict[str, ModelEntry]
        several: str = field(metadata=FROM_HUB)
        tasks: tuple[str, ...] = field(metadata=FROM_HUB)
        other: str = "bert-base-uncased"

    name = "bert-base-uncased"
    entry = ModelEntry("m", name)
    study = Study((entry,), {"m": entry}, f"{folder},{name}@{OLD}", (f"cola={name},{folder}", "rte=runs"))
    found = with_downloads(study)
    assert found.models == (ModelEntry("m", str(snapshot)),) and found.by_name["m"].path == str(snapshot)
    assert found.several == f"{folder},{snapshot}" and found.other == study.other
    assert found.tasks == (f"cola={snapshot},{folder}", "rte=runs")
    for given in ("lr=1/seed-0,lr=2/seed-0", "lr=1/x=2/y", f"{folder},a=b/c"):
        assert with_downloads(ModelEntry("m", given)).path == given
    unchanged = ModelEntry("m", str(folder))
    assert with_downloads(unchanged) is unchanged


def test_every_option_that_names_a_model_may_name_one_of_the_hub():
    for job, options in OPTIONS.items():
        for one in fields(options):
            if one.name in ("model", "init_from", "previous", "run") or (job, one.name) == ("submit", "models"):
                assert one.metadata["hub"] == MODEL, (job, one.name)
            elif one.name == "tokenizer":
                assert one.metadata["hub"] == TOKENIZER, job
            else:
                assert "hub" not in one.metadata, (job, one.name)


@pytest.mark.parametrize(
    ("load", "content"),
    [
        ("sweep.options:load_sweep", "models: [NAME]\ntasks: [rte]"),
        (
            "active.options:load_active",
            "model: NAME\ntask: rte\nlearners: [{method: anew, query: margin}]\nrounds: [9]",
        ),
        ("pipelines.load:load_pipeline", "models: [{name: m, path: NAME}]\nstages: [{name: s, tasks: [rte]}]"),
        (
            "ablate.options:load_ablation",
            "base: {init_from: NAME, data: x}\nvariants: {a: {}, b: {optimizer: {beta2: 0.9}}}\n"
            "budget: {steps: 9}\nseeds: 1",
        ),
    ],
)
def test_studies_get_the_folder_of_the_commit(cache, tokenizer, tmp_path, load, content):
    snapshot = str(fill_cache(cache, "owner/name", export(tmp_path / "export", tokenizer), OLD))
    Path("study.yaml").write_text(content.replace("NAME", "owner/name@main"))
    study, _ = imported(f"fastbert.studies.{load}")("study.yaml")
    found = with_downloads(study)
    assert snapshot not in repr(study) and snapshot in repr(found)
    used = [part for part in re.split(r"[(,] ?", repr(found)) if "owner/name@main" in part and "name=" not in part]
    assert not used


def test_a_result_names_the_commit_and_a_moved_revision_is_another_model(cache, tokenizer, tmp_path, capsys):
    first = export(tmp_path / "first", tokenizer)
    fill_cache(cache, "owner/name", first, OLD)
    rows = [{"text": word, "label": word} for word in ("the", "state")] * 4
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["finetune", "--task", "t", *TRAIN, "--out", "out", "--model"]
    assert main([*command, "owner/name"]) == 0
    manifest = json.loads(Path("out/manifest.json").read_text())
    assert manifest["model"] == f"the BERT in owner/name@{OLD}"
    assert re.fullmatch(rf"[0-9a-f]{{8}} of owner/name@{OLD}", manifest["science"]["model"])
    assert f"models--owner--name/snapshots/{OLD}" in Path("out/config.yaml").read_text()
    assert main([*command, f"owner/name@{OLD}"]) == 0  # nothing to do
    fill_cache(cache, "owner/name", first, NEW)  # the same weights
    capsys.readouterr()
    assert main([*command, "owner/name"]) == 2
    assert f"owner/name@{NEW}" in capsys.readouterr().err
    assert main([*command, f"owner/name@{OLD}"]) == 0
    # A fine-tuned model on the hub
    fill_cache(cache, "owner/tuned", Path("out/seed-0/model"), OLD)
    assert main(["predict", "--model", "owner/tuned", "--source", "train.jsonl", "--out", "out.jsonl"]) == 0
    assert len(Path("out.jsonl").read_text().splitlines()) == len(rows)


def test_nothing_is_downloaded_before_other_options_are_checked(cache, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("downloaded"))
    for command, message in {
        "finetune --model owner/name --task t --custom.train no.jsonl --custom.dev no.jsonl --out out": "no.jsonl",
        "evaluate --model owner/name --source no.txt": "'no.txt' does not exist",
        "predict --model owner/name --source no.jsonl": "no.jsonl does not exist",
        "prepare --source no.txt --tokenizer owner/name --out out": "'no.txt' does not exist",
        "pretrain --init-from owner/name --data no.txt --steps 1": "no.txt",
    }.items():
        assert main(command.split()) == 2
        assert message in capsys.readouterr().err


def test_an_incomplete_or_unsuitable_repository(cache, tokenizer, tmp_path, monkeypatch):
    folder = export(tmp_path / "export", tokenizer)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    fill_cache(cache, "owner/pickles", folder, OLD)
    (folder / "config.json").unlink()
    fill_cache(cache, "owner/other", folder, OLD)
    with pytest.raises(
        UserError, match=r"without model.safetensors; unset HF_HUB_OFFLINE, or run `hf download owner/pi"
    ):
        local_folder("owner/pickles")
    with pytest.raises(UserError, match=r"owner/other on the Hugging Face hub has no config.json"):
        local_folder("owner/other")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    snapshot = cache / "models--owner--pickles" / "snapshots" / OLD
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(snapshot))
    with pytest.raises(
        UserError, match=r"owner/pickles .* no model.safetensors.*spaces/safetensors/convert.*refs/pr/N"
    ):
        local_folder("owner/pickles")


def refused(kind: type[Exception], status: int) -> Exception:
    response = errors.Response(status, request=get_session().build_request("GET", "https://huggingface.co"))
    return kind("refused\nwith more lines", response=response)


def unreachable() -> Exception:
    error = errors.LocalEntryNotFoundError("not in the cache")
    error.__cause__ = ConnectionError("Name or service not known")
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (refused(errors.GatedRepoError, 403), "accept the terms on its page, then log in with `hf auth login`"),
        (refused(errors.RepositoryNotFoundError, 404), "does not exist or is private; check the spelling"),
        (refused(errors.RevisionNotFoundError, 404), "has no such revision; give a branch, a tag or a commit"),
        (
            refused(errors.HfHubHTTPError, 500),
            r"failed \(refused\); repeat the command, which continues it, or run `hf d",
        ),
        (
            unreachable(),
            r"cannot be reached \(Name or service not known\); check the path and the network, or run `hf d",
        ),
        (errors.XetDownloadError("broken off"), r"failed \(broken off\)"),
        (OSError(28, "No space left on device"), "disk is full"),
    ],
)
def test_a_download_that_fails_is_a_user_error(cache, monkeypatch, capsys, error, message):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=f"(?i){message}"):
        local_folder("owner/name@main")
    assert main(["fill", "owner/name@main", "a [MASK]"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")


def test_offline_without_the_model(cache):
    with pytest.raises(
        UserError,
        match=r"not hold owner/name@x, and HF_HUB_OFFLINE is set; .* run `hf download owner/name --revision x`",
    ):
        local_folder("owner/name@x")
    WordPiece(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")).save("tokens")
    for file in Path("tokens").iterdir():
        file.rename(f"tokens/other-{file.name}")
    fill_cache(cache, "owner/words", Path("tokens"), OLD)
    with pytest.raises(UserError, match="owner/words on the Hugging Face hub has no tokenizer"):
        load_tokenizer("owner/words")


def test_downloaded_bytes_are_shown(cache, tokenizer, tmp_path, monkeypatch, works):
    folder = export(tmp_path / "export", tokenizer)

    def download(repository, *, revision, allow_patterns, tqdm_class):
        assert (repository, revision, allow_patterns) == ("owner/name", "v1", list(FILES[MODEL]))
        files = tqdm_class(total=3, desc="Fetching 3 files", name="huggingface_hub.snapshot_download.files")
        shown = tqdm_class(total=0, name="huggingface_hub.snapshot_download", disable=False)
        shown.total += 1000
        files.update(1)
        shown.update(250)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert local_folder("owner/name@v1") == folder
    work = works["downloading owner/name@v1"]
    assert (work.done, work.total, work.unit) == (250, 1000, "B")
