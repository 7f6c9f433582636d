"""The command line of a job: a flag for every field of its options dataclass, and the help that lists them.

Fields of a group are `--group.field`, fields of a group marked `flat` are `--field`; underscores become dashes. The
help of a flag is the docstring below its field.
"""

import argparse
import ast
import inspect
import re
import textwrap
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from itertools import pairwise
from typing import Any, TypeVar

from fastbert.config import convert_text
from fastbert.errors import OptionError, UserError, brief, closest
from fastbert.option_hints import hint_for
from fastbert.ranges import hints_of, plain, problem_of, takes_none

Options = TypeVar("Options")

TAKES_YAML = ("pretrain", "finetune", "sweep", "ablate", "active", "run")  # jobs that read options from a file
NEAR = 0.7  # minimum similarity of a suggested flag: among many flags one is always slightly similar
EXAMPLES = {
    "prepare": "--source 'wiki/*.txt.xz' --out data/wiki",
    "merge": "parts/1 parts/2 --out data/wiki",
    "extend-vocab": "--tokenizer runs/base --source german.txt --words 3000 --out tok-de",
    "pretrain": "base --data data/wiki --out runs/base",
    "evaluate": "--model runs/base --source held-out.txt",
    "fill": "runs/base 'The [MASK] of the United States.'",
    "finetune": "--model runs/base --task rte --glue-dir glue --out results/rte",
    "affinity": "--tasks mrpc,rte,stsb --model runs/base --glue-dir glue --out results/affinity",
    "predict": "--model results/rte --source new.csv --out predictions.jsonl",
    "weak-label": "--task sst2 --glue-dir glue --functions configs/weak/sst2.yaml --out weak",
    "audit": "--task mine.yaml --model runs/base --out audit",
    "select": "--task mine.yaml --pool pool.jsonl --model results/mine --count 50 --out round-2.jsonl",
    "submit": "--results results/glue --glue-dir glue --fill --out submission.zip",
    "export": "runs/base --out my-bert",
    "sweep": "configs/sweep/glue.yaml --workers 2",
    "ablate": "configs/ablate/tiny.yaml --workers 2",
    "active": "configs/active/sst2.yaml --workers 2 --glue-dir glue",
    "run": "configs/pipelines/encoder-study.yaml --workers 2",
    "report": "runs/base runs/rope --out comparison.html",
    "bench throughput": "--data data/wiki",
    "bench data": "--data wiki.txt --megabytes 20",
    "bench kernels": "--seconds 2",
}
"""Example arguments for each job."""


@dataclass(frozen=True)
class Flag:
    """One option on the command line."""

    name: str
    """Name without the leading dashes, such as optimizer.learning-rate."""
    path: tuple[str, ...]
    """Names of the nested fields from the job's dataclass to the flag."""
    field: Field
    hint: Any
    """Type, annotated with the declared range."""
    help: str
    group: str
    """Docstring of the group; empty for flags of the job itself."""

    @property
    def kind(self) -> type:
        """Type of the values, without None."""
        return typing.get_args(plain(self.hint))[0] if self.repeats else plain(self.hint)

    @property
    def optional(self) -> bool:
        return takes_none(self.hint)

    @property
    def repeats(self) -> bool:
        """True if the flag accepts any number of values."""
        return typing.get_origin(plain(self.hint)) is tuple

    @property
    def is_positional(self) -> bool:
        """True if the values may be given without the flag."""
        return bool(self.field.metadata.get("positional"))

    @property
    def is_switch(self) -> bool:
        """True if the flag has no value, and --no-... is its opposite."""
        return plain(self.hint) is bool and not self.optional

    @property
    def negation(self) -> str:
        group, dot, name = self.name.rpartition(".")
        return f"{group}{dot}no-{name}"

    @property
    def metavar(self) -> str:
        choices = self.field.metadata.get("choices") or (("true", "false") if self.kind is bool else None)
        return f"{{{','.join(choices)}}}" if choices else {int: "N", float: "X"}.get(self.kind, "TEXT")


