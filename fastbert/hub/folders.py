"""Checks of model folders that the user names. They do not import torch, so a wrong name is refused at once."""

from pathlib import Path

from fastbert.downloads import MODEL, check_downloaded
from fastbert.errors import UserError
from fastbert.inputs import input_errors


def check_model_folder(path: str | Path, one: bool = True) -> Path:
    """Checks that the folder `path` can hold a model, and returns it; a name on the Hugging Face hub is returned too,
    unchecked.

    Args:
        one: also refuse the --out of a fine-tuning, which holds the models of several seeds; False where a fine-tuned
            model is needed.

    Raises:
        UserError: the folder does not exist, holds prepared data, or holds several models.
    """
    any_model = "a Hugging Face model, an export, a run or a checkpoint"
    fine_tuned = "a fine-tuned model: the --out of `fastbert finetune`, or a seed in it"
    folder = check_downloaded(path, MODEL, any_model if one else fine_tuned)
    with input_errors(folder):
        if (folder / "config.json").exists():
            return folder
        if (folder / "dataset.json").exists():
            raise UserError(
                f"{folder} holds prepared data, not a model; fastbert pretrain --data {folder} trains one on it"
            )
        if one and (seeds := seed_folders(folder)):
            raise UserError(f"{folder} holds the models of several seeds; give one of them, such as {seeds[0]}")
    return folder


def seed_folders(folder: Path) -> list[Path]:
    """Folders of fine-tuned models in `folder`, if it is an --out of `fastbert finetune`."""
    return sorted(path.parent.parent for depth in ("", "*/") for path in folder.glob(f"{depth}seed-*/model/task.json"))
