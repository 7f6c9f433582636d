"""`fastbert export`: converts a run, a checkpoint or a Hugging Face BERT to a folder that transformers loads."""

from pathlib import Path

from fastbert.hub.export import check_out, export_model
from fastbert.hub.load import load_pretrained
from fastbert.hub.options import ExportOptions


def export_run(options: ExportOptions) -> None:
    """Writes the folder and prints a pointer to its README.md. Raises the errors of `load_pretrained` and
    `export_model`."""
    check_out(Path(options.out))
    pretrained = load_pretrained(options.run)
    card = {"weights": pretrained.source, **pretrained.facts}
    export_model(pretrained.config, pretrained.weights, pretrained.tokenizer, Path(options.out), card=card)
    print(f"{options.out}: {pretrained.source}; its README.md shows how to load it with transformers")
