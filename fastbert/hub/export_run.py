"""`fastbert export`: a run, a checkpoint or a Hugging Face BERT as a folder that transformers opens."""

from pathlib import Path

from fastbert.hub.export import check_out, export_model
from fastbert.hub.load import load_pretrained
from fastbert.hub.options import ExportOptions


def export_run(options: ExportOptions) -> None:
    """Writes the folder and prints how to open it; raises what `load_pretrained` and `export_model` do."""
    check_out(Path(options.out))
    pretrained = load_pretrained(options.run)
    card = {"weights": pretrained.source, **pretrained.facts}
    export_model(pretrained.config, pretrained.weights, pretrained.tokenizer, Path(options.out), card=card)
    print(f"{options.out}: {pretrained.source}; its README.md says how transformers opens it")
