"""Comparison of a tokenizer in fastbert and transformers: both encode texts that exercise every setting.

transformers never sees the folder itself, only a copy of the entries that `interpret` read, so no code in the folder
can run. Importing it takes about half a second, so it is imported only when a folder is compared.
"""

import string
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

from fastbert.data.tokenizer import WordPiece
from fastbert.data.tokenizer_files import CONFIG, JSON, MODEL, SPECIAL_TOKENS, Interpreted, contradictions
from fastbert.errors import UserError
from fastbert.records import json_text
from fastbert.streams import echo

Probe = tuple[str, str | None]

# The error message shows the first text that is encoded differently, so plain texts come first.
_TEXTS = (
    "",
    "Hello WORLD",
    "É e\u0301 ü",
    "東京x",
    " ",
    "Hello, World! It's 3.14, (a-b) [x] {y} <z> #1 @me $5 5% ^_^ `c` ~d |e| \\f /g; h: \"i\" + = ? * & 'j'",
    "ÄÖÜ äöü ß ẞ É é Ñ ñ Ç ç Å å Ø ø Ł ł İ ı Σ σ ς Ё ё Й й",
    "E\u0301 e\u0301 U\u0308 u\u0308 n\u0303 \u0301 a\u0327\u0301",
    "東京 日本語 漢字kanji 中文，標點。「引」 \U00020000 \uf900 ひらがな カタカナ 한국어",
    "a\tb\nc\rd\u00a0e\u3000f\u2003g\u2028h\u2029i\x0bj\x0ck\x85l",
    "a\u200bb\u200dc\ufeffd\x00e\x07f\x1cg\ufffdh\u00adi\u202ej\x7fk\ue000l",
    "\ufeffa \u200b \x00",
    "1234567890 1,000.50 ١٢٣ ½ ² Ⅷ ①",
    "😀 👩\u200d👧 🇩🇪 ☃ ♥\ufe0f",
    "“quoted” ‘single’ – — … « » ¿ ¡ § · † ‰ € £ ¥ © ® ™ ← ≠ ∞",
    "مرحبا שלום नमस्ते สวัสดี Ελληνικά Русский ქართული",
    "ﬁ ﬃ ａｂｃ ＡＢＣ ⅷ ǅ",
)


def check_folder(wordpiece: WordPiece, files: Interpreted) -> None:
    """Compares `wordpiece`, which was built from `files`, with the tokenizer that transformers builds from them.

    A tokenizer.json without tokenizer_config.json is read as it is, although transformers lowercases if there is also
    the config.json of a BERT: a setting in the only file overrides a default. This is reported.

    Raises:
        UserError: the two differ; the message shows how, and a text that is encoded differently.
    """
    folder, contents = files.path.parent, files.contents
    found = difference(wordpiece, open_in_transformers(contents))
    if found is not None and CONFIG not in contents and MODEL in contents:
        rest = {name: content for name, content in contents.items() if name != MODEL}
        if difference(wordpiece, open_in_transformers(rest)) is None:
            echo(
                f"the tokenizer in {folder} is read with the settings of {JSON}. transformers reads it differently as "
                f"long as there is no {CONFIG}: {found}. fastbert export writes a folder that both read alike",
            )
            found = None
    if found is None and (stated := contradictions(contents)):
        found = "; ".join(stated)
    if found is not None:
        config = contents.get(CONFIG, {})
        right = {key: value for key, value in wordpiece.config().items() if config.get(key, ...) != value}
        raise UserError(
            f"transformers and fastbert read the tokenizer in {folder} differently: {found}. If the model was trained "
            f"with {files.path.name}, put {json_text(right)} into {CONFIG}"
        )


