"""A random tiny BERT, and tasks that it can learn: which of two words is in a text, whether both texts of a pair have
it, how often a word occurs."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from fastbert.data.tokenizer import SPECIAL_TOKENS, WordPiece
from fastbert.finetuning.glue import GLUE
from fastbert.hub.export import export_model
from fastbert.model.config import EncoderConfig
from fastbert.model.encoder import Encoder, initialize
from tests.flags import main

SENTENCE = "the a of and to in is was he she it that with as on at by this had not"
FILLERS = tuple(SENTENCE.split())
WORDS = (*SPECIAL_TOKENS, *FILLERS, "good", "bad", "##s")
LABELS = ("bad", "good")


def tiny_config(**choices) -> EncoderConfig:
    sizes = {"vocab_size": len(WORDS), "layers": 2, "width": 32, "heads": 2, "ffn": 64, "max_positions": 30}
    return EncoderConfig(**(sizes | {"initializer_std": 0.1} | choices))


def tiny_model(folder: Path, **choices) -> Path:
    """An export with random weights."""
    config = tiny_config(**choices)
    encoder = Encoder(config)
    initialize(encoder, 0, config.initializer_std)
    WordPiece(WORDS).save(folder / "tokenizer")
    weights = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    export_model(config, weights, folder / "tokenizer", folder / "model")
    return folder / "model"


@pytest.fixture(scope="session")
def bert(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def tupe(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tupe"), position="tupe-r", norm="pre", type_vocab_size=0)


def sentence(rng: random.Random, word: str, longest: int = 14) -> str:
    words = rng.choices(FILLERS, k=rng.randint(1, longest))
    words.insert(rng.randint(0, len(words)), word)
    return " ".join(words)


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_task(folder: Path, kind: str, train: int = 160, dev: int = 60) -> list[str]:
    """Writes train.jsonl and dev.jsonl and returns the flags of the task: words, pairs or numbers."""
    rng = random.Random(kind)
    for split, count in (("train", train), ("dev", dev)):
        rows = []
        for _ in range(count):
            label = rng.choice(LABELS)
            row = {"text": sentence(rng, label), "label": label}
            if kind == "pairs":
                other = rng.choice(LABELS)
                row |= {"pair": sentence(rng, other, 6), "label": "same" if other == label else "different"}
            if kind == "numbers":
                words = rng.choices(FILLERS, k=6)
                often = rng.randint(0, 4)
                row = {"text": " ".join(rng.sample(words + ["good"] * often, 6 + often)), "label": often / 2}
            rows.append(row)
        write_rows(folder / f"{split}.jsonl", rows)
    flags = ["--task", kind, "--custom.train", str(folder / "train.jsonl"), "--custom.dev", str(folder / "dev.jsonl")]
    more = {
        "words": [],
        "pairs": ["--custom.pair", "pair", "--custom.symmetric"],
        "numbers": ["--custom.kind", "number"],
    }
    return [*flags, *more[kind]]


@pytest.fixture(scope="session")
def words(tmp_path_factory) -> list[str]:
    return make_task(tmp_path_factory.mktemp("words"), "words")


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> list[str]:
    return make_task(tmp_path_factory.mktemp("pairs"), "pairs")


@pytest.fixture(scope="session")
def numbers(tmp_path_factory) -> list[str]:
    return make_task(tmp_path_factory.mktemp("numbers"), "numbers")


FAST = (
    *("--machine.threads", "1", "--machine.precision", "fp32", "--machine.device", "cpu"),
    *("--learning-rate", "3e-3", "--epochs", "4", "--seeds", "1", "--batch-size", "16", "--dropout", "0.1"),
)


def make_glue(folder: Path, names: Sequence[str], train: int = 48, dev: int = 24, test: int = 6) -> Path:
    """A small GLUE folder as the official archive lays it out: whether two texts have the same word, or which word it
    is; for STS-B a number."""
    for name in names:
        task = GLUE[name]
        rng = random.Random(name)
        for split in task.rows:
            labelled = not split.startswith("test")
            columns = task.columns if labelled else task.columns[:-1]
            rows = []
            for _ in range({"train": train}.get(split, dev) if labelled else test):
                words = rng.choices(("bad", "good"), k=len(task.columns) - 1)
                texts = [sentence(rng, word, 8) for word in words]
                same = int(len(set(words)) == 1 and words[-1] == "good")
                rows.append(
                    [*texts, task.kind.labels[same] if task.kind.labels else f"{2.5 * same:.3f}"][: len(columns)]
                )
            path = folder / task.title / ("diagnostic.tsv" if name == "ax" else f"{split}.tsv")
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [columns, *rows]
            if header := task.headers.get(split):  # columns of a file that does not name them
                lines = [[dict(zip(columns, row, strict=True)).get(name, "-") for name in header] for row in rows]
            path.write_text("".join("\t".join(line) + "\n" for line in lines))
    return folder


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def finetune(model: Path, task: list[str], out: Path, *more: str) -> int:
    return main(["finetune", "--model", str(model), *task, *FAST, "--out", str(out), *more])
