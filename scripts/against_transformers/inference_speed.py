"""Times minimal pairs and the predictions of a classifier, by fastbert and by transformers. Run it without other load.

    SCRIPT=scripts/against_transformers/inference_speed.py
    python $SCRIPT --pretrained my-bert --classifier results/sst2/seed-0/model --pairs blimp --texts texts.jsonl \\
        --out speed.json

Both models are BERTs (absolute positions), which both sides open; texts.jsonl has a column `text`. Every contestant is
a process of its own, which makes its whole pass twice; the time is that of the second one, with tokenizing and without
imports, reading the model and compiling (fastbert reads its model in both). Contestants alternate. transformers
computes in the same precision as fastbert; its batches are of similar length (`by length`) or in the order of the file;
compiled is torch.compile with dynamic shapes.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastbert.errors import UserError
from fastbert.finetuning.options import PredictOptions
from fastbert.finetuning.predict import predict
from fastbert.pretraining.evaluate_options import EvaluateOptions
from fastbert.pretraining.zero_shot.pairs import measure_pairs
from fastbert.records import json_text, parse_json, write_json
from fastbert.streams import echo
from fastbert.training.hardware import describe_machine, resolve_precision
from fastbert.training.options import MachineOptions

CONTESTANTS = {
    "pairs": ("fastbert", "transformers by length", "transformers compiled"),
    "texts": ("fastbert", "transformers", "transformers by length", "transformers compiled"),
}
TOKENS = 8192  # of a batch of transformers
CLOSE = 0.02  # largest difference of two probabilities by rounding in bf16; of the pairs, besides two of them

Pass = Callable[[], Any]


def read_texts(path: Path, *columns: str) -> list[list[str]]:
    """The columns of a JSONL file, or of all those in a folder."""
    files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
    rows = [
        parse_json(line, str(file), dict) for file in files for line in file.read_text(encoding="utf-8").splitlines()
    ]
    return [[row[column] for row in rows] for column in columns]


def batches(lengths: Sequence[int], by_length: bool) -> list[np.ndarray]:
    """Indices of the rows of each batch: of at most TOKENS tokens by length, or 32 in the order given."""
    if not by_length:
        return np.split(np.arange(len(lengths)), range(32, len(lengths), 32))
    order, found, start = np.argsort(lengths, kind="stable")[::-1], [], 0
    while start < len(order):
        size = max(1, TOKENS // lengths[order[start]])
        found.append(order[start : start + size])
        start += size
    return found


class Theirs:
    """A model of transformers with its tokenizer.

    Args:
        folder: of the model.
        kind: name of the class of models.
    """

    def __init__(self, folder: str, kind: str, compiled: bool) -> None:
        import transformers

        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = getattr(transformers, kind).from_pretrained(folder, attn_implementation="sdpa").eval()
        if model.config.model_type != "bert":
            raise UserError(f"{folder} is of type {model.config.model_type}, not bert: give absolute positions")
        self.model = torch.compile(model, dynamic=True) if compiled else model
        self.autocast = resolve_precision("auto", torch.device("cpu"))[0] == "bf16"

    def logits(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        batch = self.tokenizer.pad({"input_ids": rows}, return_tensors="pt")
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return self.model(**batch).logits


def pairs_by_transformers(folder: str, path: Path, compiled: bool) -> Pass:
    """Fraction of the pairs whose acceptable sentence has the higher pseudo-log-likelihood: every word is masked
    once."""
    theirs = Theirs(folder, "AutoModelForMaskedLM", compiled)
    good, bad = read_texts(path, "sentence_good", "sentence_bad")

    def measure() -> float:
        sentences = theirs.tokenizer(good + bad)["input_ids"]
        rows, words, positions, owners = [], [], [], []
        for owner, ids in enumerate(sentences):
            for position in range(1, len(ids) - 1):
                rows.append([*ids[:position], theirs.tokenizer.mask_token_id, *ids[position + 1 :]])
                words.append(ids[position])
                positions.append(position)
                owners.append(owner)
        words, positions, owners = map(np.array, (words, positions, owners))
        sums = np.zeros(len(sentences))
        for chosen in batches([len(row) for row in rows], True):
            logits = theirs.logits([rows[i] for i in chosen])
            scores = logits[torch.arange(len(chosen)), positions[chosen]].float().log_softmax(-1)
            np.add.at(sums, owners[chosen], scores[torch.arange(len(chosen)), words[chosen]].double().numpy())
        first, second = sums[: len(good)], sums[len(good) :]
        return float(np.mean((first > second) + 0.5 * (first == second)))

    return measure


def texts_by_transformers(folder: str, path: Path, by_length: bool, compiled: bool) -> Pass:
    """Probabilities of the classes of each text."""
    theirs = Theirs(folder, "AutoModelForSequenceClassification", compiled)
    (texts,) = read_texts(path, "text")
    most = theirs.model.config.max_position_embeddings

    def measure() -> list[list[float]]:
        rows = theirs.tokenizer(texts, truncation=True, max_length=most)["input_ids"]
        found = np.zeros((len(rows), theirs.model.config.num_labels))
        for chosen in batches([len(row) for row in rows], by_length):
            found[chosen] = theirs.logits([rows[i] for i in chosen]).float().softmax(-1).numpy()
        return found.tolist()

    return measure


def texts_by_fastbert(folder: str, path: Path, threads: int) -> Pass:
    """Probabilities of the classes of each text, which are written to a file and read from it again."""

    def measure() -> list[list[float]]:
        with tempfile.TemporaryDirectory() as temporary:
            out = f"{temporary}/out.jsonl"
            predict(PredictOptions(model=folder, source=str(path), out=out, machine=MachineOptions(threads=threads)))
            lines = Path(out).read_text(encoding="utf-8").splitlines()
        return [list(parse_json(line, out, dict)["probabilities"].values()) for line in lines]

    return measure


def pass_of(work: str, contestant: str, arguments: argparse.Namespace) -> Pass:
    compiled, by_length = contestant.endswith("compiled"), contestant != "transformers"
    if work == "pairs":
        if contestant == "fastbert":
            machine = MachineOptions(threads=arguments.threads)
            options = EvaluateOptions(model=arguments.pretrained, pairs=str(arguments.pairs), machine=machine)
            return lambda: measure_pairs(options)["accuracy"]
        return pairs_by_transformers(arguments.pretrained, arguments.pairs, compiled)
    if contestant == "fastbert":
        return texts_by_fastbert(arguments.classifier, arguments.texts, arguments.threads)
    return texts_by_transformers(arguments.classifier, arguments.texts, by_length, compiled)


def time_one(work: str, contestant: str, arguments: argparse.Namespace) -> None:
    """Writes seconds of the two passes, and what they found, to --out."""
    torch.set_num_threads(arguments.threads)
    measure = pass_of(work, contestant, arguments)
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        found = measure()
        seconds.append(time.perf_counter() - start)
    count = len(read_texts(arguments.pairs, "sentence_good")[0]) if work == "pairs" else len(found)
    write_json(arguments.out, {"seconds": seconds, "found": found, "count": count})


def difference(found: Any, expected: Any) -> float:
    return float(np.max(np.abs(np.array(found) - np.array(expected))))


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of all contestants in all rounds; their results are those of fastbert up to rounding.

    Raises:
        UserError: a contestant fails, or finds something else.
    """
    given = {"pairs": arguments.pairs and arguments.pretrained, "texts": arguments.texts and arguments.classifier}
    rows, expected = [], {}
    for round_ in range(arguments.rounds):
        for work, contestant in ((name, one) for name in CONTESTANTS if given[name] for one in CONTESTANTS[name]):
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "one.json"
                command = [sys.executable, __file__, *sys.argv[1:], "--out", str(out), "--one", work, contestant]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise UserError(f"{work}, {contestant}:\n{done.stderr}")
                result = parse_json(out.read_bytes(), "the result", dict)
            away = difference(result["found"], expected.setdefault(work, result["found"]))
            if away > CLOSE + (2 / result["count"] if work == "pairs" else 0):
                raise UserError(f"{work}: {contestant} finds something else than fastbert: {away:.3f}")
            first, second = result["seconds"]
            rows.append(
                {"work": work, "contestant": contestant, "round": round_, "seconds": second, "first": first}
                | {"difference": away, "count": result["count"]}
            )
            echo(json_text(rows[-1]))
    return {"machine": describe_machine(), "threads": arguments.threads, "rows": rows}


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| work | contestant | count | seconds, median (min to max) | first pass | times fastbert's |"]
    lines.append("|---|---|--:|--:|--:|--:|")
    for work, contestants in CONTESTANTS.items():
        times = {
            one: [r["seconds"] for r in rows if (r["work"], r["contestant"]) == (work, one)] for one in contestants
        }
        for one, seconds in times.items():
            if not seconds:
                continue
            ratio = statistics.median(b / a for a, b in zip(times["fastbert"], seconds, strict=True))
            own = [r for r in rows if (r["work"], r["contestant"]) == (work, one)]
            first, count = statistics.median(r["first"] for r in own), own[0]["count"]
            spread = f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
            lines.append(f"| {work} | {one} | {count:,} | {spread} | {first:.2f} | {ratio:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", help="export of a pretrained BERT, for --pairs")
    parser.add_argument("--classifier", help="fine-tuned BERT, for --texts")
    parser.add_argument("--pairs", type=Path, help="JSONL file or folder with sentence_good and sentence_bad")
    parser.add_argument("--texts", type=Path, help="JSONL file with text")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    try:
        if arguments.one:
            time_one(*arguments.one, arguments)
            return
        if not (arguments.pairs and arguments.pretrained) and not (arguments.texts and arguments.classifier):
            raise UserError("give --pretrained with --pairs, --classifier with --texts, or all of them")
        found = compare(arguments)
        write_json(arguments.out, found)
        echo(table(found["rows"]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
