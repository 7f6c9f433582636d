"""`fastbert bench data`: compares the speed of preparing text with the tokenizers library, and the cost of reading
batches with a training step. Contestants alternate, each time in a new process."""

import io
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from fastbert.bench.options import BenchDataOptions
from fastbert.bench.rounds import counted_rounds, measured_on, publish
from fastbert.data.corpus import BATCH_CHARACTERS
from fastbert.data.prepare import PrepareOptions, prepare
from fastbert.data.sources import open_source
from fastbert.data.tokenizer_folders import load_tokenizer
from fastbert.files import disk_errors, make_folder, remove_empty
from fastbert.model.options import EncoderOptions
from fastbert.processes import without_control_c

# The encoder of the training step that reading is compared with.
ENCODER = EncoderOptions(layers=4, width=256, heads=4, position="absolute")
STEPS, STEP_SECONDS = 30, 5.0  # batches read in a round; seconds of timed training


def bench_data(options: BenchDataOptions) -> int:
    """Runs the benchmark, prints and writes its results; returns the exit code.

    Raises:
        UserError: the text does not exist or is too short, or the folder cannot be written.
    """
    with scratch_folder(Path(options.out)) as folder:
        text, size = write_text(options, folder / "text.txt")
        prepared = prepare_options(options, text, folder / "prepared", tokenizer=None)
        prepare(prepared, table=io.StringIO())
        tokenizer = folder / "prepared" / "tokenizer"
        contestants: dict[str, Callable[[], dict[str, float]]] = {
            "prepare": lambda: in_new_process(
                time_prepare, prepare_options(options, text, folder / "again", str(tokenizer))
            ),
            "encode_batch_fast": lambda: in_new_process(time_library, text, tokenizer, options.cores),
            "loader": lambda: in_new_process(time_loader, folder / "prepared", options),
        }
        rounds = [{name: run() for name, run in contestants.items()} for _ in counted_rounds(options.rounds)]
    found = {"cores": options.cores, "text_bytes": size, "rows": results(rounds, size, options)}
    publish("data", options, found, document)
    return 0


@contextmanager
def scratch_folder(out: Path) -> Iterator[Path]:
    """A temporary folder in `out`; after an error, the folders that were created for `out` are removed too."""
    made = make_folder(out)
    try:
        with disk_errors(out), tempfile.TemporaryDirectory(prefix=".bench-data-", dir=out) as folder:
            yield Path(folder)
    except BaseException:
        remove_empty(made)
        raise


def write_text(options: BenchDataOptions, path: Path) -> tuple[Path, int]:
    """Writes the first megabytes of the source to a text file for both contestants; returns its path, and the bytes of
    its documents."""
    size, most = 0, options.megabytes * 1e6
    with open(path, "w", encoding="utf-8") as file:
        for document in open_source(options.data, options.column).documents():
            file.write(f"{document}\n\n")
            size += len(document.encode())
            if size >= most:
                break
    return path, sum(len(document.encode()) for document in text_documents(path))


def text_documents(path: Path) -> Iterator[str]:
    return open_source(str(path)).documents()


def prepare_options(options: BenchDataOptions, text: Path, out: Path, tokenizer: str | None) -> PrepareOptions:
    return PrepareOptions(
        source=str(text),
        out=str(out),
        tokenizer=tokenizer,
        vocab_size=options.vocab_size,
        workers=options.workers,
        validation_fraction=0.02,
    )


