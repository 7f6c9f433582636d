"""`fastbert completion SHELL`: prints a script that completes jobs, flags, their choices and files, made by shtab."""

import argparse
from collections.abc import Mapping
from typing import Any

from fastbert.errors import UserError, choose
from fastbert.flags import TAKES_YAML, Flag, flags_of, parser_of
from fastbert.named_configs import named_configs

SHELLS = ("bash", "zsh")
HOW = """usage: fastbert completion {bash,zsh}

Print a script that completes jobs, flags and their values in a shell. In bash, for this session and for later ones:

  source <(fastbert completion bash)
  fastbert completion bash >> ~/.bash_completion

In zsh, in a folder of $fpath:  fastbert completion zsh > ~/.zfunc/_fastbert"""


def completion(shell: str, jobs: Mapping[str, str], options: Mapping[str, type]) -> str:
    """The script for a shell.

    Args:
        jobs: name -> what it does; a job of several words, such as `bench data`, has one entry for its first word.
        options: name -> options.

    Raises:
        UserError: shtab is not installed, or does not know the shell.
    """
    choose("shell", shell, SHELLS)
    try:
        import shtab
    except ImportError:
        raise UserError("fastbert completion needs the package shtab: pip install shtab") from None
    parser = argparse.ArgumentParser("fastbert", description="pretraining BERT-class encoders")
    parser.add_argument("--version", action="store_true", help="print the version")
    groups: dict[str, Any] = {"": parser.add_subparsers()}
    for job, cls in options.items():
        group, _, name = job.rpartition(" ")
        if group not in groups:
            groups[group] = groups[""].add_parser(group, help=jobs[group]).add_subparsers()
        what = jobs.get(job, "").replace("%", "%%")
        made = groups[group].add_parser(name, help=what, parents=[with_values(job, cls, shtab.FILE)], add_help=False)
        if job in TAKES_YAML:
            file = made.add_argument("file", nargs="?", help="a YAML file, or its name")
            file.complete = yaml_files(job)
    groups[""].add_parser("completion", help="print a script that completes commands").add_argument(
        "shell", choices=SHELLS
    )
    return shtab.complete(parser, shell)


def with_values(job: str, cls: type, file: Any) -> argparse.ArgumentParser:
    """The parser of a job, whose flags have the choices or files that complete their values."""
    parser = parser_of(cls, job)
    by_name: dict[str, Flag] = {flag.name: flag for flag in flags_of(cls)}
    for action in parser._actions:
        flag = by_name.get(action.dest)
        if flag is None or flag.is_switch:
            continue
        if choices := flag.field.metadata.get("choices"):
            action.choices = list(choices)
        elif flag.kind is str:
            action.complete = file
    return parser


def yaml_files(job: str) -> dict[str, Any]:
    """Completion of the YAML file of a job: names of those that come with fastbert, and files."""
    function = f"_fastbert_{job}_file"
    lines = [
        f'compgen -W "{" ".join(named_configs(job))}" -- "$1"',
        """compgen -f -X '!*.y*ml' -- "$1\"""",
        'compgen -d -- "$1"',
    ]
    return {
        "bash": function,
        "zsh": "_files",
        "preamble": {"bash": f"{function}() {{\n  {'; '.join(lines)}\n}}\n"},
    }
