"""A name on the Hugging Face hub where a folder is expected: nothing is downloaded here, but the error says how to."""

import re
from pathlib import Path

from fastbert.errors import UserError, brief
from fastbert.inputs import input_errors, near_name


def check_downloaded(path: str | Path, what: str, kinds: str) -> Path:
    """The folder `path`.

    Args:
        what: it holds, such as "model".
        kinds: of folders that would do, for the error.

    Raises:
        UserError: there is none; with what to do where `path` is a name on the Hugging Face hub.
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
            f"there is no folder {name}. If it is a model on the Hugging Face hub, download it first, "
            f"`hf download {hub} --local-dir {path.name}` (huggingface-cli in older versions), and give that folder"
        )
    raise UserError(f"there is no folder {name}{near_name(path)}; give that of {kinds}")


def hub_name(path: Path) -> str | None:
    """The name on the hub that `path`, which is no folder, may be: owner/name, or that of one of BERT's releases."""
    if re.fullmatch(r"bert-(base|large)-[\w-]+", str(path)):
        return f"google-bert/{path}"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not path.parent.is_dir():
        return str(path)
    return None
