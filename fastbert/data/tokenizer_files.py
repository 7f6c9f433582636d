"""Interprets the files of a Hugging Face tokenizer folder as data.

Each entry that affects ids is interpreted or refused. Everything else in the folder, including code, is ignored:
`Interpreted.contents` has the relevant entries, and transformers reads only these.
"""

import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastbert.errors import UserError, brief
from fastbert.inputs import not_utf8, read_input, refuse_zero_bytes
from fastbert.records import read_json

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PREFIX = "##"
LONGEST_WORD = 2000  # maximum number of characters of a word: the time to split it grows quadratically
JSON, VOCABULARY, CONFIG = "tokenizer.json", "vocab.txt", "tokenizer_config.json"
SPECIAL_MAP, ADDED, MODEL = "special_tokens_map.json", "added_tokens.json", "config.json"

# Classes that transformers 5 opens as BERT's tokenizer, and those that use tokenizer.json as it is.
_BERTS = ("Bert", "Electra", "DistilBert", "MobileBert", "ConvBert", "SqueezeBert", "LayoutLM")
_AS_IT_IS = ("PreTrainedTokenizer", "TokenizersBackend")
# Model types for which transformers uses BERT's tokenizer if no class is declared, and that of fastbert.
_MODELS = (
    *("bert", "electra", "distilbert", "mobilebert", "convbert", "squeezebert", "layoutlm", "megatron-bert"),
    "fastbert",
)
# Entries of tokenizer_config.json that transformers passes to its tokenizer, and their types.
_SETTINGS: dict[str, tuple[type, ...]] = {
    "do_lower_case": (bool,),
    "strip_accents": (bool, type(None)),
    "tokenize_chinese_chars": (bool,),
    "split_special_tokens": (bool,),
    "padding_side": (str,),
    "truncation_side": (str,),
    "tokenizer_class": (str, type(None)),
}
# Entries that would replace the vocabulary or the template; BERT tokenizers do not have them.
_REFUSED = ("init_inputs", "vocab", "merges", "tokenizer_object", "post_processor")
_LISTS = ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens")
_ROLES = tuple(f"{token[1:-1].lower()}_token" for token in SPECIAL_TOKENS)
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# Characters that Rust's `trim_end` removes, which the tokenizers library applies to vocab.txt; str.rstrip removes more.
_WHITE_SPACE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
_LONE_CR = re.compile(r"\r(?![\r\n]|$)")


@dataclass(frozen=True)
class Interpreted:
    """Contents of the tokenizer files of a folder."""

    path: Path
    """File with the vocabulary, for messages."""
    vocabulary: dict[str, int]
    settings: dict[str, Any]
    """Fields of WordPiece."""
    contents: dict[str, Any]
    """File name -> the relevant part of its content."""


def interpret(folder: Path) -> Interpreted:
    """Reads tokenizer.json, otherwise vocab.txt, and the files next to it.

    Raises:
        UserError: no tokenizer, a damaged one, or one that is not BERT's WordPiece with its five special tokens.
    """
    contents: dict[str, Any] = {}
    if (folder / MODEL).is_file():
        model = read_json(folder / MODEL, "model configuration", dict)
        contents[MODEL] = {
            key: model[key] for key in ("model_type", "tokenizer_class") if isinstance(model.get(key), str)
        }
    added: dict[str, list[str]] = {}
    config: dict[str, Any] = {}
    for name, what, read in (
        (CONFIG, "tokenizer configuration", _read_config),
        (SPECIAL_MAP, "map of special tokens", _read_map),
    ):
        if (folder / name).is_file():
            contents[name] = read(read_json(folder / name, what, dict), folder / name)
            added[name] = list(_mentioned(contents[name]))
    config = contents.get(CONFIG, {})
    if (folder / ADDED).is_file():
        contents[ADDED] = _typed(read_json(folder / ADDED, "list of added tokens", dict), int, folder / ADDED)
        added[ADDED] = list(contents[ADDED])
    if (folder / JSON).is_file():
        path = folder / JSON
        vocabulary, settings, contents[JSON] = _from_json(read_json(path, "tokenizer", dict), path)
    elif (folder / VOCABULARY).is_file():
        path = folder / VOCABULARY
        contents[VOCABULARY] = _vocabulary_text(path)
        vocabulary, settings = read_vocabulary(contents[VOCABULARY], path), _from_config(config)
    else:
        raise UserError(f"{folder} has no tokenizer; give a folder with tokenizer.json or vocab.txt")
    for name, tokens in added.items():
        _check_added(folder / name, tokens)
    _check_class(folder, contents)
    return Interpreted(path, vocabulary, settings, contents)


