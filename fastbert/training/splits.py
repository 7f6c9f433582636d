"""Validation splits of a run by name: `new`, the held-out documents of --data; `old`, those of --replay.data; and those
of further prepared data, --eval-data. This module imports no torch.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from fastbert.errors import UserError, brief, choose

OWN = "validation"
"""Split of the run's own held-out documents in the records; another one is `validation/NAME`."""
NEW, OLD, MEAN = "new", "old", "mean"
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")


def record_split(name: str) -> str:
    """Split in the records of the validation split `name`."""
    return OWN if name == NEW else f"{OWN}/{name}"


def split_name(split: str) -> str | None:
    """Name of the validation split with this split in the records; None for other records."""
    if split == OWN:
        return NEW
    return split.removeprefix(f"{OWN}/") if split.startswith(f"{OWN}/") else None


def named_splits(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names of the validation splits in the records of a run, except its own."""
    names = (split_name(str(record.get("split"))) for record in records)
    return [name for name in dict.fromkeys(names) if name not in (None, NEW)]


def is_split_name(name: str) -> bool:
    """Returns whether `name` can be the name of a split in --eval-data."""
    return _NAME.fullmatch(name) is not None and name not in (NEW, MEAN)


def named_folders(text: str | None) -> dict[str, str]:
    """Name -> folder of `old=data/wiki,code=data/python`.

    Raises:
        UserError: it is no such list, or a name is reserved or occurs twice.
    """
    found: dict[str, str] = {}
    for part in text.split(",") if text is not None else ():
        name, equals, folder = (piece.strip() for piece in part.partition("="))
        if not equals or not folder or not _NAME.fullmatch(name):
            raise UserError(
                "--eval-data must be names and prepared folders, such as old=data/wiki,code=data/python, with names "
                f"of small letters, digits, - and _, not {brief(text)}"
            )
        if name in (NEW, MEAN):
            raise UserError(f"--eval-data: {name} is reserved; choose another name for {folder}")
        if name in found:
            raise UserError(f"--eval-data names {name} twice; choose different names")
        found[name] = folder
    return found


def check_best_by(best_by: str, names: Iterable[str]) -> None:
    """Raises a UserError if `best_by` is no validation split of the run."""
    names = list(names)
    if best_by == OLD and OLD not in names:
        raise UserError(f"--best-by {OLD} needs the old data, --replay.data; give it, or leave --best-by out")
    choose("best-by", best_by, (NEW, *names, MEAN))


def best_loss(losses: Mapping[str, float | None], best_by: str) -> float | None:
    """The loss that decides which checkpoint is best; None if it is not finite.

    Args:
        losses: loss of each validation split by name.
    """
    chosen = list(losses.values()) if best_by == MEAN else [losses[best_by]]
    return None if None in chosen else sum(chosen) / len(chosen)
