"""Tokenizer folders in many layouts, as found on the Hugging Face hub, and with damage."""

import json
import random
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastbert.data.tokenizer import SPECIAL_TOKENS, WordPiece

LETTERS = string.ascii_letters + string.digits + "éÉüÜñßøłёЁσς東京漢½"
WORDS = (
    *("[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]"),
    *LETTERS,
    *(f"##{c}" for c in LETTERS),
    *".,;:!?-()[]'\"#/*“”—、。",
    *("hello", "Hello", "world", "World", "über", "Über", "uber", "Uber", "##ing", "mask", "MASK", "東京", "E1"),
)
JSON, VOCAB = "tokenizer.json", "vocab.txt"
CLASS = {"tokenizer_class": "BertTokenizer"}
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
CASED = {"do_lower_case": False}


def texts() -> list[str]:
    """Words in any case, special tokens glued to them, odd characters, long words."""
    rng = random.Random(0)
    odd = [
        "\t",
        "\u00a0",
        "\u200b",
        "\x00",
        "\ufeff",
        "\u2028",
        "\x85",
        "\u0301",
        "\u0308",
        "\x1c",
        "\u3000",
        "😀",
        "²",
    ]
    marks = [*SPECIAL_TOKENS, "[mask]", "[Mask]", "[E1]", "[e1]", "<mask>", "東京", "漢", "É", "e\u0301", "ẞ", "İ"]
    found = ["", " ", "Hello Über WORLD", "a" * 20, "a" * 21, *(c * n for c in "aé" for n in (99, 100, 101, 200, 201))]
    for _ in range(60):
        parts = [rng.choice([rng.choice(WORDS), rng.choice(marks), rng.choice(odd)]) for _ in range(rng.randint(1, 8))]
        found.append("".join(part + rng.choice(["", "", " "]) for part in parts))
    return found


