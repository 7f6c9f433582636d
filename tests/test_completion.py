"""`fastbert completion`: completions as bash makes them."""

import subprocess
from pathlib import Path

from fastbert.cli import JOBS, main

COMPLETE = """
source completion.bash
while read -r line; do
  read -ra COMP_WORDS <<< "$line"
  [[ $line == *' ' ]] && COMP_WORDS+=('')
  COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMP_LINE=$line COMP_POINT=${#line} COMPREPLY=()
  _shtab_fastbert
  echo "${COMPREPLY[*]}"
done
"""
EXPECTED = {
    "fastbert pre": "prepare pretrain predict",
    "fastbert pretrain ti": "tiny-electra tiny-multiple-choice tiny",
    "fastbert pretrain min": "mini mine.yaml",
    "fastbert run enc": "encoder-study",
    "fastbert pretrain tiny --optimizer.na": "--optimizer.name",
    "fastbert pretrain --no-low": "--no-lowercase",
    "fastbert pretrain --position tu": "tupe-a tupe-r",
    "fastbert pretrain --objective m": "mlm multiple-choice",
    "fastbert finetune --model mod": "models",
    "fastbert bench k": "kernels",
    "fastbert completion z": "zsh",
}


def test_completions_in_bash(tmp_path: Path, monkeypatch, capsys) -> None:
    """Jobs, names and files of configurations, flags, choices and folders."""
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").touch()
    Path("mine.txt").touch()
    Path("models").mkdir()
    assert main(["completion", "bash"]) == 0
    Path("completion.bash").write_text(capsys.readouterr().out)
    lines = "".join(f"{line}\n" for line in EXPECTED)
    found = subprocess.run(["bash", "-c", COMPLETE], input=lines, capture_output=True, text=True)
    assert found.stderr == "" and dict(zip(EXPECTED, found.stdout.splitlines(), strict=True)) == EXPECTED


def test_the_script_for_zsh_has_all_jobs(capsys) -> None:
    assert main(["completion", "zsh"]) == 0
    script = capsys.readouterr().out
    assert all(job in script for job in JOBS) and "--learning-rate" in script


def test_other_uses(capsys) -> None:
    for arguments, code, message in (
        ([], 2, "usage: fastbert completion {bash,zsh}"),
        (["--help"], 0, "source <(fastbert completion bash)"),
        (["bahs"], 2, "did you mean 'bash'?"),
        (["bash", "more"], 2, "takes one argument, the shell, not 'more' too"),
    ):
        assert main(["completion", *arguments]) == code
        printed = capsys.readouterr()
        assert message in printed.out + printed.err
