"""`mode: data` of an ablation: variants that differ in their data, in replay or in their initial weights, and fixed
validation splits on which all of them are compared. This module imports no torch.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastbert.errors import UserError, brief
from fastbert.pretraining.options import SOURCE_ONLY
from fastbert.studies.shared.grid import format_option
from fastbert.training.splits import MEAN, is_split_name

DATA = "data"
FREE = ("data", *SOURCE_ONLY, "replay")
"""Options that a variant can change in this mode only."""
PREFIX = "study-"
"""Start of the splits' names in a training: there `new` is the training's own data, and `old` that of its replay."""
RESERVED = {"eval_data": "the validation splits of mode: data are those under validation; put it there"}


def read_mode(values: Mapping[str, Any], where: str) -> bool:
    """Returns whether the YAML file has `mode: data`. Raises a UserError for any other mode."""
    if "mode" in values and values["mode"] != DATA:
        raise UserError(
            f"{where}: mode must be {DATA} (variants differ in their data and are compared on fixed validation splits) "
            f"or be left out, found {format_option(values['mode'])}"
        )
    return "mode" in values


def read_splits(values: Mapping[str, Any], where: str) -> dict[str, str]:
    """Name -> prepared folder of each fixed validation split; empty without `mode: data`.

    Raises:
        UserError: they are missing or given without the mode, or a name or a folder is invalid.
    """
    if not read_mode(values, where):
        if "validation" in values:
            raise UserError(f"{where}: validation is for mode: {DATA}; give that mode, or leave validation out")
        return {}
    example = "validation: {old: data/wiki, new: data/de}"
    given = values.get("validation")
    if not isinstance(given, dict) or not given:
        raise UserError(
            f"{where}: mode: {DATA} compares variants on fixed splits; name their prepared folders, such as {example}, "
            f"found {format_option(given)}"
        )
    for name, folder in given.items():
        here = f"{where}: validation: {brief(name, str)}"
        if not is_split_name(PREFIX + name):
            raise UserError(
                f"{here}: the name of a split has at most {32 - len(PREFIX)} small letters, digits, - and _, such as "
                "old; choose another name"
            )
        if name == MEAN:
            raise UserError(f"{here}: {MEAN} is the mean of the splits; choose another name")
        if not isinstance(folder, str) or not folder.strip():
            raise UserError(f"{here} must be a prepared folder, such as data/wiki, found {format_option(folder)}")
        if "," in folder:
            raise UserError(f"{here}: the path {brief(folder)} has a comma; rename the folder, or link to it")
    return dict(given)


def check_splits(splits: Mapping[str, str], where: str) -> None:
    """Raises a UserError if a split is not a prepared folder."""
    for name, folder in splits.items():
        if not (Path(folder) / "dataset.json").is_file():
            raise UserError(
                f"{where}: validation: {name}: {folder} is not a prepared folder; write it with fastbert prepare, and "
                "the tokenizer of the variants as its --tokenizer"
            )


def eval_data(splits: Mapping[str, str]) -> str:
    """`--eval-data` of every training."""
    return ",".join(f"{PREFIX}{name}={folder}" for name, folder in splits.items())