def open_in_transformers(contents: dict[str, Any]) -> Any:
    """Opens a folder that contains only `contents` with `AutoTokenizer`."""
    from transformers import AutoTokenizer

    with quiet_transformers(), tempfile.TemporaryDirectory() as folder:
        for name, content in contents.items():
            text = content if isinstance(content, str) else json_text(content)
            (Path(folder) / name).write_text(text, encoding="utf-8", newline="")
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """transformers prints errors alone, and no progress bar of loaded weights."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def difference(wordpiece: WordPiece, theirs: Any) -> str | None:
    """Description of the differences between `wordpiece` and `theirs`, a tokenizer of transformers; None if equal.

    It names the settings that differ, and the first text with other ids or token types.
    """
    parts = [*_settings(wordpiece, theirs), *_roles(theirs), *_vocabulary(wordpiece, theirs)]
    library = wordpiece.build()
    for text, pair in probes(wordpiece):
        ours, other = library.encode(text, pair), theirs(text, pair, return_token_type_ids=True)
        if ours.ids != other["input_ids"]:
            shown = [_shown(tokens) for tokens in (ours.tokens, theirs.convert_ids_to_tokens(other["input_ids"]))]
        elif ours.type_ids != other["token_type_ids"]:
            shown = [f"of types {types}" for types in (ours.type_ids, other["token_type_ids"])]
        else:
            continue
        name = repr(text if len(text) <= 100 else f"{text[:20]}... ({len(text)} characters)")
        name += "" if pair is None else f" with {pair!r}"
        parts.append(f"the text {name} is {shown[0]} in fastbert and {shown[1]} in transformers")
        break
    return "; ".join(parts) or None


def _shown(tokens: list[str]) -> str:
    return "[" + " ".join(tokens[:16]) + (" ..." if len(tokens) > 16 else "") + "]"


def differences(here: WordPiece, there: WordPiece, names: tuple[str, str]) -> list[str]:
    """Settings and the first three ids that differ between two tokenizers.

    Args:
        names: names of the two in the result.
    """
    ids = [
        f"id {number} is {one!r} in {names[0]} and {other!r} in {names[1]}"
        for number, (one, other) in enumerate(zip_longest(here.tokens, there.tokens))
        if one != other
    ]
    found = [*_different_settings(here.settings, there.settings, names), *ids[:3]]
    return [*found, *([f"{len(ids) - 3} more ids differ"] if len(ids) > 3 else [])]


_SETTINGS = ("do_lower_case", "strip_accents", "tokenize_chinese_chars", "clean_text", "max_input_chars_per_word")


def _different_settings(here: Iterable[Any], there: Iterable[Any], names: tuple[str, str]) -> Iterator[str]:
    for setting, one, other in zip(_SETTINGS, here, there, strict=True):
        if one != other:
            yield f"{setting} is {one} in {names[0]} and {other} in {names[1]}"


def _settings(wordpiece: WordPiece, theirs: Any) -> Iterator[str]:
    normalizer, model = theirs.backend_tokenizer.normalizer, theirs.backend_tokenizer.model
    accents = normalizer.strip_accents
    other = (
        normalizer.lowercase,
        normalizer.lowercase if accents is None else accents,
        normalizer.handle_chinese_chars,
        normalizer.clean_text,
        model.max_input_chars_per_word,
    )
    yield from _different_settings(wordpiece.settings, other, ("fastbert", "transformers"))


def _roles(theirs: Any) -> Iterator[str]:
    for token in SPECIAL_TOKENS:
        name = f"{token[1:-1].lower()}_token"
        if getattr(theirs, name) not in (None, token):
            yield f"{name} is {getattr(theirs, name)!r} in transformers, not {token!r}"
    for name in ("padding_side", "truncation_side"):
        if getattr(theirs, name) != "right":
            yield f"{name} is {getattr(theirs, name)} in transformers and right in fastbert"


def _vocabulary(wordpiece: WordPiece, theirs: Any) -> Iterator[str]:
    other = theirs.get_vocab()
    for token in sorted(wordpiece.ids.keys() | other.keys()):
        if token and wordpiece.ids.get(token) != other.get(token):  # an empty token never occurs in a text
            here, there = wordpiece.ids.get(token), other.get(token)
            yield f"the id of {token!r} is {here} in fastbert and {there} in transformers"
            return


def probes(wordpiece: WordPiece) -> Iterator[Probe]:
    """Texts and pairs that exercise every setting, including words of the vocabulary in upper and lower case."""
    for text in _TEXTS:
        yield text, None
    for token in _spread(wordpiece.tokens):
        yield f"{token} {token.upper()} {token.capitalize()} x{token}", None
    for token in SPECIAL_TOKENS:
        yield f"{token} a{token}b {token.lower()} {token.capitalize()}. {token}{token} {token[:-1]} ] {token[1:]}", None
    letter = next((c for c in string.ascii_letters if {c, f"##{c}"} <= wordpiece.ids.keys()), "a")
    for length in sorted({99, 100, 101, 200, *(wordpiece.longest_word + more for more in (-1, 0, 1))}):
        yield letter * max(length, 0), None
    yield from (("a b", "c"), ("", "c"), ("A [SEP] B", "[MASK] É"))


def _spread(tokens: tuple[str, ...], count: int = 48) -> list[str]:
    """Words from all parts of the vocabulary, including words with upper-case and non-ASCII letters."""
    words = [token for token in tokens if token and not token.startswith("##") and token not in SPECIAL_TOKENS]
    chosen: dict[str, None] = {}
    for part in (words, [w for w in words if w != w.lower()], [w for w in words if not w.isascii()]):
        chosen |= dict.fromkeys(part[:: max(1, len(part) // count)][:count])
    return list(chosen)
