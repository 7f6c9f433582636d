"""User errors: a message with what, where and how to fix it, exit code 2, no traceback, nothing lost."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastbert.cli import JOBS
from fastbert.errors import UserError, about, choose, nearest
from tests.flags import main
from tests.stand_ins import free_space


def refused(capsys, *arguments: object) -> str:
    """Standard error of a call that must end with 2."""
    capsys.readouterr()
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2, captured.out + captured.err
    assert "Traceback" not in captured.err
    return " ".join(captured.err.split())


def test_help_of_every_job(capsys) -> None:
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    for job in JOBS:
        assert f"  {job} " in listed
        for more in ([], ["throughput"], ["data"], ["kernels"]) if job == "bench" else ([],):
            assert code_of([job, *more, "--help"]) == 0
            text = capsys.readouterr().out
            assert " ".join(["fastbert", job, *more]) in text
            assert not re.search(r"^ \S", text, re.MULTILINE)  # paragraphs begin at the margin


def code_of(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as stop:
        return stop.code


def test_the_installed_command_and_its_exit_code(tmp_path) -> None:
    command = Path(sys.executable).parent / "fastbert"
    done = subprocess.run([command, "pretrian"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown job 'pretrian'; did you mean 'pretrain'?")
    assert subprocess.run([command], capture_output=True).returncode == 2


def test_a_reader_that_goes_away_gets_no_traceback(tmp_path) -> None:
    code = (
        "import sys; from fastbert import cli\n"
        "cli.JOBS['export'] = (lambda _: print('x' * 2**20) or 0, '')\n"
        "sys.exit(cli.main(['export']))"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.parametrize("size", [1, 2**20])  # fails when it is flushed, and when it is printed
def test_a_full_disk_under_standard_output(size: int) -> None:
    code = (
        "import sys; from fastbert import cli\n"
        f"cli.JOBS['export'] = (lambda _: print('x' * {size}) or 0, '')\n"
        "sys.exit(cli.main(['export']))"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: the disk is full while writing standard output; free space\n"


def test_internal_errors_keep_their_traceback(monkeypatch) -> None:
    monkeypatch.setattr("fastbert.pretraining.pretrain.pretrain", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        main(["pretrain", "--steps", "1"])


def test_unknown_options_and_variants(capsys, flags, tmp_path) -> None:
    out = ("--out", tmp_path / "run")
    assert "--position" in refused(capsys, "pretrain", *flags, *out, "--positoin", "tupe-r")
    assert "did you mean 'tupe-r'?" in refused(capsys, "pretrain", *flags, *out, "--position", "tuper")
    assert "unknown objective 'mln'; did you mean 'mlm'?" in refused(
        capsys, "pretrain", *flags, *out, "--objective", "mln"
    )
    assert "did you mean 'cosine'?" in refused(capsys, "pretrain", *flags, *out, "--schedule.name", "cosin")
    assert "did you mean 'adamw'?" in refused(capsys, "pretrain", *flags, *out, "--optimizer.name", "adam")
    assert "--layers must be a whole number, not 'two'" in refused(capsys, "pretrain", *flags, *out, "--layers", "two")
    assert not (tmp_path / "run").exists()


def test_yaml(capsys, tmp_path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("layers: many\n")
    assert "c.yaml: layers must be a whole number, found text ('many')" in refused(capsys, "pretrain", path)
    path.write_text("optimizer:\n  learning_rat: 1\n")
    assert "did you mean 'learning_rate'" in refused(capsys, "pretrain", path)
    assert "configuration file" in refused(capsys, "pretrain", tmp_path / "none.yaml")


def test_budgets(capsys, flags, tmp_path) -> None:
    given = [flag for flag in flags if flag not in ("--steps", "30")]
    out = ("--out", tmp_path / "run")
    assert "give one of --steps, --tokens and --minutes, not none" in refused(capsys, "pretrain", *given, *out)
    assert "not steps and tokens" in refused(capsys, "pretrain", *flags, *out, "--tokens", "5")
    assert "--steps must be at least 1, not 0" in refused(capsys, "pretrain", *given, *out, "--steps", "0")
    assert "warm-up of 40 steps does not fit a run of 30" in refused(
        capsys, "pretrain", *flags, *out, "--schedule.warmup", "40"
    )


def test_sources(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)

    def prepare(name: str, content: bytes, *more: str) -> str:
        (tmp_path / name).write_bytes(content)
        return refused(capsys, "prepare", "--source", name, "--out", "out", *more)

    assert "does not exist" in refused(capsys, "prepare", "--source", "none.txt", "--out", "out")
    assert "no file matches" in refused(capsys, "prepare", "--source", "none*.txt", "--out", "out")
    assert "has no text" in prepare("empty.txt", b"")
    assert "binary" in prepare("binary.txt", b"abc\x00\x01\x02" * 50)
    assert "not UTF-8" in prepare("latin.txt", "Gr\u00fc\u00dfe".encode("latin1") * 50)
    good = json.dumps({"text": "words"}).encode()
    assert "broken.jsonl, line 2 is not JSON" in prepare("broken.jsonl", good + b"\n{oops\n")
    message = prepare("field.jsonl", good + b"\n" + json.dumps({"txt": "a"}).encode())
    assert "field.jsonl, line 2 has no column 'text'; did you mean 'txt'?" in message
    assert not (tmp_path / "out").exists()
    # The same through pretrain, which prepares first.
    assert "does not exist" in refused(capsys, "pretrain", "--data", "none.txt", "--steps", "1")
    assert not (tmp_path / "runs").exists()


def test_shapes(capsys, flags, tmp_path) -> None:
    out = ("--out", tmp_path / "run")
    assert "heads 3 do not divide width 32" in refused(capsys, "pretrain", *flags, *out, "--heads", "3")
    assert "length 32 is longer than the 16 positions" in refused(
        capsys, "pretrain", *flags, *out, "--max-positions", "16"
    )
    longer = ("--length", "30000", "--batch-size", "1")
    assert "for validation, less than one sequence of 30000" in refused(capsys, "pretrain", *flags, *out, *longer)
    assert "less than one batch of 100000" in refused(capsys, "pretrain", *flags, *out, "--batch-size", "100000")
    assert not (tmp_path / "run").exists()


def test_shards(capsys, flags, prepared, tmp_path) -> None:
    copy = tmp_path / "data"
    shutil.copytree(prepared, copy)
    given = [str(copy) if flag == str(prepared) else flag for flag in flags]
    out = ("--out", tmp_path / "run")
    shard = next(copy.glob("train-*.tokens.npy"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    assert f"{shard} has" in refused(capsys, "pretrain", *given, *out)
    shard.write_bytes(whole)
    tokenizer = copy / "tokenizer" / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    vocabulary = content["model"]["vocab"]
    words = [word for word in vocabulary if word.isalpha()]
    vocabulary[words[0]], vocabulary[words[1]] = vocabulary[words[1]], vocabulary[words[0]]
    tokenizer.write_text(json.dumps(content))
    assert "another tokenizer" in refused(capsys, "pretrain", *given, *out)
    assert not (tmp_path / "run").exists()


def test_a_vocabulary_that_begins_with_that_of_the_model(capsys, flags, prepared, corpus, tmp_path) -> None:
    """Training on the same text appends to a smaller vocabulary."""
    run = tmp_path / "run"
    assert main(["pretrain", *flags, "--out", str(run), "--steps", "1"]) == 0
    data = tmp_path / "larger"
    assert main(["prepare", "--source", str(corpus), "--out", str(data), "--vocab-size", "900"]) == 0
    given = [str(data) if flag == str(prepared) else flag for flag in flags]
    capsys.readouterr()
    assert main(["pretrain", *given, "--steps", "1", "--out", str(tmp_path / "other"), "--init-from", str(run)]) == 0
    assert "300 new rows of the word embedding" in capsys.readouterr().err


def test_run_folders(capsys, flags, tmp_path) -> None:
    run = tmp_path / "run"
    assert main(["pretrain", *flags, "--out", str(run), "--steps", "2"]) == 0
    assert f"--resume {run}" in refused(capsys, "pretrain", *flags, "--out", run)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("hello")
    assert "already contains other files" in refused(capsys, "pretrain", *flags, "--out", tmp_path / "full")
    assert os.listdir(tmp_path / "full") == ["letter.txt"]
    (tmp_path / "file").write_text("")
    assert "file" in refused(capsys, "pretrain", *flags, "--out", tmp_path / "file" / "run")


def test_no_permission(capsys, flags) -> None:
    """Below /sys not even root may make a folder."""
    if not Path("/sys").is_dir():
        pytest.skip("no /sys on this system")
    assert "no permission to write /sys/fastbert" in refused(capsys, "pretrain", *flags, "--out", "/sys/fastbert/run")


def test_disk_full_in_the_middle_of_a_save(capsys, flags, tmp_path, monkeypatch) -> None:
    run = tmp_path / "run"
    real, calls = os.fsync, []

    def fsync(handle: int) -> None:
        calls.append(handle)
        saves = run / "checkpoints"
        if any(saves.glob("step-*")) and any(saves.glob(".step-*.tmp")):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    message = refused(capsys, "pretrain", *flags, "--out", run)
    assert "the disk is full" in message and "step-00000010" in message
    monkeypatch.undo()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000007"]
    assert main(["pretrain", "--resume", str(run)]) == 0


def test_a_disk_too_small_is_seen_before_the_start(capsys, flags, tmp_path, monkeypatch) -> None:
    free_space(monkeypatch, 1000)
    assert "the disk of" in refused(capsys, "pretrain", *flags, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_models_to_evaluate_and_export(capsys, flags, corpus, tmp_path) -> None:
    assert "no folder" in refused(capsys, "evaluate", "--model", tmp_path / "none", "--source", corpus)
    (tmp_path / "empty").mkdir()
    assert "holds no model" in refused(capsys, "export", tmp_path / "empty", "--out", tmp_path / "x")
    assert "no folder" in refused(capsys, "pretrain", *flags, "--out", tmp_path / "r", "--init-from", tmp_path / "none")
    assert not (tmp_path / "r").exists()


def test_devices(capsys, flags, tmp_path) -> None:
    out = ("--out", tmp_path / "run")
    assert "device" in refused(capsys, "pretrain", *flags, *out, "--machine.device", "gpu")
    assert "precision" in refused(capsys, "pretrain", *flags, *out, "--machine.precision", "fp8")


def test_a_problem_begins_with_its_name_once() -> None:
    assert about("a.yaml", UserError("a.yaml: no file")) == "a.yaml: no file"
    assert about("a.yaml", UserError("a.yaml, line 3")) == "a.yaml: a.yaml, line 3"


def test_choose_names_the_nearest() -> None:
    assert "did you mean 'pear'?" in nearest("PEER", ["pear", "apple"])
    assert choose("fruit", "pear", ["pear", "apple"]) == "pear"
    with pytest.raises(UserError, match="unknown fruit 'peer'; did you mean 'pear'\\? known: apple, pear"):
        choose("fruit", "peer", ["pear", "apple"])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "1000 None False"),
        ({"GOMP_SPINCOUNT": "7"}, "7 None False"),
        ({"OMP_WAIT_POLICY": "active"}, "None active False"),
    ],
)
def test_openmp_threads_spin_shortly_unless_the_user_decides(given: dict[str, str], expected: str) -> None:
    script = """
import os, sys
from fastbert import cli
def show(arguments):
    print(os.environ.get("GOMP_SPINCOUNT"), os.environ.get("OMP_WAIT_POLICY"), "torch" in sys.modules)
    return 0
cli.JOBS["show"] = (show, "")
sys.argv = ["fastbert", "show"]
cli.console_script()
"""
    inherited = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", script], env=inherited | given, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == expected.split()