def put(folder: Path, **files: Any) -> Path:
    """Writes files; __ in a name means a dot, and values that are not text are written as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_bytes(text.encode())
    return folder


def tokenizer_json(
    change: Callable[[dict[str, Any]], object] = lambda content: None, **settings: Any
) -> dict[str, Any]:
    content = json.loads(WordPiece(WORDS, **settings).build().to_str())
    change(content)
    return content


def vocabulary(tokens: tuple[str, ...] = WORDS, end: str = "\n") -> str:
    return "".join(token + end for token in tokens)


def _added(**flags: Any) -> Callable[[dict[str, Any]], object]:
    """Changes the flags of [MASK] in a tokenizer.json."""
    return lambda content: content["added_tokens"][4].update(flags)


def _more(content: dict[str, Any]) -> None:
    token = {**content["added_tokens"][0], "id": len(WORDS), "content": "[E1]"}
    content["added_tokens"].append(token)


def _template(content: dict[str, Any]) -> None:
    del content["post_processor"]["single"][-1]


def _cut(content: dict[str, Any]) -> None:
    """Truncation as saved by sentence-transformers."""
    content["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None}
    content["padding"] = {**padding, "pad_id": 1, "pad_type_id": 0, "pad_token": "[PAD]"}


def _cut_left(content: dict[str, Any]) -> None:
    _cut(content)
    content["truncation"]["direction"] = "Left"


def _bert_processing(content: dict[str, Any]) -> None:
    content["post_processor"] = {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]}


def _decoder(*tokens: str) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False) | {"special": True}
    return {str(WORDS.index(t) if t in WORDS else len(WORDS)): {"content": t, **flags} for t in tokens}


HOSTILE = {"auto_map": {"AutoTokenizer": ["hostile.Tokenizer", "hostile.Tokenizer"]}}
UNTYPED = tokenizer_json(lambda content: content["model"].pop("type"), lowercase=False)
BERT = {"model_type": "bert"}

# Folders that both read: the files of each.
READABLE: dict[str, dict[str, Any]] = {
    "old, uncased": {
        "vocab__txt": vocabulary(),
        "tokenizer_config__json": {"do_lower_case": True},
        "config__json": BERT,
    },
    "old, cased": {"vocab__txt": vocabulary(), "tokenizer_config__json": CASED, "config__json": BERT},
    "vocab.txt alone": {"vocab__txt": vocabulary(), "config__json": BERT},
    "vocab.txt of an ELECTRA": {"vocab__txt": vocabulary(), "config__json": {"model_type": "electra"}},
    "uncased": {"tokenizer__json": tokenizer_json(), "tokenizer_config__json": CLASS},
    "cased": {"tokenizer__json": tokenizer_json(lowercase=False), "tokenizer_config__json": CLASS | CASED},
    "Fast in the class": {
        "tokenizer__json": tokenizer_json(lowercase=False),
        "tokenizer_config__json": CASED | {"tokenizer_class": "BertTokenizerFast"},
    },
    "ELECTRA's class": {
        "tokenizer__json": tokenizer_json(),
        "tokenizer_config__json": {"tokenizer_class": "ElectraTokenizer", "do_lower_case": True},
    },
    "DistilBERT's class": {
        "vocab__txt": vocabulary(),
        "tokenizer_config__json": CASED | {"tokenizer_class": "DistilBertTokenizer"},
    },
    "tokenizer.json alone, cased": {"tokenizer__json": tokenizer_json(lowercase=False)},
    "tokenizer.json alone, of a BERT": {"tokenizer__json": tokenizer_json(), "config__json": BERT},
    "multilingual": {
        "tokenizer__json": tokenizer_json(lowercase=False, strip_accents=False),
        "tokenizer_config__json": CLASS | CASED | {"strip_accents": False},
        "config__json": BERT,
    },
    "Chinese": {
        "vocab__txt": vocabulary(),
        "tokenizer_config__json": CASED | {"tokenize_chinese_chars": True, "model_max_length": 512},
        "config__json": BERT,
    },
    "German, lower case with accents": {
        "vocab__txt": vocabulary(),
        "tokenizer_config__json": CLASS | {"do_lower_case": True, "strip_accents": False},
    },
    "cased without accents": {
        "tokenizer__json": tokenizer_json(lowercase=False, strip_accents=True),
        "tokenizer_config__json": CLASS | CASED | {"strip_accents": True},
    },
    "Chinese words whole": {
        "tokenizer__json": tokenizer_json(split_chinese=False),
        "tokenizer_config__json": CLASS | {"tokenize_chinese_chars": False},
    },
    "control characters retained": {
        "tokenizer__json": tokenizer_json(clean_text=False),
        "tokenizer_config__json": FAST,
    },
    "short words": {"tokenizer__json": tokenizer_json(longest_word=20), "tokenizer_config__json": FAST},
    "long words": {"tokenizer__json": tokenizer_json(longest_word=200)},
    "truncation and padding": {"tokenizer__json": tokenizer_json(_cut), "tokenizer_config__json": CLASS},
    "truncation and padding, as it is": {"tokenizer__json": tokenizer_json(_cut), "tokenizer_config__json": FAST},
    "lines of Windows, blank lines at the end": {
        "vocab__txt": vocabulary(end="\r\n") + "\r\n\n",
        "tokenizer_config__json": CLASS,
    },
    "separators within tokens": {
        "vocab__txt": vocabulary((*WORDS, "a\u2028b", "c\x85d", "e\x0cf", "g\x1dh")),
        "tokenizer_config__json": CLASS,
    },
    "map of special tokens": {
        "vocab__txt": vocabulary(),
        "tokenizer_config__json": CLASS | CASED,
        "special_tokens_map__json": {
            "cls_token": "[CLS]",
            "mask_token": {"content": "[MASK]", "lstrip": False, "rstrip": False, "normalized": False},
            "additional_special_tokens": ["[MASK]"],
        },
        "added_tokens__json": {"[MASK]": 4},
    },
    "decoder of added tokens": {
        "tokenizer__json": tokenizer_json(),
        "tokenizer_config__json": CLASS
        | {"added_tokens_decoder": _decoder(*SPECIAL_TOKENS), "bos_token": "[CLS]", "never_split": None},
    },
    "BertProcessing": {"tokenizer__json": tokenizer_json(_bert_processing), "tokenizer_config__json": FAST},
    "another model with BERT's class": {
        "vocab__txt": vocabulary(),
        "tokenizer_config__json": CLASS,
        "config__json": {"model_type": "blip"},
    },
    "a model without a type": {"tokenizer__json": UNTYPED, "tokenizer_config__json": CLASS | CASED},
    "hostile code": {
        "tokenizer__json": tokenizer_json(),
        "tokenizer_config__json": CLASS | HOSTILE,
        "hostile__py": "open('ran', 'w')",
    },
}

DISAGREES = (
    r"do_lower_case is False in fastbert and True in transformers; .*; the text 'Hello WORLD' is \[\[CLS\] Hello W "
)
WHOLE = r"the added token '\[E1\]': transformers never splits these"
# Folders that the two read differently: the files and the message.
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "another case": (
        DISAGREES,
        {"tokenizer__json": tokenizer_json(lowercase=False), "tokenizer_config__json": CLASS | {"do_lower_case": True}},
    ),
    "BERT's case by default": (
        DISAGREES,
        {"tokenizer__json": tokenizer_json(lowercase=False), "tokenizer_config__json": CLASS},
    ),
    "BERT's case by its config.json": (
        DISAGREES,
        {"tokenizer__json": tokenizer_json(lowercase=False), "tokenizer_config__json": {}, "config__json": BERT},
    ),
    "a case that transformers ignores": (
        r"do_lower_case is True in tokenizer_config\.json and False in tokenizer\.json",
        {"tokenizer__json": tokenizer_json(lowercase=False), "tokenizer_config__json": {"do_lower_case": True}},
    ),
    "other accents": (
        "strip_accents is True in fastbert and False in transformers.*the text",
        {"tokenizer__json": tokenizer_json(), "tokenizer_config__json": CLASS | {"strip_accents": False}},
    ),
    "other Chinese": (
        "tokenize_chinese_chars is False in fastbert and True in transformers; the text '東京x' is",
        {"tokenizer__json": tokenizer_json(split_chinese=False), "tokenizer_config__json": CLASS},
    ),
    "control characters": (
        "clean_text is False in fastbert and True in transformers.*the text",
        {"tokenizer__json": tokenizer_json(clean_text=False), "tokenizer_config__json": CLASS},
    ),
    "longest word": (
        r"max_input_chars_per_word is 200 in fastbert and 100 in .*the text 'aaaaa.*\(101 characters\)' is .*\[UNK\]",
        {"tokenizer__json": tokenizer_json(longest_word=200), "tokenizer_config__json": CLASS},
    ),
    "added in tokenizer_config.json": (
        WHOLE,
        {
            "tokenizer__json": tokenizer_json(),
            "tokenizer_config__json": CLASS | {"additional_special_tokens": ["[E1]"]},
        },
    ),
    "added by its decoder": (
        WHOLE,
        {"vocab__txt": vocabulary(), "tokenizer_config__json": CLASS | {"added_tokens_decoder": _decoder("[E1]")}},
    ),
    "added in the map": (
        WHOLE,
        {
            "tokenizer__json": tokenizer_json(),
            "special_tokens_map__json": {"extra_special_tokens": {"e_token": "[E1]"}},
        },
    ),
    "added in added_tokens.json": (
        WHOLE,
        {"vocab__txt": vocabulary(), "config__json": BERT, "added_tokens__json": {"[E1]": len(WORDS)}},
    ),
    "added in tokenizer.json": (WHOLE, {"tokenizer__json": tokenizer_json(_more)}),
    "another [MASK]": (
        "added token '<mask>'",
        {"vocab__txt": vocabulary(), "tokenizer_config__json": CLASS | {"mask_token": "<mask>"}},
    ),
    "exchanged roles": (
        r"cls_token is '\[SEP\]' in transformers, not '\[CLS\]'",
        {"vocab__txt": vocabulary(), "tokenizer_config__json": CLASS | {"cls_token": "[SEP]", "sep_token": "[CLS]"}},
    ),
    "[mask] in any case": (
        r"the text '.*\[mask\].*' is",
        {"tokenizer__json": tokenizer_json(_added(normalized=True))},
    ),
    "[MASK] as a word only": (
        r"the text '.*a\[MASK\]b.*' is",
        {"tokenizer__json": tokenizer_json(_added(single_word=True))},
    ),
    "special tokens split": (
        r"the text '\[PAD\]",
        {"tokenizer__json": tokenizer_json(), "tokenizer_config__json": CLASS | {"split_special_tokens": True}},
    ),
    "padding on the left": (
        "padding_side is left in transformers and right in fastbert",
        {"tokenizer__json": tokenizer_json(), "tokenizer_config__json": CLASS | {"padding_side": "left"}},
    ),
    "truncation on the left in tokenizer.json": (
        "its truncation is on the left",
        {"tokenizer__json": tokenizer_json(_cut_left), "tokenizer_config__json": CLASS},
    ),
    "no [UNK]": (
        "unk_token is None, which is not allowed",
        {"vocab__txt": vocabulary(), "tokenizer_config__json": CLASS | {"unk_token": None}},
    ),
    "truncation on the left": (
        "truncation_side is left in transformers",
        {"vocab__txt": vocabulary(), "tokenizer_config__json": CLASS | {"truncation_side": "left"}},
    ),
    "another template": (
        "its post_processor .TemplateProcessing. is not",
        {"tokenizer__json": tokenizer_json(_template)},
    ),
    "no template": (
        r"the text '' is \[\[CLS\] \[SEP\]\] in fastbert and \[\] in transformers",
        {"tokenizer__json": tokenizer_json(lambda content: content.update(post_processor=None))},
    ),
    "another class": (
        "is a RobertaTokenizer, not a BertTokenizer",
        {"tokenizer__json": tokenizer_json(), "tokenizer_config__json": {"tokenizer_class": "RobertaTokenizer"}},
    ),
    "another model": (
        "has model_type 'roberta', for which transformers uses another tokenizer",
        {"tokenizer__json": tokenizer_json(), "config__json": {"model_type": "roberta"}},
    ),
    "a file for other versions": (
        "has fast_tokenizer_files, which fastbert does not read",
        {
            "tokenizer__json": tokenizer_json(),
            "tokenizer_config__json": {"fast_tokenizer_files": ["tokenizer.4.0.json"]},
        },
    ),
    "vocab.txt with a byte order mark": (
        r"vocab\.txt begins with a byte order mark, .*sed -i ",
        {"vocab__txt": "\ufeff" + vocabulary(), "tokenizer_config__json": CLASS},
    ),
    "a setting that is none": (
        "do_lower_case is 'no', which is not allowed",
        {"vocab__txt": vocabulary(), "tokenizer_config__json": CLASS | {"do_lower_case": "no"}},
    ),
}