def _vocabulary_text(path: Path) -> str:
    """Reads the text of a vocab.txt. Raises a UserError if it is not UTF-8, or has a byte order mark or \\r within a
    line, which transformers would read as parts of tokens."""
    content = read_input(path, "vocabulary")
    refuse_zero_bytes(path, "vocabulary", content)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(path, "vocabulary", content, error.start) from None
    if text.startswith("\ufeff"):
        raise UserError(
            f"vocabulary {path} begins with a byte order mark, which would become a part of its first token; "
            f"remove it with: sed -i '1s/^\\xef\\xbb\\xbf//' {shlex.quote(str(path))}"
        )
    if found := _LONE_CR.search(text):
        number = text.count("\n", 0, found.start()) + 1
        raise UserError(
            f"vocabulary {path}, line {number}: a carriage return (\\r) that is not at the end of a line, at which "
            r"programs split differently; separate the tokens by \n"
        )
    return text


def read_vocabulary(text: str, path: Path) -> dict[str, int]:
    """Token -> id, from the text of a vocab.txt. As in transformers, only \\n ends a line, and white space at the end
    of a line is removed. Blank lines at the end are dropped, because an empty piece never occurs in a text.

    Raises:
        UserError: a line repeats another.
    """
    tokens = [line.rstrip(_WHITE_SPACE) for line in text.split("\n")]
    while tokens and not tokens[-1]:
        del tokens[-1]
    ids: dict[str, int] = {}
    for number, token in enumerate(tokens, 1):
        if token in ids:
            what = f"repeats {token!r}, line {ids[token] + 1}" if token else f"is blank, as line {ids[token] + 1} is"
            raise UserError(f"vocabulary {path}: line {number} {what}; every line must be a different token")
        ids[token] = number - 1
    return ids


def contradictions(contents: dict[str, Any]) -> list[str]:
    """Settings that differ between tokenizer_config.json and tokenizer.json."""
    if JSON not in contents:
        return []
    normalizer, config = contents[JSON]["normalizer"], contents.get(CONFIG, {})
    there = {
        "do_lower_case": normalizer["lowercase"],
        "tokenize_chinese_chars": normalizer["handle_chinese_chars"],
        "strip_accents": _resolved(normalizer["strip_accents"], normalizer["lowercase"]),
    }
    here = {key: config[key] for key in there if key in config}
    if "strip_accents" in here:
        here["strip_accents"] = _resolved(here["strip_accents"], here.get("do_lower_case", there["do_lower_case"]))
    return [
        f"{key} is {value} in {CONFIG} and {there[key]} in {JSON}" for key, value in here.items() if value != there[key]
    ]


def _resolved(strip_accents: bool | None, lowercase: bool) -> bool:
    return lowercase if strip_accents is None else strip_accents


def template(cls: int, sep: int) -> dict[str, Any]:
    """BERT's post_processor in a tokenizer.json, for the ids of [CLS] and [SEP]."""

    def special(token: str, kind: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": token, "type_id": kind}}

    def text(name: str, kind: int) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": kind}}

    single = [special("[CLS]", 0), text("A", 0), special("[SEP]", 0)]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, text("B", 1), special("[SEP]", 1)],
        "special_tokens": {
            token: {"id": token, "ids": [number], "tokens": [token]}
            for token, number in (("[CLS]", cls), ("[SEP]", sep))
        },
    }


# --- the files


def _typed(values: dict[str, Any], kind: type | tuple[type, ...], path: Path) -> dict[str, Any]:
    for key, value in values.items():
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise UserError(f"{path}: {brief(key, str)} is {brief(value)}, which is not allowed")
    return values


