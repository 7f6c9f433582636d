"""Tokenizers of encoders of other architectures, as transformers reads them, with what fine-tuning uses of
`WordPiece`."""

import hashlib
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastbert.data.tokenizer import WordPiece
from fastbert.data.tokenizer_check import quiet_transformers
from fastbert.downloads import TOKENIZER_FILES
from fastbert.errors import UserError, brief
from fastbert.inputs import raise_refusal
from fastbert.records import json_text, parse_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class ForeignTokenizer:
    """A tokenizer of transformers that puts one token before a text and one after it."""

    folder: Path
    content: str
    """tokenizer.json, without truncation and padding."""
    ids: dict[str, int]
    """BERT's name of each special token -> its id here: [CLS] for <s>, ..."""
    between: tuple[int, ...]
    """Ids between the two texts of a pair."""

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        """The tokens, in the order of their ids."""
        found = self.build().get_vocab(with_added_tokens=True)
        return tuple(sorted(found, key=found.__getitem__))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that affects ids."""
        return hashlib.sha256(json_text([self.content, sorted(self.ids.items()), self.between]).encode()).hexdigest()

    def build(self) -> "Tokenizer":
        """Builds the `tokenizers.Tokenizer`."""
        from tokenizers import Tokenizer

        return Tokenizer.from_str(self.content)

    def build_for_words(self) -> "Tokenizer":
        """Builds the tokenizer for single words. Byte-level BPE reads each as if a space stood before it."""
        from tokenizers import Tokenizer

        return Tokenizer.from_str(json_text(_with_spaces(parse_json(self.content, f"the tokenizer in {self.folder}"))))

    def save(self, folder: Path) -> None:
        """Copies the files of the tokenizer, so that `load_foreign_tokenizer` and transformers read an equal one."""
        for name in TOKENIZER_FILES:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, folder / name)


AnyTokenizer = WordPiece | ForeignTokenizer
"""A tokenizer for fine-tuning."""


def _with_spaces(value: Any) -> Any:
    """`value` with a space before the text in each pre-tokenizer of byte-level BPE."""
    if isinstance(value, list):
        return [_with_spaces(item) for item in value]
    if isinstance(value, dict) and value.get("type") == "ByteLevel" and "add_prefix_space" in value:
        return {**value, "add_prefix_space": True}
    if isinstance(value, dict):
        parts = ("pre_tokenizer", "pretokenizers")
        return {key: _with_spaces(item) if key in parts else item for key, item in value.items()}
    return value


def load_foreign_tokenizer(folder: Path) -> ForeignTokenizer:
    """Opens a tokenizer with transformers, without code of the folder.

    Raises:
        UserError: there is none, transformers cannot open it, or it lacks a special token or frames a text with other
            than one token before and after it.
    """
    from transformers import AutoTokenizer

    remedy = "save it again with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
    if not any((folder / name).is_file() for name in TOKENIZER_FILES if name != "tokenizer_config.json"):
        raise UserError(f"{folder} holds no tokenizer; copy the tokenizer.json of the model to that folder")
    try:
        with quiet_transformers():
            opened = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of transformers and tokenizers, which have no common class
        raise_refusal(error, folder)
        reason = brief(str(error).strip().partition("\n")[0], str)
        raise UserError(f"transformers cannot open the tokenizer in {folder}: {reason}; {remedy}") from None
    if not opened.is_fast:
        raise UserError(f"the tokenizer in {folder} has no tokenizer.json; {remedy}")
    roles = ("pad", "unk", "cls", "sep", "mask")
    ids = {f"[{role.upper()}]": getattr(opened, f"{role}_token_id") for role in roles}
    if ids["[UNK]"] is None:
        ids["[UNK]"] = ids["[PAD]"]
    if missing := [name for name, found in ids.items() if found is None]:
        raise UserError(f"the tokenizer in {folder} has no token for {', '.join(missing)}; {remedy}")
    backend = opened.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    text = backend.encode("a", add_special_tokens=False).ids
    one, two = backend.encode("a").ids, backend.encode("a", "a").ids
    cls, sep = [ids["[CLS]"]], [ids["[SEP]"]]
    between = two[1 + len(text) : len(two) - 1 - len(text)]
    if one != cls + text + sep or two != cls + text + between + text + sep:
        raise UserError(
            f"the tokenizer in {folder} does not put one token before a text and one after it, which fine-tuning "
            f"expects; {remedy}"
        )
    return ForeignTokenizer(folder, backend.to_str(), ids, tuple(between))