def parse(cls: type[Options], arguments: Sequence[str], job: str, default: Options | None = None) -> Options:
    """Parses flags into options.

    Args:
        cls: the job's dataclass.
        arguments: the arguments after `fastbert <job>`, without a YAML file.
        job: name of the job, for the help.
        default: values to start from, such as those of a YAML file.

    Raises:
        SystemExit: with 0 after --help.
        UserError: a flag is unknown, is given twice, or lacks its value or has an invalid one; or a required flag is
            missing.
    """
    flags = list(flags_of(cls))
    arguments = [normalized(argument) for argument in arguments]
    parser = _parser(cls, flags, job, default)
    if {"-h", "--help"} & set(arguments):
        parser.print_help()
        raise SystemExit(0)
    arguments = name_positionals(arguments, flags)
    refuse_unknown(arguments, flags, job)
    refuse_repeated(arguments)
    given = vars(parser.parse_args(with_equals(arguments, flags)))
    return _build(cls, {flag.path: given[flag.name] for flag in flags if flag.name in given}, default, job)


def parser_of(cls: type, job: str) -> argparse.ArgumentParser:
    """The parser of a job's flags."""
    return _parser(cls, list(flags_of(cls)), job, None)


def flags_of(cls: type, prefix: str = "", path: tuple[str, ...] = (), group: str = "") -> Iterator[Flag]:
    """The flags of a dataclass, in the order of its fields."""
    hints, docs = hints_of(cls), field_docs(cls)
    for field in fields(cls):
        hint, here = hints[field.name], (*path, field.name)
        if is_dataclass(hint):
            flat = field.metadata.get("flat")
            title = group if flat else inspect.getdoc(hint).partition("\n\n")[0]
            inner = prefix if flat else f"{prefix}{field.name}.".replace("_", "-")
            yield from flags_of(hint, inner, here, title)
        else:
            name = f"{prefix}{field.name}".replace("_", "-")
            yield Flag(name, here, field, hint, docs.get(field.name, ""), group)


@cache
def field_docs(cls: type) -> dict[str, str]:
    """The docstring below each field of a dataclass and its bases, with paragraphs on a single line."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if is_dataclass(base) and not vars(base).get("GENERATED"):
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body
            for statement, following in pairwise(body):
                is_text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                if isinstance(statement, ast.AnnAssign) and is_text and isinstance(following.value.value, str):
                    docs[statement.target.id] = unwrapped(following.value.value)
    return docs


def unwrapped(text: str) -> str:
    """`text` with a line for each paragraph or list item (`- `)."""
    return re.sub(r"(?<!\n)\n(?!- |\n)\s*", " ", inspect.cleandoc(text))


def normalized(argument: str) -> str:
    """A flag with dashes instead of underscores; its value and other arguments are unchanged."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def name_positionals(arguments: Sequence[str], flags: Sequence[Flag]) -> list[str]:
    """Inserts the flags of positional options before arguments that belong to no flag; remaining arguments come
    last."""
    positional = [flag for flag in flags if flag.is_positional]
    if not positional:
        return list(arguments)
    limits = {f"--{flag.name}": len(arguments) if flag.repeats else 1 for flag in flags if not flag.is_switch}
    named: list[str] = []
    bare: list[str] = []
    free = 0  # values that may follow
    for argument in arguments:
        if argument.startswith("--"):
            free = limits.get(argument, 0)
            named.append(argument)
        elif free:
            free -= 1
            named.append(argument)
        else:
            bare.append(argument)
    given = {argument.partition("=")[0] for argument in named}
    for flag in positional:
        if bare and f"--{flag.name}" not in given:
            count = len(bare) if flag.repeats else 1
            named += [f"--{flag.name}", *bare[:count]]
            bare = bare[count:]
    return named + bare


def with_equals(arguments: Sequence[str], flags: Sequence[Flag]) -> list[str]:
    """Joins flags with a single value to --flag=value, because argparse would read a value such as -1e3 as a flag."""
    single = {f"--{flag.name}" for flag in flags if not flag.is_switch and not flag.repeats}
    out: list[str] = []
    for argument in arguments:
        if out and out[-1] in single and not argument.startswith("--"):
            out[-1] = f"{out[-1]}={argument}"
        else:
            out.append(argument)
    return out


# --- errors in a command line


