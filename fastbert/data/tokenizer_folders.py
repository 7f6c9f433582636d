"""Opens the tokenizer of a folder."""

import hashlib
import json
from pathlib import Path

from fastbert.data.tokenizer import WordPiece
from fastbert.data.tokenizer_check import check_folder
from fastbert.data.tokenizer_files import SPECIAL_TOKENS, Interpreted, interpret
from fastbert.downloads import TOKENIZER, check_downloaded, local_folder
from fastbert.errors import UserError


def load_tokenizer(folder: Path | str) -> WordPiece:
    """Opens the tokenizer of a Hugging Face BERT (tokenizer.json, otherwise vocab.txt), in a folder or on the hub, of a
    prepared folder or a run.

    For a folder that `WordPiece.save` did not write, the tokenizer is compared with that of transformers. Truncation
    and padding in a tokenizer.json are dropped.

    Raises:
        UserError: there is no tokenizer, or it is damaged, not BERT's WordPiece, lacks a special token, or is read
            differently by transformers.
    """
    folder = local_folder(folder, TOKENIZER)
    check_downloaded(folder, TOKENIZER, "a Hugging Face tokenizer, prepared data or a run")
    if (folder / "dataset.json").is_file() or (folder / "checkpoints").is_dir():
        folder = folder / "tokenizer"
    files = interpret(folder)
    wordpiece = _from_files(files)
    if not wordpiece.wrote(folder):
        key = hashlib.sha256(json.dumps(files.contents, sort_keys=True).encode()).digest()
        if key not in _compared:
            check_folder(wordpiece, files)
            _compared.add(key)
    return wordpiece


_compared: set[bytes] = set()  # contents that were compared before: a job opens the same folder several times


def _from_files(files: Interpreted) -> WordPiece:
    wordpiece = WordPiece(tuple(sorted(files.vocabulary, key=files.vocabulary.__getitem__)), **files.settings)
    missing = [token for token in SPECIAL_TOKENS if token not in wordpiece.ids]
    if missing:
        raise UserError(f"tokenizer {files.path} lacks {', '.join(missing)}; give one with {', '.join(SPECIAL_TOKENS)}")
    return wordpiece
