"""Options: dataclasses beside the code that uses them, filled from a YAML file and from flags; flags win.

A field is marked through `dataclasses.field(metadata=...)`: `flat` lifts the fields of a group to the level above
(`--layers`, not `--encoder.layers`), `role` says what a change means for a run that is resumed. Fields without a role
are science: they define the experiment.
"""

import hashlib
import json
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastbert.errors import OptionError, UserError, brief, nearest
from fastbert.inputs import read_text_input
from fastbert.ranges import hints_of, problem_of

Options = TypeVar("Options")

FLAT = {"flat": True}
MACHINE = {"role": "machine"}
BOOKKEEPING = {"role": "bookkeeping"}

LARGEST_YAML = 2**20  # bytes
_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)


def parse(cls: type[Options], arguments: Sequence[str], job: str, default: Options | None = None) -> Options:
    """Options from flags.

    Args:
        cls: the job's dataclass.
        arguments: what stands behind `fastbert <job>`, without a YAML file.
        job: its name, for the help.
        default: values to start from, such as those of a YAML file.

    Raises:
        SystemExit: with 0 after --help, with 2 after a flag that does not fit.
        UserError: a flag is given twice, or its value does not fit.
    """
    import tyro

    refuse_repeated(arguments)
    check_flags(cls, arguments)
    _lift_flat_flags(cls)
    required = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
    if default is None and not required:
        default = cls()
    try:
        return tyro.cli(
            cls,
            prog=f"fastbert {job}",
            args=arguments,
            **({} if default is None else {"default": default}),
        )
    except OptionError as error:
        raise UserError(f"{_flag_of_group(cls, error.group)}{error.name.replace('_', '-')} {error.problem}") from None


def check_flags(cls: type, arguments: Sequence[str]) -> None:
    """Compares the values of known flags with the types and ranges of their options.

    Raises:
        UserError: names the flag and what was expected.
    """
    hints = flag_hints(cls)
    for index, argument in enumerate(arguments):
        flag, assigned, text = argument.partition("=")
        flag = flag.replace("_", "-")
        if not argument.startswith("--") or flag not in hints:
            continue
        kind = _plain(hints[flag])
        if not assigned and kind is not bool:
            values = list(takewhile(lambda value: not value.startswith("--"), arguments[index + 1 :]))
            if not values:
                raise UserError(f"{flag} has no value; give one after it")
            text = values[0] if typing.get_origin(kind) is not tuple else tuple(values)
        if text == "None" and _takes_none(hints[flag]):
            continue
        value = _number(text, kind, flag) if kind in (int, float) else text
        if kind is not bool and (problem := problem_of(value, hints[flag])):
            raise UserError(f"{flag} {problem}")


def flag_hints(cls: type, prefix: str = "") -> dict[str, Any]:
    """Flag, such as --optimizer.learning-rate -> the type hint of its option, with what it declares."""
    out: dict[str, Any] = {}
    hints = hints_of(cls)
    for field in fields(cls):
        name = field.name.replace("_", "-")
        group = _plain(hints[field.name])
        if is_dataclass(group):
            out |= flag_hints(group, prefix if field.metadata.get("flat") else f"{prefix}{name}.")
        else:
            out[f"--{prefix}{name}"] = hints[field.name]
    return out


def _flag_of_group(cls: type, group: type) -> str:
    """How the flags of a group of the job `cls` begin."""
    for field in fields(cls):
        if _plain(hints_of(cls)[field.name]) is group and not field.metadata.get("flat"):
            return f"--{field.name.replace('_', '-')}."
    return "--"


