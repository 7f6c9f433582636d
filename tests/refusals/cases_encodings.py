"""Text that is not UTF-8, and vocabularies that programs split differently."""

import gzip
import json
from pathlib import Path

MUTTER = "Die Mütter prüfen „Größe“ – für 5 €.\n\nÜber Öfen.\n"
JAPANESE = "日本語の文章をここに書いてみます。\n\nカタカナもあります。\n"
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "é", "##a")
TOKENIZERS = {
    "cr": "\r".join(WORDS).encode(),
    "bom": "\ufeff".encode() + "\n".join(WORDS).encode(),
    "wide": "\n".join(WORDS).encode("utf-16"),
    "latin": "\n".join(WORDS).encode("latin1"),
    "twice": "\n".join((*WORDS, "a ")).encode(),
    "blank": "\n".join((*WORDS, "", "", "b")).encode(),
    "zero": "\n".join((*WORDS, "\0")).encode(),
}


def files(folder: Path) -> None:
    made = {
        "1252.txt": MUTTER.encode("cp1252"),
        "my file.txt": MUTTER.encode("cp1252"),
        "sjis.txt": JAPANESE.encode("shift_jis"),
        "eucjp.txt": JAPANESE.encode("euc_jp"),
        "16.txt": MUTTER.encode("utf-16"),
        "16le.txt": MUTTER.encode("utf-16-le"),
        "16be.txt": JAPANESE.encode("utf-16-be"),
        "32.txt": MUTTER.encode("utf-32"),
        "1252.txt.gz": gzip.compress(MUTTER.encode("cp1252"), mtime=0),
        "last.txt": b"fine\n\na caf\xe9",
        "cut.txt": ("Größe\n\nund Ma" + "ß").encode()[:-1],
        "bad.txt": MUTTER.encode() + b"one \xff byte\n\n" + MUTTER.encode(),
        "mixed.txt": (MUTTER * 3).encode() + (MUTTER * 9).encode("cp1252"),
        "cesu.txt": b"fine\n\na \xed\xa0\xbd\xed\xb8\x80 b\n",
        "binary.txt": b"fine\n\n\x80\x01\x02\x03\xff\x05\n",
        "zero.txt": b"fine\n\nab\0cd\n",
        "16be.jsonl": (json.dumps({"text": MUTTER}, ensure_ascii=False) + "\n").encode("utf-16-be"),
        "16.jsonl": (json.dumps({"text": MUTTER}, ensure_ascii=False) + "\n").encode("utf-16"),
        "1252.jsonl": b'{"text": "fine"}\n' + json.dumps({"text": MUTTER}, ensure_ascii=False).encode("cp1252"),
        "cesu.jsonl": b'{"text": "a \xed\xa0\xbd b"}\n',
        "zero.jsonl": b'{"text": "a\0"}\n',
        "16.yaml": "seed: 1 # Größe\n".encode("utf-16"),
        "16le.yaml": b"s\0e\0e\0d\0:\0 \x001\0\n\0",
        "1252.yaml": "seed: 1 # „Größe“\n".encode("cp1252"),
        "zero.yaml": b"seed: 1\n# \0\n",
        "good.txt": b"one document\n\nanother one\n",
    }
    for name, content in made.items():
        (folder / name).write_bytes(content)
    for name, content in TOKENIZERS.items():
        (folder / name).mkdir()
        (folder / name / "vocab.txt").write_bytes(content)
    (folder / "json").mkdir()
    (folder / "json" / "tokenizer.json").write_bytes('{"model": "é"}'.encode("utf-16"))


def prepare(source: str) -> str:
    return f"prepare --source {source} --out out --workers 1"


def tokenizer(folder: str) -> str:
    return f"prepare --source good.txt --out out --workers 1 --tokenizer {folder}"


