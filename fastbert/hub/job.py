"""`fastbert export`: a run, a checkpoint or a Hugging Face BERT as a folder that transformers opens."""

from dataclasses import dataclass
from pathlib import Path

from fastbert.hub.export import check_out, export_model
from fastbert.hub.load import check_model_folder, load_pretrained


@dataclass(frozen=True)
class ExportOptions:
    """A run as a Hugging Face folder."""

    run: str
    """The run (its newest whole checkpoint is taken), one of its checkpoints, an export, or a Hugging Face BERT."""
    out: str
    """Folder to write. An earlier export there is replaced, anything else is not."""


def export(options: ExportOptions) -> None:
    """Writes the folder and prints how to open it.

    Raises:
        UserError: see `load_pretrained` and `export_model`.
    """
    check_model_folder(options.run)
    check_out(Path(options.out))
    pretrained = load_pretrained(options.run)
    card = {"weights": pretrained.source, **pretrained.facts}
    export_model(pretrained.config, pretrained.weights, pretrained.tokenizer, Path(options.out), card=card)
    print(f"{options.out}: {pretrained.source}; its README.md says how transformers opens it")
