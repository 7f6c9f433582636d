"""Minimal pairs and options of `fastbert evaluate` that cannot be used."""

import json
from pathlib import Path

PAIR = json.dumps({"sentence_good": "The cats sleep.", "sentence_bad": "The cats sleeps."}) + "\n"


def files(folder: Path) -> None:
    (folder / "model").mkdir()
    for name in ("nested/blimp/data", "several/blimp", "several/ewok", "pairs"):
        (folder / name).mkdir(parents=True)
        (folder / name / "pairs.jsonl").write_text(PAIR)
    for name in ("packed", "other"):
        (folder / name).mkdir()
    (folder / "packed" / "blimp.tar.xz").write_bytes(b"")
    (folder / "blimp.tar.xz").write_bytes(b"")
    (folder / "other" / "pairs.csv").write_text("sentence_good,sentence_bad\n")
    (folder / "pairs.csv").write_text("sentence_good,sentence_bad\n")
    (folder / "text.txt").write_text("Words.\n")


def pairs(path: str) -> str:
    return f"evaluate --model model --pairs {path}"


CASES = [
    (pairs("nested"), "no file in it ends in .jsonl; give nested/blimp/data"),
    (pairs("nested/blimp"), "no file in it ends in .jsonl; give nested/blimp/data"),
    (pairs("several"), "give one of the folders in it, such as several/blimp"),
    (pairs("packed"), "unpack packed/blimp.tar.xz and give the new folder"),
    (pairs("other"), "no file in it ends in .jsonl; write an object with sentence_good and sentence_bad on each line"),
    (pairs("blimp.tar.xz"), "blimp.tar.xz is an archive by its suffix .tar, which is not read; unpack it"),
    (pairs("pairs.csv"), "pairs.csv must be a folder or a file that ends in .jsonl; write an object with sentence_"),
    (pairs("text.txt"), "text.txt must be a folder or a file that ends in .jsonl"),
    (pairs("pair"), "there are no minimal pairs at pair; did you mean 'pairs'?; give a file or a folder"),
    (pairs("hf:nyu-mll/blimp"), "hf:nyu-mll/blimp are not read from the hub; give a folder of JSONL files"),
    (pairs("'pairs/*.jsonl'"), "pairs/*.jsonl are a pattern; give the folder, of which all .jsonl files are read"),
    ("evaluate --model model --pll pairs", "pairs is a folder; name its files, for example 'pairs/*.jsonl'"),
    (pairs("pairs --sentences 10"), "--sentences has no effect with --pairs; leave it out (it is for --pll)"),
    (pairs("pairs --column words"), "--column has no effect with --pairs; leave it out (it is for --source and --pll)"),
    (pairs("pairs --mask-rate 0.3"), "--mask-rate has no effect with --pairs; leave it out (it is for --source)"),
    ("evaluate --model model --source text.txt --pll-form word-l2r", "--pll-form has no effect with --source; leave"),
    ("evaluate --model model --source text.txt --out scores.jsonl", "--out has no effect with --source; leave it out"),
    ("evaluate --model model --pairs pairs --pll text.txt", "give one of --source, --pll and --pairs, not --pll and"),
]
