"""Options: dataclasses next to the code that uses them, filled from a YAML file and from flags, which override the
file.

A field is marked by `dataclasses.field(metadata=...)`: `flat` lifts the fields of a group to the level above
(`--layers`, not `--encoder.layers`), and `role` defines what a change means for a resumed run. Fields without a role
have the role "science": they define the experiment.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Collection, Iterable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

from fastbert.errors import UserError, brief, nearest
from fastbert.inheritance import read_yaml
from fastbert.option_hints import equivalent_flags
from fastbert.ranges import hints_of, plain, problem_of, takes_none

Options = TypeVar("Options")

FLAT = {"flat": True}
MACHINE = {"role": "machine"}
BOOKKEEPING = {"role": "bookkeeping"}
POSITIONAL = {"positional": True}
"""An option that may be given without its flag, in the order of the fields."""

EXACT = 2**53  # a whole number written as a float, such as 1e5, is exact up to here
_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)


def choice(default: str, choices: Iterable[str], what: str | None = None, **metadata: Any) -> Any:
    """Field whose value is one of `choices`, for `check_values` and the help; `what` names it in error messages."""
    return dataclasses.field(default=default, metadata={**metadata, "choices": choices, "what": what})


def load_yaml(cls: type[Options], path: str | Path) -> Options:
    """Reads the options in a YAML file, including inherited ones; keys are the flags' names, groups are mappings.

    Raises:
        UserError: the file or an option is invalid; the message names file, key and expected value.
    """
    values, where = read_yaml(path)
    return from_dict(cls, values, where)


def with_underscores(values: dict[str, Any], where: str) -> dict[str, Any]:
    """`values` with the Python names of options: batch_size instead of batch-size. Raises a UserError if both are
    given."""
    named: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name in named:
            raise UserError(f"{where}: {brief(name, str)} is given twice, with - and with _; leave one of them out")
        named[name] = value
    return named


def from_dict(cls: type[Options], values: Any, where: str) -> Options:
    """Creates the dataclass `cls` from nested mappings, strictly typed; `where` names their origin in errors."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected a mapping of options, found {_kind(values)}")
    hints = hints_of(cls)
    values = with_underscores(values, where)
    known: dict[str, str | None] = {}  # key in the file -> the flat group it belongs to
    for field in fields(cls):
        if field.metadata.get("flat"):
            known.update({name: field.name for name in (f.name for f in fields(plain(hints[field.name])))})
        else:
            known[field.name] = None
    for key in values:
        if key not in known:
            kinds = {name: plain(hint) for name, hint in hints.items()}
            groups = [name for name, kind in kinds.items() if is_dataclass(kind) and key in kind.__dataclass_fields__]
            other = other_job_hint(values, known) if "out" in known else ""  # every job has it, groups do not
            hint = f"it belongs under {' or '.join(groups)}" if groups else other or suggestion(key, known)
            raise UserError(f"{where}: unknown option {brief(key)}; {hint}")
    arguments = {}
    for field in fields(cls):
        hint = hints[field.name]
        if field.metadata.get("flat"):
            group = {key: value for key, value in values.items() if known[key] == field.name}
            arguments[field.name] = from_dict(plain(hint), group, where)
        elif field.name in values:
            value = values[field.name]
            if is_dataclass(plain(hint)):
                arguments[field.name] = from_dict(plain(hint), value, f"{where}: {field.name}")
            else:
                arguments[field.name] = _convert(value, hint, f"{where}: {field.name}")
        elif field.default is MISSING and field.default_factory is MISSING:
            raise UserError(f"{where}: the option {field.name!r} is missing")
    try:
        return cls(**arguments)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def suggestion(key: str, known: Collection[str]) -> str:
    """Hint for an unknown option in a file; `known` are the valid keys."""
    names = [name for name in equivalent_flags(key) if name.partition(".")[0].replace("-", "_") in known]
    if names:
        return "did you mean {}?".format(names[0].replace("-", "_").replace(".", ": "))
    return nearest(key, known)


def other_job_hint(values: Collection[str], known: Collection[str]) -> str:
    """Hint for a file with the options of another job; empty if there are none.

    Args:
        values: the options in the file.
        known: the options of the job that reads it.
    """
    job = next((job for option, job in MARKS.items() if option in values and option not in known), "")
    return f"the file looks like one for fastbert {job}" if job else ""


