"""Whether a model can be where the user says it is; imports no torch, so that a wrong name is refused at once."""

from pathlib import Path

from fastbert.downloads import check_downloaded


def check_model_folder(path: str | Path) -> Path:
    """The folder `path`.

    Raises:
        UserError: there is none; with what to do where `path` is a name on the Hugging Face hub.
    """
    return check_downloaded(path, "model", "a Hugging Face BERT, an export, a run or a checkpoint")
