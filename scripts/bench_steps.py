"""Step times held against each other, in turns on one machine:

    OMP_NUM_THREADS=1 python scripts/bench_steps.py notes --words 1000 1000000
    OMP_NUM_THREADS=1 python scripts/bench_steps.py choice

notes: a step with notes over one without, for dictionaries of several sizes. choice: a step of multiple choice over one
of ELECTRA, with the same two networks. A step is the loop's: draw, forward, backward, clip, AdamW, after_step. The text
is random; its words with notes are laid out so that 20 % of the sequences hold one, each another row of the dictionary.
Prints the median over rounds of the ratio of a round's two times, and their quartiles.
"""

import argparse
import statistics
import time

import numpy as np
import torch

from fastbert.data.batches import Rows, TrainingBatches
from fastbert.data.noted import NotedWords
from fastbert.data.shards import RareWords
from fastbert.data.stages import Plan
from fastbert.data.tokenizer import SPECIAL_TOKENS, WordPiece
from fastbert.model.encoder import initialize
from fastbert.model.notes import Notes
from fastbert.model.options import EncoderOptions, NotesOptions
from fastbert.objectives import OBJECTIVES
from fastbert.objectives.options import ElectraOptions, MLMOptions, MultipleChoiceOptions
from fastbert.training.hardware import resolve_precision, setup_machine
from fastbert.training.optimizers import build_optimizer
from fastbert.training.options import MachineOptions, OptimizerOptions
from fastbert.training.step import Updater, objective_step


class Text:
    """Random tokens in documents of 300; a word of two pieces in `share` of the rows."""

    def __init__(self, rows: int, length: int, vocab: int, words: int, share: float) -> None:
        random = np.random.default_rng(0)
        self.tokens = random.integers(5, vocab, rows * (length - 1))
        self.documents = np.arange(0, len(self.tokens), 300)
        self.tokens[self.documents[1:] - 1] = 3
        here = np.sort(random.choice(rows, int(share * rows), replace=False))
        positions = here * (length - 1) + random.integers(0, length - 3, len(here))
        number = random.integers(0, words, len(here)).astype(np.int32)
        self.places = RareWords(positions, np.full(len(here), 2, np.uint16), number)

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.tokens[start:stop]

    def rare(self, start: int, stop: int) -> RareWords:
        a, b = np.searchsorted(self.places.positions, [start, stop])
        return RareWords(self.places.positions[a:b], self.places.lengths[a:b], self.places.words[a:b])


class Run:
    """A training that makes one step when it is called, and returns its seconds."""

    def __init__(self, arguments: argparse.Namespace, objective: str = "mlm", words: int = 0) -> None:
        pieces = map(str, range(arguments.vocab_size - len(SPECIAL_TOKENS)))
        config = EncoderOptions(layers=arguments.layers, width=arguments.width).resolve(
            arguments.vocab_size, arguments.length
        )
        text = Text(arguments.batch_size * 50, arguments.length, arguments.vocab_size, max(1, words), arguments.share)
        numbers = np.arange(words, dtype=np.int32)
        noted = NotedWords(text, numbers, arguments.length, 16) if words else None
        rows = Rows(text, arguments.length, 2, 3, noted=noted)
        self.device, self.step = arguments.device, 0
        plan = Plan.constant(arguments.batch_size, arguments.length)
        self.batches = TrainingBatches({arguments.length: rows}, plan, arguments.batch_size, 0, self.device)
        notes = Notes(NotesOptions(), words, config.width, 0) if words else None
        options = {
            "mlm": MLMOptions(),
            "electra": ElectraOptions(),
            "multiple-choice": MultipleChoiceOptions(choices=arguments.choices),
        }[objective]
        vocabulary = WordPiece((*SPECIAL_TOKENS, *pieces))
        self.objective = OBJECTIVES[objective](config, options, vocabulary, notes=notes)
        initialize(self.objective, 0, 0.02)
        self.objective.to(self.device).train()
        optimizer = build_optimizer(self.objective.named_parameters(), OptimizerOptions(), self.device)
        self.updater = Updater(self.objective, optimizer, 1.0, arguments.precision)

    def __call__(self) -> float:
        start = time.perf_counter()
        objective_step(self.updater, self.batches.at(self.step), 0, self.step, 1e-4)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.step += 1
        return time.perf_counter() - start


def compare(first: Run, second: Run, rounds: int, what: str) -> None:
    """Prints the time of a step of `second` over that of one of `first`."""
    first(), second()
    times = [(first(), second()) if turn % 2 else (second(), first())[::-1] for turn in range(rounds)]
    low, middle, high = statistics.quantiles([b / a for a, b in times], n=4)
    of = 1000 * statistics.median(a for a, _ in times)
    print(f"{what}: {middle:.3f} (quartiles {low:.3f} to {high:.3f}) of {of:.0f} ms")


def notes(arguments: argparse.Namespace) -> None:
    plain = Run(arguments)
    for words in arguments.words:
        noted = Run(arguments, words=words)
        compare(plain, noted, arguments.rounds, f"{words:>9,} words, with notes over without")


def choice(arguments: argparse.Namespace) -> None:
    runs = [Run(arguments, objective) for objective in ("electra", "multiple-choice")]
    compare(*runs, arguments.rounds, f"multiple choice of {arguments.choices} over ELECTRA")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("notes", "choice"))
    parser.add_argument("--words", type=int, nargs="+", default=[1000, 1000000], help="in the dictionary (notes)")
    parser.add_argument("--choices", type=int, default=10, help="candidates (choice)")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--share", type=float, default=0.2, help="of the sequences that hold such a word")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    arguments = parser.parse_args()
    arguments.precision, _ = resolve_precision(arguments.precision, arguments.device)
    setup_machine(MachineOptions(), arguments.device)
    print(f"{arguments.device}, {torch.get_num_threads()} threads, {arguments.precision}")
    {"notes": notes, "choice": choice}[arguments.what](arguments)


if __name__ == "__main__":
    main()