MARKS = {
    **{"variants": "ablate", "learners": "active", "models": "sweep", "task": "finetune", "custom": "finetune"},
    **dict.fromkeys(("data", "objective", "position", "layers", "size"), "pretrain"),
}
"""Options that only one job has, from which the job of a file is recognized."""


def _convert(value: Any, hint: Any, where: str) -> Any:
    """Converts a value from a file to the type of an option declared as `hint`. Raises a UserError if it is invalid."""
    if value is None and takes_none(hint):
        return None
    kind = plain(hint)
    if kind is float and isinstance(value, str) and _FLOAT.fullmatch(value):
        value = float(value)  # YAML 1.1 reads 1e-3, without a point, as text
    if kind is int and isinstance(value, str) and "e" in value.lower() and _FLOAT.fullmatch(value):
        value = float(value)
    if kind is float and type(value) is int and value.bit_length() < 1000:
        value = float(value)
    if kind is int and isinstance(value, float) and value.is_integer() and abs(value) <= EXACT:
        value = int(value)
    if isinstance(kind, type) and type(value) is not kind:
        raise UserError(f"{where} must be {_NAMES.get(kind, kind)}, found {_kind(value)}")
    if problem := problem_of(value, hint):
        raise UserError(f"{where} {problem}")
    return value


def convert_text(text: str, kind: type) -> Any:
    """Converts the `text` of a flag to a value of type `kind`.

    Raises:
        ValueError: the text is not such a value.
    """
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kind is str:
        return text
    if kind is int and re.fullmatch(r"[-+]?[0-9]{1,40}", text):
        return int(text)
    if kind in (int, float) and _FLOAT.fullmatch(text):
        value = float(text)
        if kind is float and math.isfinite(value):
            return value
        if kind is int and value.is_integer() and abs(value) <= EXACT:  # written as 1e6
            return int(value)
    hint = _spelling(text) if kind in (int, float) else ""
    raise ValueError(f"must be {'a finite number' if kind is float else _NAMES[kind]}, not {brief(text)}{hint}")


def _spelling(text: str) -> str:
    """Hint for writing a number that has a unit, or a comma or underscore between its digits; otherwise empty."""
    found = re.fullmatch(r"([-+]?)(\d{1,12}(?:[.,_]\d{1,12}){0,4})\s*(%|[kKmMgGbB]?)", text, re.ASCII)
    if found is None:
        return ""
    sign, digits, unit = found.groups()
    if re.fullmatch(r"\d{1,3}(,\d{3})+", digits) and not digits.startswith("0"):
        digits = digits.replace(",", "")
    digits = digits.replace("_", "").replace(",", ".")
    if not _FLOAT.fullmatch(digits):
        return ""
    if unit == "m":
        return "; write it without a unit"  # millions, or minutes
    factor = {"%": "e-2", "k": "e3", "m": "e6", "g": "e9", "b": "e9", "": ""}[unit.lower()]
    value = Decimal(f"{sign}{digits}{factor}")
    if unit == "%" and value >= 1:  # 1 is one step where a length may be a fraction of the steps
        return ""
    return f"; write {value.normalize():f}"


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
    """Options as nested mappings in the form of the YAML file, with flat groups lifted."""
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

    return yaml.safe_dump(to_dict(options), sort_keys=False, allow_unicode=True)


@dataclass(frozen=True)
class Leaf:
    """An option: its dotted name, its value and its role (science, machine or bookkeeping)."""

    name: str
    value: Any
    role: str


def leaves(options: Any, prefix: str = "", role: str = "science", active: bool = False) -> list[Leaf]:
    """All options of a dataclass, in order.

    Args:
        active: leave out options without effect, which the dataclasses list in a method `inactive`.
    """
    out = []
    inactive = options.inactive() if active and hasattr(options, "inactive") else ()
    for field in fields(options):
        if field.name in inactive:
            continue
        value, kind = getattr(options, field.name), field.metadata.get("role", role)
        if is_dataclass(value):
            out += leaves(value, prefix if field.metadata.get("flat") else f"{prefix}{field.name}.", kind, active)
        else:
            out.append(Leaf(f"{prefix}{field.name}", value, kind))
    return out


def digest(values: dict[str, Any]) -> str:
    """Eight hexadecimal digits that identify a set of values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """A line for each value that differs."""
    return [
        f"{brief(name, str)}: {brief(old.get(name))} -> {brief(new.get(name))}"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    ]