def refuse_unknown(arguments: Sequence[str], flags: Sequence[Flag], job: str) -> None:
    """Raises a UserError if a flag is unknown, or an argument belongs to none."""
    known = {f"--{flag.name}": flag for flag in flags} | {
        f"--{flag.negation}": flag for flag in flags if flag.is_switch
    }
    free = 0  # values that may follow
    before = ""
    for argument in arguments:
        if argument.startswith("--"):
            before, equals, _ = argument.partition("=")
            if before not in known:
                hint = suggestion(before.removeprefix("--"), flags)
                see = f"{hint} See" if hint.endswith("?") else f"{hint}; see" if hint else "see"
                raise UserError(f"unknown option {brief(before, str)}; {see} fastbert {job} --help")
            flag = known[before]
            if equals and flag.is_switch:
                raise UserError(f"--{flag.name} takes no value; give it alone, or --{flag.negation} for the opposite")
            free = 0 if equals or flag.is_switch else len(arguments) if flag.repeats else 1
        elif free:
            free -= 1
        else:
            first = "" if before or argument.startswith("-") else f", such as --{flags[0].name} {brief(argument, str)}"
            raise UserError(f"{brief(argument)} belongs to no option{_remedy(argument, known.get(before), job, first)}")


def _remedy(argument: str, before: Flag | None, job: str, example: str) -> str:
    """Advice for an argument without a flag; `example` shows a possible flag, or is empty."""
    if before is not None and before.is_switch:
        return f": --{before.name} takes no value; leave it out, or give --{before.negation} for the opposite"
    if argument.endswith((".yaml", ".yml")):
        return f"; a YAML file comes first: fastbert {job} {brief(argument, str)} [options]"
    if before is not None:
        return f": --{before.name} takes one value; put quotes around one that contains spaces"
    return f"; options begin with --{example}, see fastbert {job} --help"


def suggestion(name: str, flags: Sequence[Flag]) -> str:
    """Suggestion for the unknown flag `name`, as part of a sentence; empty if nothing is similar."""
    if hint := hint_for(name, {flag.name for flag in flags}):
        return hint
    near = near_flags(name, flags)
    return f"did you mean {' or '.join(f'--{one}' for one in near)}?" if near else ""


def near_flags(name: str, flags: Sequence[Flag]) -> list[str]:
    """Up to three flags of any group that are similar to `name`: equal except for the group, with these initials (lr),
    beginning or ending with this word, or with similar spelling."""
    bare = name.removeprefix("no-").rpartition(".")[2].lower()
    last = {flag.name: flag.name.rpartition(".")[2] for flag in flags}
    if inside := [flag for flag in last if flag.startswith(f"{bare}.")]:  # a group: the flag that selects or enables it
        return [flag for flag in inside if last[flag] in ("name", "enabled")] or inside[:3]
    for fits in (
        lambda its: its == bare,
        lambda its: "".join(word[0] for word in its.split("-")) == bare and "-" in its,
        lambda its: its.startswith(f"{bare}-") or its.endswith(f"-{bare}"),
    ):
        if found := [flag for flag, its in last.items() if fits(its)]:
            return found[:3]
    if near := closest(name, last, NEAR):
        return [near]
    near = closest(bare, last.values(), NEAR)
    return [flag for flag, its in last.items() if its == near][:3]


def refuse_repeated(arguments: Sequence[str]) -> None:
    """Refuses a flag that is given twice, because one of the values would be dropped.

    `--flag value`, `--flag=value`, and `--no-flag` of a switch are the same flag; no value begins with --.

    Raises:
        UserError: a flag is given twice; the message names it.
    """
    seen: dict[str, str] = {}
    for argument in arguments:
        if argument.startswith("--"):
            flag = argument.partition("=")[0]
            name = re.sub(r"(--|\.)no-", r"\1", flag)
            if name in seen:
                twice = flag if flag == seen[name] else f"{seen[name]} with {flag}, which is the same option,"
                raise UserError(f"{twice} is given twice; it takes one value: leave one of them out")
            seen[name] = flag