def _read_config(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """The entries of a tokenizer_config.json that affect ids."""
    read: dict[str, Any] = {}
    for key, kinds in _SETTINGS.items():
        if key in values:
            read |= _typed({key: values[key]}, kinds, path)
    files = values.get("fast_tokenizer_files") or [JSON]
    for key in [*(key for key in _REFUSED if values.get(key)), *(["fast_tokenizer_files"] if files != [JSON] else [])]:
        raise UserError(f"{path} has {key}, which fastbert does not read; remove it if the tokenizer does not need it")
    if "added_tokens_decoder" in values:
        decoder = values["added_tokens_decoder"]
        if not isinstance(decoder, dict) or not all(key.isdecimal() and len(key) < 20 for key in decoder):
            raise UserError(f"{path}: added_tokens_decoder does not map ids to tokens")
        read["added_tokens_decoder"] = {key: _flagged(value, path) for key, value in decoder.items()}
    tokens = _read_map(values, path)
    return read | {key: {"__type": "AddedToken", **v} if isinstance(v, dict) else v for key, v in tokens.items()}


def _read_map(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """The special tokens by name, with their flags if any, and the lists of further special tokens."""
    read: dict[str, Any] = {}
    for key, value in values.items():
        if key in _LISTS and value is not None:
            if not isinstance(value, list | dict):
                raise UserError(f"{path}: {key} is {brief(value)}, which is not allowed")
            tokens = value.values() if isinstance(value, dict) else value
            read[key] = [t if isinstance(t, str) else _flagged(t, path)["content"] for t in tokens]
        elif key in _ROLES and not isinstance(value, str | dict):
            raise UserError(f"{path}: {key} is {brief(value)}, which is not allowed; a BERT tokenizer has all five")
        elif key.endswith("_token") and isinstance(value, str | dict):
            read[key] = value if isinstance(value, str) else _flagged(value, path)
    return read


def _flagged(value: Any, path: Path) -> dict[str, Any]:
    """Content and flags of an added token."""
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise UserError(f"{path}: {brief(value)} is not a token")
    return {"content": value["content"], **_typed({f: value[f] for f in _FLAGS if f in value}, bool, path)}


def _mentioned(contents: dict[str, Any]) -> Iterator[str]:
    """Yields every token in the output of `_read_config` or `_read_map`."""
    for key, value in contents.items():
        if key in _SETTINGS:
            continue
        tokens: Iterable[Any] = value if key in _LISTS else [value]
        if key == "added_tokens_decoder":
            tokens = value.values()
        yield from (token if isinstance(token, str) else token["content"] for token in tokens)


def _check_added(path: Path, added: list[str]) -> None:
    tokens = [token for token in dict.fromkeys(added) if token not in SPECIAL_TOKENS]
    if tokens:
        shown = ", ".join(map(brief, tokens[:5])) + (f" and {len(tokens) - 5} more" if len(tokens) > 5 else "")
        kind = "token" if len(tokens) == 1 else "tokens"
        raise UserError(
            f"{path} has the added {kind} {shown}: transformers never splits these, but fastbert would; "
            f"only {', '.join(SPECIAL_TOKENS)} may be added. Remove them if no text contains them"
        )


def _check_class(folder: Path, contents: dict[str, Any]) -> None:
    """Refuses classes other than BERT's; a vocab.txt without a class is BERT's."""
    config = contents.get(CONFIG, {})
    model = contents.get(MODEL, {})
    declared = config.get("tokenizer_class") or model.get("tokenizer_class")
    if model.get("model_type", "bert") not in _MODELS:
        if declared is None:
            raise UserError(
                f"{folder / MODEL} has model_type {brief(model['model_type'])}, for which transformers uses another "
                f'tokenizer; if this is a BERT tokenizer, put "tokenizer_class": "BertTokenizer" into {CONFIG}'
            )
        del model["model_type"]  # the declared class is used
    name = (declared or "BertTokenizer").removesuffix("Fast")
    as_it_is = name in _AS_IT_IS
    if not as_it_is and name not in [f"{family}Tokenizer" for family in _BERTS]:
        raise UserError(
            f"the tokenizer in {folder} is a {brief(declared, str)}, not a BertTokenizer; give a BERT tokenizer"
        )
    if JSON not in contents:
        if as_it_is:
            raise UserError(f"{folder} has no tokenizer.json, which its tokenizer_class {declared} needs")
        contents[CONFIG] = {**config, "tokenizer_class": declared or "BertTokenizer"}


# --- tokenizer.json and its settings


def _from_config(config: dict[str, Any]) -> dict[str, Any]:
    """Settings of a BertTokenizer, with its defaults for values that tokenizer_config.json does not have."""
    return {
        "lowercase": config.get("do_lower_case", True),
        "strip_accents": config.get("strip_accents"),
        "split_chinese": config.get("tokenize_chinese_chars", True),
    }


def _from_json(content: dict[str, Any], path: Path) -> tuple[dict[str, int], dict[str, Any], dict[str, Any]]:
    """(vocabulary, settings, the relevant part of the file)."""
    kinds = {"model": "WordPiece", "normalizer": "BertNormalizer", "pre_tokenizer": "BertPreTokenizer"}
    for part, kind in kinds.items():
        found = content.get(part)
        if not isinstance(found, dict) or found.get("type", kind) != kind:
            name = found.get("type") if isinstance(found, dict) else found
            raise UserError(f"tokenizer {path}: its {part} is {brief(name, str)}, not {kind}; give a BERT tokenizer")
    model = content["model"]
    if not isinstance(model.get("vocab"), dict) or model.get("continuing_subword_prefix") != PREFIX:
        raise UserError(f"tokenizer {path}: its model has another prefix than {PREFIX!r}; give a BERT tokenizer")
    if model.get("unk_token") != "[UNK]":
        raise UserError(f"tokenizer {path}: its unk_token is {brief(model.get('unk_token'))}, not '[UNK]'")
    for part in ("truncation", "padding"):
        found = content.get(part)
        if isinstance(found, dict) and found.get("direction", "Right") != "Right":
            raise UserError(f"tokenizer {path}: its {part} is on the left, but in fastbert on the right; set direction")
    vocabulary = dict(_typed(model["vocab"], int, path))
    try:
        "".join(vocabulary).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"tokenizer {path} is damaged: a token is not Unicode text ({error.reason})") from None
    added = _added_tokens(content.get("added_tokens") or [], path)
    for token in added:
        if vocabulary.setdefault(token["content"], token["id"]) != token["id"]:
            raise UserError(
                f"tokenizer {path}: {brief(token['content'])} has the id {token['id']} and another in its model"
            )
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise UserError(f"tokenizer {path}: its ids are not 0 to {len(vocabulary) - 1}; give one without gaps")
    normalizer = {
        key: _member(content["normalizer"], key, kinds, path)
        for key, kinds in (
            ("clean_text", (bool,)),
            ("handle_chinese_chars", (bool,)),
            ("strip_accents", (bool, type(None))),
            ("lowercase", (bool,)),
        )
    }
    longest = _member(model, "max_input_chars_per_word", (int,), path)
    if not 0 < longest <= LONGEST_WORD:
        raise UserError(f"tokenizer {path}: its max_input_chars_per_word is {longest}, which is not allowed")
    settings = {
        "lowercase": normalizer["lowercase"],
        "strip_accents": normalizer["strip_accents"],
        "split_chinese": normalizer["handle_chinese_chars"],
        "clean_text": normalizer["clean_text"],
        "longest_word": longest,
    }
    relevant = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "BertNormalizer", **normalizer},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": _post_processor(content.get("post_processor"), vocabulary, path),
        "decoder": None,
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": PREFIX,
            "max_input_chars_per_word": longest,
            "vocab": model["vocab"],
        },
    }
    return vocabulary, settings, relevant


