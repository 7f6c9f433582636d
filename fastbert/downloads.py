"""Errors for a name on the Hugging Face hub instead of a folder: nothing is downloaded, the message explains how."""

import re
from pathlib import Path

from fastbert.errors import UserError, brief
from fastbert.inputs import input_errors, near_name


def check_downloaded(path: str | Path, what: str, kinds: str) -> Path:
    """Returns the folder `path`.

    Args:
        what: its content, such as "model".
        kinds: description of suitable folders, for the error message.

    Raises:
        UserError: it does not exist. If `path` is a name on the Hugging Face hub, the message explains the download.
    """
    path = Path(path)
    with input_errors(path):
        found = path.is_dir()
    if found:
        return path
    if path.is_file():
        raise UserError(f"{path} is a file; give the folder of the {what}")
    name = brief(path, str)
    if hub := hub_name(path):
        raise UserError(
            f"there is no folder {name}; check the path, or, if it is a model on the Hugging Face hub, download it: "
            f"`hf download {hub} --local-dir {path.name}` (huggingface-cli in older versions), and give that folder"
        )
    if step := re.fullmatch(r"(.+)@([0-9]{1,10})", str(path)):
        checkpoint = f"{brief(step[1], str)}/checkpoints/step-{int(step[2]):08d}"
        raise UserError(f"there is no folder {name}; for a checkpoint of a run give its folder, {checkpoint}")
    near = near_name(path)
    give = " Give" if near.endswith("?") else "; give"
    raise UserError(f"there is no folder {name}{near}{give} the folder of {kinds}")


def hub_name(path: Path) -> str | None:
    """Name on the hub that `path` may be if it is not a folder: owner/name, or the name of a BERT release."""
    if re.fullmatch(r"bert-(base|large)-[\w-]+", str(path)):
        return f"google-bert/{path}"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not path.parent.is_dir():
        return str(path)
    return None
