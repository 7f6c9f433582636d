"""What benchmarks with contestants in turns share: rounds that are told, and results with what they are of."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastbert.files import atomic_file
from fastbert.records import json_text, write_json
from fastbert.streams import echo
from fastbert.training.hardware import describe_machine


def told(rounds: int) -> Iterator[int]:
    """0 to `rounds` - 1, each said on standard error as it begins."""
    start = time.monotonic()
    for number in range(rounds):
        echo(f"round {number + 1} of {rounds}, after {time.monotonic() - start:.0f} s")
        yield number


def measured_on(found: dict[str, Any], processors: str) -> list[str]:
    """Markdown: the `date` and `machine` (`describe_machine`) of results; `processors` says how many were used."""
    machine = found["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    device = ", ".join(machine["gpus"]) or f"{machine['cpu']}, {processors}"
    return [
        f"- date: {found['date']}, commit {machine['commit']}{' with changes' if machine['dirty'] else ''}",
        f"- machine: {device}; {versions}",
    ]


def publish(benchmark: str, options: Any, results: dict[str, Any], document: Callable[[dict[str, Any]], str]) -> None:
    """Writes `benchmark`.json and .md to the folder `options.out`, and prints one of them, as `options.json` says.

    Args:
        document: makes Markdown of all that the JSON holds.
    """
    about = {"benchmark": benchmark, "date": time.strftime("%Y-%m-%d", time.gmtime()), "machine": describe_machine()}
    found = {**about, "options": asdict(options), **results}
    out = Path(options.out)
    write_json(out / f"{benchmark}.json", found)
    with atomic_file(out / f"{benchmark}.md", "w") as file:
        file.write(document(found))
    print(json_text(found) if options.json else document(found))
    echo(f"wrote {out / f'{benchmark}.json'}, {out / f'{benchmark}.md'}")
