"""What benchmarks with contestants in turns share: rounds that are told, and what the results were measured on."""

import time
from collections.abc import Iterator
from typing import Any

from fastbert.streams import say


def told(rounds: int) -> Iterator[int]:
    """0 to `rounds` - 1, each said on standard error as it begins."""
    start = time.monotonic()
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}, after {time.monotonic() - start:.0f} s")
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
