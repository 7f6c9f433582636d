"""Whether a model can be where the user says it is; imports no torch, so that a wrong name is refused at once."""

from pathlib import Path

from fastbert.downloads import check_downloaded
from fastbert.errors import UserError
from fastbert.inputs import input_errors


def check_model_folder(path: str | Path, one: bool = True) -> Path:
    """The folder `path`.

    Args:
        one: the --out of a fine-tuning, with the models of several seeds, will not do.

    Raises:
        UserError: there is none, with what to do where `path` is a name on the Hugging Face hub; or it holds prepared
            data, or several models.
    """
    folder = check_downloaded(path, "model", "a Hugging Face BERT, an export, a run or a checkpoint")
    with input_errors(folder):
        if (folder / "config.json").exists():
            return folder
        if (folder / "dataset.json").exists():
            raise UserError(
                f"{folder} holds prepared data, no model; fastbert pretrain --data {folder} trains one on it"
            )
        if one and (seeds := seed_folders(folder)):
            raise UserError(f"{folder} holds the models of several seeds; give one of them, such as {seeds[0]}")
    return folder


def seed_folders(folder: Path) -> list[Path]:
    """The folders of fine-tuned models in `folder`, if that is an --out of `fastbert finetune`."""
    return sorted(path.parent.parent for depth in ("", "*/") for path in folder.glob(f"{depth}seed-*/model/task.json"))