CASES = [
    (
        prepare("1252.txt"),
        "1252.txt is not UTF-8 text (byte 0xfc, line 1): it is probably Windows-1252, in which it reads",
    ),
    (prepare("1252.txt"), "convert it with: iconv -f WINDOWS-1252 -t UTF-8 1252.txt > 1252.utf8.txt"),
    (prepare("'my file.txt'"), "iconv -f WINDOWS-1252 -t UTF-8 'my file.txt' > 'my file.utf8.txt'"),
    (prepare("sjis.txt"), "it is probably Shift-JIS (CP932), in which it reads '日本語の文章をここに書いてみます。'"),
    (prepare("sjis.txt"), "iconv -f CP932 -t UTF-8 sjis.txt > sjis.utf8.txt"),
    (prepare("eucjp.txt"), "iconv -f EUC-JP -t UTF-8 eucjp.txt > eucjp.utf8.txt"),
    (prepare("16.txt"), "it is UTF-16, in which it reads 'Die Mütter"),
    (prepare("16le.txt"), "iconv -f UTF-16LE -t UTF-8 16le.txt > 16le.utf8.txt"),
    (prepare("16be.txt"), "iconv -f UTF-16BE -t UTF-8 16be.txt > 16be.utf8.txt"),
    (prepare("32.txt"), "iconv -f UTF-32 -t UTF-8 32.txt > 32.utf8.txt"),
    (prepare("1252.txt.gz"), "gzip -dc 1252.txt.gz | iconv -f WINDOWS-1252 -t UTF-8 > 1252.utf8.txt"),
    (
        prepare("cut.txt"),
        "(byte 0xc3, line 3): it is UTF-8 that ends within a character, so it was cut off; fetch it again",
    ),
    (
        prepare("bad.txt"),
        "(byte 0xff, line 4): it is UTF-8 with damaged bytes; fetch it again, or drop them with: iconv -c",
    ),
    (prepare("last.txt"), "(byte 0xe9, line 3): it is probably Windows-1252, in which it reads 'a café'"),
    (prepare("mixed.txt"), "it is UTF-8 before and probably Windows-1252 from there"),
    (prepare("cesu.txt"), "(byte 0xed, line 3): it is UTF-8 except for surrogates"),
    (prepare("binary.txt"), "it is binary, not text; give UTF-8 text"),
    (prepare("zero.txt"), "zero.txt is binary, not text: a zero byte in line 3"),
    (prepare("16be.jsonl"), "iconv -f UTF-16BE -t UTF-8 16be.jsonl > 16be.utf8.jsonl"),
    (prepare("16.jsonl"), "iconv -f UTF-16 -t UTF-8 16.jsonl > 16.utf8.jsonl"),
    (prepare("1252.jsonl"), "1252.jsonl is not UTF-8 text (byte 0xfc, line 2): it is probably Windows-1252"),
    (prepare("cesu.jsonl"), "cesu.jsonl is not UTF-8 text (byte 0xed, line 1): it is UTF-8 except for surrogates"),
    (prepare("zero.jsonl"), "zero.jsonl is binary, not text: a zero byte in line 1"),
    (
        "pretrain 16.yaml",
        "configuration file 16.yaml is not UTF-8 text (byte 0x00, line 1): it is UTF-16, in which it reads",
    ),
    ("finetune 16le.yaml", "iconv -f UTF-16LE -t UTF-8 16le.yaml > 16le.utf8.yaml"),
    ("sweep 1252.yaml", "it is probably Windows-1252, in which it reads 'seed: 1 # „Größe“'"),
    ("ablate zero.yaml", "configuration file zero.yaml is binary, not text: a zero byte in line 2"),
    (tokenizer("cr"), "cr/vocab.txt, line 1: a carriage return (\\r) that is not at the end of a line"),
    (
        tokenizer("bom"),
        "begins with a byte order mark, which would become a part of its first token; remove it with: sed -i",
    ),
    (tokenizer("wide"), "iconv -f UTF-16 -t UTF-8 wide/vocab.txt > wide/vocab.utf8.txt"),
    (
        tokenizer("latin"),
        "vocabulary latin/vocab.txt is not UTF-8 text (byte 0xe9, line 7): it is probably Windows-1252",
    ),
    (tokenizer("twice"), "vocabulary twice/vocab.txt: line 9 repeats 'a', line 6"),
    (tokenizer("blank"), "vocabulary blank/vocab.txt: line 10 is blank, as line 9 is"),
    (tokenizer("zero"), "vocabulary zero/vocab.txt is binary, not text: a zero byte in line 9"),
    (tokenizer("json"), "iconv -f UTF-16 -t UTF-8 json/tokenizer.json > json/tokenizer.utf8.json"),
    (f"{prepare('good.txt')} --strip-accents maybe", "--strip-accents must be true or false, not 'maybe'"),
]