def _member(values: dict[str, Any], key: str, kinds: tuple[type, ...], path: Path) -> Any:
    if key not in values:
        raise UserError(f"tokenizer {path} is damaged: it lacks {key}")
    return _typed({key: values[key]}, kinds, path)[key]


def _added_tokens(tokens: Any, path: Path) -> list[dict[str, Any]]:
    if not isinstance(tokens, list):
        raise UserError(f"tokenizer {path} is damaged: added_tokens is not a list")
    read = []
    for value in tokens:
        token = _flagged(value, path)
        number = _member(value, "id", (int,), path)
        read.append({"id": number, "content": token["content"], **{flag: token.get(flag, False) for flag in _FLAGS}})
    _check_added(path, [token["content"] for token in read])
    return read


def _post_processor(found: Any, vocabulary: dict[str, int], path: Path) -> dict[str, Any] | None:
    """Returns None or BERT's template; refuses every other post-processor."""
    cls, sep = (vocabulary.get(token) for token in ("[CLS]", "[SEP]"))
    if found is None or cls is None or sep is None:
        return None
    if found not in (template(cls, sep), {"type": "BertProcessing", "sep": ["[SEP]", sep], "cls": ["[CLS]", cls]}):
        name = found.get("type") if isinstance(found, dict) else found
        raise UserError(
            f"tokenizer {path}: its post_processor ({brief(name, str)}) is not BERT's [CLS] A [SEP] and [CLS] A [SEP] "
            "B [SEP]; give a BERT tokenizer"
        )
    return template(cls, sep)