# --- parsing and building


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(message.removeprefix("argument ").replace("expected one argument", "a value is missing"))


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=22)
        self._width = min(self._width, 100)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return [
            line
            for paragraph in text.splitlines()
            for line in textwrap.wrap(
                paragraph, width, subsequent_indent="  " * paragraph.startswith("- "), break_on_hyphens=False
            )
        ]

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = unwrapped(text).split("\n")
        return "\n".join(
            textwrap.fill(part, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
            for part in paragraphs
        )


def _parser(cls: type, flags: Sequence[Flag], job: str, default: Any) -> argparse.ArgumentParser:
    names = [flag.name.upper() for flag in flags if flag.is_positional and not flag.repeats]
    names += [f"[{flag.name.upper()} ...]" for flag in flags if flag.is_positional and flag.repeats]
    positional = "".join(f"{name} " for name in names)
    parser = _Parser(
        f"fastbert {job}",
        f"fastbert {job} {'[FILE.yaml] ' if job in TAKES_YAML else ''}{positional}[options]",
        description=cls.__doc__,
        epilog=f"example: fastbert {job} {EXAMPLES[job]}" if job in EXAMPLES else None,
        formatter_class=_Help,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    groups: dict[str, Any] = {"": parser}
    for flag in flags:
        prefix = flag.name.rpartition(".")[0]
        if prefix not in groups:
            groups[prefix] = parser.add_argument_group(f"--{prefix}...", flag.group)
        text = help_of(flag, default).replace("%", "%%")
        if flag.is_positional:
            text += f" May be given without --{flag.name}."
        add = groups[prefix].add_argument
        if flag.is_switch:
            add(f"--{flag.name}", f"--{flag.negation}", dest=flag.name, help=text, action=_Switch, nargs=0)
        else:
            several = {"nargs": "*"} if flag.repeats else {}
            add(f"--{flag.name}", dest=flag.name, help=text, metavar=flag.metavar, type=_reader(flag), **several)
    return parser


class _Switch(argparse.Action):
    """--group.name for true, --group.no-name for false."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, option_string == self.option_strings[0])


def _reader(flag: Flag) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        if flag.optional and text == "None":
            return None
        try:
            value = convert_text(text, flag.kind)
        except ValueError as error:
            raise UserError(f"--{flag.name} {error}") from None
        if problem := problem_of(value, flag.hint):
            raise UserError(f"--{flag.name} {problem}")
        return value

    return read


def help_of(flag: Flag, default: Any) -> str:
    """Help text of a flag with its default; a default of None is explained in the text itself."""
    value = flag.field.default
    if flag.field.default_factory is not MISSING:
        value = flag.field.default_factory()
    own = value
    if default is not None:
        value = default
        for name in flag.path:
            value = getattr(value, name)
    if value is MISSING:
        return f"{flag.help} (required)"
    if value is None or value == ():
        return flag.help
    word = "default" if value == own else "given"
    shown = str(value).lower() if isinstance(value, bool) else value
    return f"{flag.help} ({word}: {shown})"


def _build(cls: type, given: dict[tuple[str, ...], Any], default: Any, job: str, prefix: str = "") -> Any:
    """Creates the dataclass `cls` from the values of flags by the path of their fields."""
    hints, arguments = hints_of(cls), {}
    missing = []
    for field in fields(cls):
        hint = hints[field.name]
        before = None if default is None else getattr(default, field.name)
        if is_dataclass(hint):
            inside = {path[1:]: value for path, value in given.items() if path[0] == field.name}
            inner = prefix if field.metadata.get("flat") else f"{prefix}{field.name}."
            arguments[field.name] = _build(hint, inside, before, job, inner) if inside or default is None else before
        elif (field.name,) in given:
            value = given[(field.name,)]
            arguments[field.name] = tuple(value) if isinstance(value, list) else value
        elif default is not None:
            arguments[field.name] = before
        elif field.default is MISSING and field.default_factory is MISSING:
            missing.append(_named(prefix, field.name))
    if missing:
        raise UserError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing; see fastbert {job} --help"
        )
    try:
        return cls(**arguments)
    except OptionError as error:
        raise UserError(f"{_named(prefix, error.name)} {error.problem}") from None


def _named(prefix: str, name: str) -> str:
    """Flag of a field."""
    return f"--{prefix}{name}".replace("_", "-")
