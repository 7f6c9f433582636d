"""Data of the study in docs/results/many-tasks.md: 2,000 examples of MRPC, STS-B and SNLI, RTE, and 10,000 other
examples of SNLI as the task `big`, as custom tasks in a folder.

    python scripts/many_tasks/data.py GLUE_FOLDER SNLI_FOLDER OUT
"""

import random
import sys
from pathlib import Path

from fastbert.finetuning.tasks import open_task
from fastbert.records import json_text, parse_json

COUNTS = {"mrpc": 2000, "stsb": 2000, "rte": 2490}
SMALL, LARGE = 2000, 10_000  # examples of SNLI
PAIR = "text: text\npair: pair\nlabel: label\n"
SENTENCES = "text: sentence1\npair: sentence2\nlabel: label\nlabels: entailment,neutral,contradiction\n"
MORE = {"mrpc": PAIR + "labels: 0,1\n", "rte": PAIR + "labels: 0,1\n", "stsb": PAIR + "kind: number\n"}


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json_text(row) + "\n" for row in rows), encoding="utf-8")


def declare(out: Path, name: str, dev: str, more: str) -> None:
    (out / f"{name}.yaml").write_text(
        f"name: {name}\ntrain: {name}-train.jsonl\ndev: {dev}-dev.jsonl\n{more}", encoding="utf-8"
    )


def main(glue: str, snli: str, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name, count in COUNTS.items():
        task = open_task(name, glue_dir=glue, glue_subset=True)
        for split in ("train", "dev"):
            rows = [
                {"text": one.text, "pair": one.pair, "label": one.label if name == "stsb" else int(one.label)}
                for one in task.examples(split)
            ]
            if split == "train":
                random.Random(0).shuffle(rows)
                rows = rows[:count]
            write(out / f"{name}-{split}.jsonl", rows)
        declare(out, name, name, MORE[name])
    lines = Path(snli, "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [parse_json(line, f"{snli}/train.jsonl", dict) for line in lines]
    random.Random(0).shuffle(rows)
    write(out / "snli-train.jsonl", rows[:SMALL])
    write(out / "big-train.jsonl", rows[SMALL : SMALL + LARGE])
    (out / "snli-dev.jsonl").write_bytes(Path(snli, "dev.jsonl").read_bytes())
    for name in ("snli", "big"):
        declare(out, name, "snli", SENTENCES)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
