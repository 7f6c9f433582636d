"""Rounds in which contestants alternate, and results with their date, machine and options."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastbert.files import atomic_file
from fastbert.records import json_text, write_json
from fastbert.streams import echo
from fastbert.training.hardware import describe_machine


def counted_rounds(rounds: int) -> Iterator[int]:
    """Yields 0 to `rounds` - 1 and prints each round to standard error as it begins."""
    start = time.monotonic()
    for number in range(rounds):
        echo(f"round {number + 1} of {rounds}, after {time.monotonic() - start:.0f} s")
        yield number


def measured_on(found: dict[str, Any], processors: str) -> list[str]:
    """The date and machine of results, as lines of Markdown.

    Args:
        found: has `date` and `machine` (`describe_machine`).
        processors: the number of processors used, such as "2 threads".
    """
    machine = found["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    device = ", ".join(machine["gpus"]) or f"{machine['cpu']}, {processors}"
    return [
        f"- date: {found['date']}, commit {machine['commit']}{' with changes' if machine['dirty'] else ''}",
        f"- machine: {device}; {versions}",
    ]


def publish(benchmark: str, options: Any, results: dict[str, Any], document: Callable[[dict[str, Any]], str]) -> None:
    """Writes `benchmark`.json and .md to the folder `options.out`, and prints the JSON if `options.json` is set, else
    the Markdown.

    Args:
        document: converts the content of the JSON to Markdown.
    """
    about = {"benchmark": benchmark, "date": time.strftime("%Y-%m-%d", time.gmtime()), "machine": describe_machine()}
    found = {**about, "options": asdict(options), **results}
    out = Path(options.out)
    write_json(out / f"{benchmark}.json", found)
    with atomic_file(out / f"{benchmark}.md", "w") as file:
        file.write(document(found))
    print(json_text(found) if options.json else document(found))
    echo(f"wrote {out / f'{benchmark}.json'}, {out / f'{benchmark}.md'}")