def in_new_process(function: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """The function's result, computed in a new process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as executor:
        with without_control_c():
            submitted = executor.submit(function, *arguments)
        return submitted.result()


def time_prepare(options: PrepareOptions) -> dict[str, float]:
    """Times `prepare` from a text file to a folder of shards, including the start of workers and the rare words."""
    start = time.perf_counter()
    prepare(options, table=io.StringIO())
    seconds = time.perf_counter() - start
    shutil.rmtree(options.out)
    return {"seconds": seconds}


def time_library(text: Path, tokenizer: Path, threads: int) -> dict[str, float]:
    """Times the library's fastest call on text in memory; its output is discarded."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    library = load_tokenizer(tokenizer).build()
    library.encode_special_tokens = True
    batches: list[list[str]] = [[]]
    characters = 0
    for document in text_documents(text):
        batches[-1].append(document)
        characters += len(document)
        if characters >= threads * BATCH_CHARACTERS:  # a single batch would take gigabytes
            batches.append([])
            characters = 0
    start = time.perf_counter()
    for batch in batches:
        library.encode_batch_fast(batch, add_special_tokens=False)
    return {"seconds": time.perf_counter() - start}


def time_loader(prepared: Path, options: BenchDataOptions) -> dict[str, float]:
    """Seconds per step for reading the rows, for sampling the masks, and for the whole training step with both."""
    from fastbert.pretraining.budget import seconds_per_step
    from fastbert.pretraining.options import PretrainMachineOptions, PretrainOptions
    from fastbert.pretraining.setup import prepare_setup

    shape = {"encoder": ENCODER, "length": options.length, "batch_size": options.batch_size, "steps": 1000}
    machine = PretrainMachineOptions(threads=options.workers, micro_batch_size=None)
    chosen = PretrainOptions(str(prepared), **shape, machine=machine)
    setup = prepare_setup(chosen)
    objective, batches = setup.objective().train(), setup.batches()
    took = {"rows": 0.0, "masks": 0.0}
    for step in range(-3, STEPS):  # three to warm up
        start = time.perf_counter()
        micro_batches = list(batches.at(step % 1000))
        read = time.perf_counter()
        for batch in micro_batches:
            objective.sample(batch, 0, step % 1000)
        if step >= 0:
            took["rows"] += (read - start) / STEPS
            took["masks"] += (time.perf_counter() - read) / STEPS
    return {**took, "step": seconds_per_step(setup, objective, STEP_SECONDS)}


def results(rounds: list[dict[str, dict[str, float]]], size: int, options: BenchDataOptions) -> list[dict[str, Any]]:
    """A row for each measurement: `what`, `unit`, `median`, `least`, `most`, and `ratio` to its reference in the same
    round."""
    tokens = options.batch_size * options.length
    speeds = [{name: size / one[name]["seconds"] / 1e6 for name in ("prepare", "encode_batch_fast")} for one in rounds]
    steps = [one["loader"] for one in rounds]
    rows = [
        spread_row("fastbert prepare", "MB/s", [s["prepare"] for s in speeds]),
        spread_row("tokenizers encode_batch_fast, in memory", "MB/s", [s["encode_batch_fast"] for s in speeds]),
        spread_row("rows of a step", "ms", [1000 * s["rows"] for s in steps]),
        spread_row("masks of a step", "ms", [1000 * s["masks"] for s in steps]),
        spread_row("a training step, 4 x 256", "ms", [1000 * s["step"] for s in steps]),
    ]
    rows[0]["ratio"] = statistics.median(s["prepare"] / s["encode_batch_fast"] for s in speeds)
    for row, name in zip(rows[2:4], ("rows", "masks"), strict=True):
        row["ratio"] = statistics.median(s[name] / s["step"] for s in steps)
    for row, name in zip(rows[2:], ("rows", "masks", "step"), strict=True):
        row["tokens_per_second"] = round(statistics.median(tokens / s[name] for s in steps))
        row["rows_per_second"] = round(statistics.median(options.batch_size / s[name] for s in steps))
    return [{**row, "ratio": round(row["ratio"], 4)} if "ratio" in row else row for row in rows]


def spread_row(what: str, unit: str, values: list[float]) -> dict[str, Any]:
    numbers = {"median": statistics.median(values), "least": min(values), "most": max(values)}
    return {"what": what, "unit": unit, **{name: round(value, 3) for name, value in numbers.items()}}


def document(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    options = found["options"]
    lines = [
        "# Data",
        "",
        *measured_on(found, f"{found['cores']} cores"),
        f"- text: {found['text_bytes'] / 1e6:.1f} MB of {options['data']}, {options['vocab_size']} words",
        f"- steps: {options['batch_size']} x {options['length']} tokens; {options['rounds']} rounds, alternating",
        "",
        "| | median | min | max | rows/s | tokens/s | ratio |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]
    for row in found["rows"]:
        rates = [f"{row[name]:,}" if name in row else "" for name in ("rows_per_second", "tokens_per_second")]
        of = "encode_batch_fast" if row["unit"] == "MB/s" else "the step"
        ratio = f"{100 * row['ratio']:.2f} % of {of}" if "ratio" in row else ""
        times = [f"{row[name]:.4g} {row['unit']}" for name in ("median", "least", "most")]
        lines.append(f"| {' | '.join([row['what'], *times, *rates, ratio])} |")
    return "\n".join([*lines, ""])
