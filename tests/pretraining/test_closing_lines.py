"""The closing lines of a run work as printed: the Python snippet runs, and the commands parse."""

import contextlib
import io
import shlex
from pathlib import Path

import pytest

from fastbert.cli import OPTIONS
from fastbert.flags import parse
from tests.flags import main

RUNS = {
    "BERT": (["--position", "absolute"], "AutoModelForMaskedLM", "', '"),
    "TUPE": (["--position", "tupe-r"], "AutoModelForMaskedLM", "', '"),
    "ELECTRA": (["--position", "absolute", "--objective", "electra"], "AutoModelForPreTraining", "[('[CLS]', 0."),
    "multiple choice": (["--objective", "multiple-choice"], "AutoModel", "tensor([["),
}
TABLE = "text,label\na,x\nb,y\n"


def closing_of(printed: str) -> tuple[str, list[str]]:
    """The snippet, and the commands."""
    python, shell = printed.split("\nIn Python\n")[1].split("\nOn the command line\n")
    return "\n".join(line.strip() for line in python.splitlines()), [line.strip() for line in shell.splitlines()]


@pytest.mark.parametrize("name", RUNS)
def test_the_snippet_runs_and_the_commands_parse(name: str, flags, tmp_path, monkeypatch, capsys) -> None:
    chosen, opens, expected = RUNS[name]
    monkeypatch.chdir(tmp_path)
    run = Path("runs", "it's mine")
    assert main(["pretrain", *flags, *chosen, "--steps", "1", "--out", str(run)]) == 0
    snippet, commands = closing_of(capsys.readouterr().out)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(snippet, {})
    assert f"import {opens}, AutoTokenizer" in snippet and expected in printed.getvalue()
    # transformers opens its own BERT and ELECTRA without the code of an export.
    assert ("trust_remote_code=True" in snippet) == (chosen[1] != "absolute")
    for name_of_file, text in (("train.csv", TABLE), ("dev.csv", TABLE), ("more.txt", "A text.\n\nAnother text.\n")):
        Path(name_of_file).write_text(text)
    fill, *others = [shlex.split(command) for command in commands if command]
    assert fill[1] == "fill" and main(fill[1:]) == 0 and "%" in capsys.readouterr().out
    for _, job, *arguments in others:
        options = parse(OPTIONS[job], arguments, job)
        assert getattr(options, "model" if job == "finetune" else "init_from") == str(run)
        options.check_inputs()
    if name == "BERT":  # whose positions bound the length
        short = (*flags[:2], "--steps", "1", "--batch-size", "2", "--out", "next")
        budget = others[-1].index("--minutes")
        assert main([*others[-1][1:budget], *short]) == 0