def _plain(hint: Any) -> Any:
    """The type of an option without `| None` and what it declares besides."""
    if typing.get_origin(hint) is Annotated:
        return _plain(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return next(_plain(arm) for arm in typing.get_args(hint) if arm is not types.NoneType)
    return hint


def _takes_none(hint: Any) -> bool:
    return types.NoneType in typing.get_args(hint) or any(map(_takes_none, typing.get_args(hint)))


_WHOLE = re.compile(r"[-+]?\d+(_\d+)*", re.ASCII)
_LONGEST_NUMBER = 400  # characters; what is longer is beyond every limit


def _number(text: str, kind: type, name: str) -> int | float:
    """The number that a flag's text is.

    Raises:
        UserError: it is none.
    """
    if kind is float and re.fullmatch(r"[-+]?(inf(inity)?|nan)", text.strip().lower()):
        raise UserError(f"{name} must be a finite number, not {text.strip()}")
    form = _WHOLE if kind is int else _FLOAT
    if not form.fullmatch(text) or len(text) > _LONGEST_NUMBER:
        raise UserError(f"{name} must be {_NAMES[kind]}, not {brief(text)}")
    return kind(text)


def refuse_repeated(arguments: Sequence[str]) -> None:
    """No option takes several values, and of two the parser would drop the first in silence.

    `--flag value`, `--flag=value`, `--some_flag`, and `--no-flag` of a switch are one flag; no value begins with --.

    Raises:
        UserError: names the flag.
    """
    seen: dict[str, str] = {}
    for argument in arguments:
        if argument.startswith("--"):
            flag = argument.partition("=")[0].replace("_", "-")
            name = re.sub(r"(--|\.)no-", r"\1", flag)
            if name in seen:
                twice = flag if flag == seen[name] else f"{seen[name]} with {flag}, which is the same option,"
                raise UserError(f"{twice} is given twice; it takes one value: leave one of them out")
            seen[name] = flag


def _lift_flat_flags(cls: type) -> None:
    """Tells tyro to leave the name of flat groups out of their flags; done here so that only parsing needs tyro."""
    import tyro

    for field in fields(cls):
        if field.metadata.get("flat") and not hasattr(cls.__annotations__[field.name], "__metadata__"):
            cls.__annotations__[field.name] = Annotated[field.type, tyro.conf.arg(name="")]


def load_yaml(cls: type[Options], path: str | Path) -> Options:
    """The options in a YAML file; keys are the flags' names, groups are mappings.

    Raises:
        UserError: names the file, the key, and what was expected.
    """
    return from_dict(cls, read_yaml(path), where=str(path))


def read_yaml(path: str | Path) -> Any:
    """What a YAML file holds; an empty one holds no options.

    Raises:
        UserError: there is no such file, or it is not YAML.
    """
    from fastbert.yaml_text import parse_yaml  # yaml is imported where it is needed

    values = parse_yaml(read_text_input(path, "configuration file", LARGEST_YAML), str(path))
    return {} if values is None else values


def with_underscores(values: dict[str, Any], where: str) -> dict[str, Any]:
    """`values` under the names that options have in Python: batch-size is batch_size.

    Raises:
        UserError: an option stands there under both names.
    """
    named: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name in named:
            raise UserError(f"{where}: {brief(name, str)} is given twice, with - and with _; leave one of them out")
        named[name] = value
    return named


def from_dict(cls: type[Options], values: Any, where: str) -> Options:
    """The dataclass `cls` from nested mappings, strictly typed; `where` names their origin in errors."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected a mapping of options, found {_kind(values)}")
    hints = hints_of(cls)
    values = with_underscores(values, where)
    known: dict[str, str | None] = {}  # key in the file -> the flat group it belongs to
    for field in fields(cls):
        if field.metadata.get("flat"):
            known.update({name: field.name for name in (f.name for f in fields(_plain(hints[field.name])))})
        else:
            known[field.name] = None
    for key in values:
        if key not in known:
            raise UserError(f"{where}: unknown option {brief(key)}; {nearest(key, known)}")
    arguments = {}
    for field in fields(cls):
        hint = hints[field.name]
        if field.metadata.get("flat"):
            group = {key: value for key, value in values.items() if known[key] == field.name}
            arguments[field.name] = from_dict(_plain(hint), group, where)
        elif field.name in values:
            value = values[field.name]
            if is_dataclass(_plain(hint)):
                arguments[field.name] = from_dict(_plain(hint), value, f"{where}: {field.name}")
            else:
                arguments[field.name] = _convert(value, hint, f"{where}: {field.name}")
        elif field.default is MISSING and field.default_factory is MISSING:
            raise UserError(f"{where}: the option {field.name!r} is missing")
    try:
        return cls(**arguments)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _convert(value: Any, hint: Any, where: str) -> Any:
    """`value`, as a file has it, as the option that is declared as `hint` takes it.

    Raises:
        UserError: it does not fit.
    """
    if value is None and _takes_none(hint):
        return None
    kind = _plain(hint)
    if kind is float and isinstance(value, str) and _FLOAT.fullmatch(value):
        value = float(value)  # YAML 1.1 reads 1e-3, which has no point, as text
    if kind is float and type(value) is int and value.bit_length() < 1000:
        value = float(value)
    if kind is int and isinstance(value, float) and value.is_integer() and abs(value) <= 2**53:
        value = int(value)
    if isinstance(kind, type) and type(value) is not kind:
        raise UserError(f"{where} must be {_NAMES.get(kind, kind)}, found {_kind(value)}")
    if problem := problem_of(value, hint):
        raise UserError(f"{where} {problem}")
    return value


_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return f"{_NAMES.get(type(value), type(value).__name__)} ({brief(value)})"


def to_dict(options: Any) -> dict[str, Any]:
    """Nested mappings in the shape of the YAML file: flat groups lifted."""
    out: dict[str, Any] = {}
    for field in fields(options):
        value = getattr(options, field.name)
        if field.metadata.get("flat"):
            out.update(to_dict(value))
        else:
            out[field.name] = to_dict(value) if is_dataclass(value) else value
    return out


def to_yaml(options: Any) -> str:
    import yaml

    text = yaml.safe_dump(to_dict(options), sort_keys=False, allow_unicode=True)
    if re.search("[\x85\u2028\u2029]", text):  # line breaks to YAML's reader, plain characters to its writer
        return yaml.safe_dump(to_dict(options), sort_keys=False)
    return text


@dataclass(frozen=True)
class Leaf:
    """One option: its dotted name, value, and what it is (science, machine or bookkeeping)."""

    name: str
    value: Any
    role: str


def leaves(options: Any, prefix: str = "", role: str = "science") -> list[Leaf]:
    """All options of a dataclass, in order."""
    out = []
    for field in fields(options):
        value, kind = getattr(options, field.name), field.metadata.get("role", role)
        if is_dataclass(value):
            out += leaves(value, prefix if field.metadata.get("flat") else f"{prefix}{field.name}.", kind)
        else:
            out.append(Leaf(f"{prefix}{field.name}", value, kind))
    return out


def digest(values: dict[str, Any]) -> str:
    """Eight hexadecimal digits that name a set of values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line for each value that differs."""
    return [
        f"{name}: {old.get(name)!r} -> {new.get(name)!r}"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    ]
