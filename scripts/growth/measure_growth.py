"""Measures how step time and memory grow with layers, width, length, vocabulary, notes, choices and processes, and the
time and memory of `fastbert prepare` with the size of a text. Run it without other load.

    python scripts/growth/measure_growth.py --text wikipedia_en.txt.xz --out growth

Each point is a training of its own by `fastbert pretrain`, and the points of all curves alternate in --rounds rounds.
--out receives the prepared texts, rows.jsonl (a line for each measurement; the same command adds those that are
missing), machine.json, tables.md and growth.png.
"""

import argparse
import itertools
import lzma
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.data.note_words import choose_words
from fastbert.data.shards import open_dataset
from fastbert.errors import UserError
from fastbert.files import atomic_file
from fastbert.records import json_text, parse_json, write_json
from fastbert.streams import echo
from fastbert.training.hardware import describe_machine

TOKENS = 4096  # of a step
SKIPPED = 4  # steps at the beginning of a training
BEND = 0.1  # deviation from the fitted line, of the value
RARE = (5, 5000)  # occurrences of the words that may have notes
BASE = {"layers": 4, "width": 256, "length": 128, "position": "tupe-r", "machine.threads": 2}
MEGABYTE = 10**6


@dataclass(frozen=True)
class Point:
    """A training, or a preparation of a text."""

    curve: str
    x: float
    options: dict[str, Any] = field(default_factory=dict)
    vocabulary: int = 8192
    processes: int = 1


@dataclass(frozen=True)
class Curve:
    """Label of what grows, and the degree of the polynomial that is fitted to time and memory."""

    label: str
    degree: int = 1


CURVES = {
    "layers": Curve("layers"),
    "width": Curve("width", 2),
    "length": Curve("length (4,096 tokens a step)"),
    "length, absolute": Curve("length, absolute positions"),
    "vocabulary": Curve("words of the vocabulary"),
    "notes": Curve("notes, in a fifth of the text"),
    "choices": Curve("choices (multiple choice)"),
    "processes": Curve("processes of one thread"),
    "prepare": Curve("text to prepare, MB"),
}


def points(toy: bool) -> list[Point]:
    """All points; with `toy` the two smallest of each curve, and of small encoders."""
    lengths = (128, 256, 512, 1024, 2048)
    found = [Point("layers", n, {"layers": n}) for n in (2, 4, 8, 16)]
    found += [Point("width", n, {"width": n}) for n in (128, 256, 512, 1024)]
    found += [Point("length", n, {"length": n}) for n in lengths]
    found += [Point("length, absolute", n, {"length": n, "position": "absolute"}) for n in lengths]
    found += [Point("vocabulary", n, vocabulary=n) for n in (8192, 16384, 32768, 65536, 131072)]
    bands = ((2000, 5000), (500, 2000), (100, 500), (30, 100), (5, 30))
    found += [
        Point("notes", 0, {"notes.enabled": True, "notes.min-count": low, "notes.max-count": high})
        for low, high in bands
    ]
    found += [
        Point("choices", n, {"objective": "multiple-choice", "multiple-choice.choices": n}) for n in (2, 5, 10, 20, 50)
    ]
    found += [Point("processes", n, {"machine.threads": 1}, processes=n) for n in (1, 2)]
    found += [Point("prepare", n) for n in (2, 8, 32, 128)]
    if toy:
        by_curve = itertools.groupby(found, lambda point: point.curve)
        found = [point for _, group in by_curve for point in itertools.islice(group, 2)]
    return found


def peak_memory(process: int) -> int:
    """Largest resident memory (KB) that a process or one of its descendants has had."""
    peak = 0
    with suppress(OSError, StopIteration):
        children = Path(f"/proc/{process}/task/{process}/children").read_text(encoding="utf-8").split()
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
        peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
        peak = max(peak, *map(peak_memory, map(int, children)), 0)
    return peak


def run(command: Sequence[str]) -> tuple[float, float]:
    """Seconds of a command, and the largest resident memory (MB) of one of its processes.

    Raises:
        UserError: it fails.
    """
    start, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        while process.poll() is None:  # not `ru_maxrss`, which begins with the memory of this process
            peak = max(peak, peak_memory(process.pid))
            time.sleep(0.05)
        seconds = time.perf_counter() - start
        errors.seek(0)
        if process.returncode:
            raise UserError(f"{' '.join(command)} failed:\n{errors.read()}")
    return seconds, peak * 1024 / MEGABYTE


class Measurement:
    """The prepared texts and the trainings of a call."""

    def __init__(self, text: Path, out: Path, steps: int, toy: bool) -> None:
        self.text, self.out, self.steps, self.toy = text, out, steps, toy

    def first_bytes(self, megabytes: float) -> Path:
        """A file with the beginning of the text."""
        path = self.out / f"{megabytes:g}MB.txt"
        if not path.is_file():
            opener = lzma.open if self.text.suffix == ".xz" else open
            with opener(self.text, "rb") as source, atomic_file(path) as file:
                file.write(source.read(int(megabytes * MEGABYTE)))
        return path

    def prepare(self, megabytes: float, vocabulary: int, out: Path) -> tuple[float, float]:
        command = [sys.executable, "-m", "fastbert", "prepare", "--source", str(self.first_bytes(megabytes))]
        command += ["--out", str(out), "--vocab-size", str(vocabulary), "--workers", "2"]
        return run([*command, "--rare-min", str(RARE[0]), "--rare-max", str(RARE[1])])

    def data(self, vocabulary: int) -> Path:
        """The prepared text of a vocabulary."""
        folder = self.out / f"words-{vocabulary}"
        if not folder.is_dir():
            self.prepare(0.2 if self.toy else 32, vocabulary, folder)
        return folder

    def measure(self, point: Point) -> dict[str, Any]:
        if point.curve == "prepare":
            with tempfile.TemporaryDirectory(dir=self.out) as folder:
                size = point.x / 20 if self.toy else point.x
                seconds, memory = self.prepare(size, 300 if self.toy else 8192, Path(folder) / "data")
            return {"x": point.x, "milliseconds": 1000 * seconds, "megabytes": memory}
        data = self.data(300 + point.vocabulary // 1000 if self.toy else point.vocabulary)
        options = BASE | point.options
        if self.toy:
            options |= {"layers": 1, "width": 16, "heads": 2, "length": 32}
        options["batch-size"] = (256 if self.toy else TOKENS) // options["length"]
        with tempfile.TemporaryDirectory() as folder:
            seconds, memory = run(self.command(point, data, options, folder))
            lines = (Path(folder) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [row for line in lines if (row := parse_json(line, "the metrics", dict))["split"] == "train"]
        times = [1000 * options["batch-size"] * options["length"] / row["tokens_per_second"] for row in rows]
        x = point.x
        if point.curve == "notes":
            low, high = options["notes.min-count"], options["notes.max-count"]
            x = len(choose_words(open_dataset(data), low, high, 0.2))
        found = {"x": x, "milliseconds": statistics.median(times[SKIPPED:]), "megabytes": memory}
        return found | {"flops": rows[-1]["flops"] / rows[-1]["step"]}

    def command(self, point: Point, data: Path, options: dict[str, Any], folder: str) -> list[str]:
        command = [sys.executable, "-m", "fastbert"]
        if point.processes > 1:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc-per-node", str(point.processes), "-m", "fastbert"]
        command += ["pretrain", "--data", str(data), "--out", f"{folder}/run", "--steps", str(self.steps)]
        command += ["--log-every", "1", "--eval-every", str(self.steps), "--eval-sequences", "2"]
        command += ["--machine.micro-batch-size", str(options["batch-size"])]
        for name, value in options.items():
            command += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        return command


def medians(rows: Sequence[dict[str, Any]], curve: str) -> list[dict[str, float]]:
    """Median, minimum and maximum over the rounds of each point of a curve, by size."""
    groups: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        if row["curve"] == curve:
            groups.setdefault(row["point"], []).append(row)
    found = []
    for group in groups.values():
        times = [row["milliseconds"] for row in group]
        summary = {"x": group[0]["x"], "ms": statistics.median(times), "least": min(times), "most": max(times)}
        summary["megabytes"] = statistics.median(row["megabytes"] for row in group)
        found.append(summary | {"flops": group[0].get("flops", 0)})
    return sorted(found, key=lambda summary: summary["x"])


def fit(x: Sequence[float], y: Sequence[float], degree: int) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients, highest power first, of the polynomial with the smallest relative errors, and these errors."""
    degree = min(degree, len(x) - 1)
    coefficients = np.polyfit(x, y, degree, w=1 / np.asarray(y))
    return coefficients, np.polyval(coefficients, x) / y - 1


def formula(coefficients: np.ndarray, unit: str) -> str:
    powers = ("", " x", " x^2")
    terms = [f"{value:.3g}{power}" for value, power in zip(coefficients[::-1], powers, strict=False)]
    return f"{' + '.join(terms)} {unit}".replace("+ -", "- ")


def table(curve: str, found: Sequence[dict[str, float]]) -> str:
    """The points of a curve, the fitted lines, and where the time deviates from its own."""
    label, degree = CURVES[curve].label, CURVES[curve].degree
    seconds = curve == "prepare"
    unit, scale = ("s", 1e-3) if seconds else ("ms", 1)
    lines = [f"| {label} | {unit}, median (min to max) | GFLOP/s | MB |", "|---:|---:|---:|---:|"]
    for row in found:
        rate = f"{row['flops'] / row['ms'] / 1e6:.0f}" if row["flops"] else ""
        spread = f"{row['ms'] * scale:,.1f} ({row['least'] * scale:,.1f} to {row['most'] * scale:,.1f})"
        lines.append(f"| {row['x']:,g} | {spread} | {rate} | {row['megabytes']:,.0f} |")
    if len(found) > degree + 1:
        x = [row["x"] for row in found]
        for name, unit_of, values in (
            ("Time", unit, [row["ms"] * scale for row in found]),
            ("Memory", "MB", [row["megabytes"] for row in found]),
        ):
            coefficients, errors = fit(x, values, degree)
            worst = int(np.argmax(np.abs(errors)))
            text = f"largest deviation {abs(errors[worst]):.0%}, at {x[worst]:,g}"
            bends = [f"{at:,g}" for at, error in zip(x, errors, strict=True) if abs(error) > BEND]
            text += f"; bends at {', '.join(bends)}" if bends else ""
            lines += ["", f"{name} = {formula(coefficients, unit_of)}; {text}."]
    return "\n".join(lines) + "\n"


def plot(curves: dict[str, list[dict[str, float]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 9), dpi=110, layout="constrained")
    panels = figure.subplots(3, 3).flat
    for axes, (curve, found) in zip(panels, curves.items(), strict=False):
        scale = 1e-3 if curve == "prepare" else 1
        x, y = np.array([row["x"] for row in found]), np.array([row["ms"] * scale for row in found])
        axes.plot(x, y, "o", color="C0")
        if len(found) > CURVES[curve].degree + 1:
            dense = np.geomspace(max(x[0], 1e-9), x[-1], 100)
            axes.plot(dense, np.polyval(fit(x, y, CURVES[curve].degree)[0], dense), color="C0", linewidth=1)
        axes.set(xlabel=CURVES[curve].label, ylabel="s" if curve == "prepare" else "ms per step")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    with atomic_file(path) as file:
        figure.savefig(file, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="text file of at least 128 MB, or .xz of one")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--curves", nargs="+", choices=CURVES, default=list(CURVES), help="default: all")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--steps", type=int, default=16, help="steps of a training (default: 16)")
    parser.add_argument("--toy", action="store_true", help="tiny encoders, to try the script")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "rows.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows = [parse_json(line, f"{path}, line {number}", dict) for number, line in enumerate(lines, 1)]
    done = {(row["curve"], row["point"], row["round"]) for row in rows}
    measurement = Measurement(arguments.text, arguments.out, arguments.steps, arguments.toy)
    try:
        for round_ in range(arguments.rounds):
            for number, point in enumerate(points(arguments.toy)):
                if point.curve not in arguments.curves or (point.curve, number, round_) in done:
                    continue
                row = {"curve": point.curve, "point": number, "round": round_, **measurement.measure(point)}
                rows.append(row)
                with path.open("a", encoding="utf-8") as file:
                    file.write(json_text(row) + "\n")
                echo(f"{point.curve} {row['x']:g}: {row['milliseconds']:.1f} ms, {row['megabytes']:.0f} MB")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    curves = {curve: medians(rows, curve) for curve in CURVES if any(row["curve"] == curve for row in rows)}
    text = "".join(f"## {CURVES[curve].label}\n\n{table(curve, found)}\n" for curve, found in curves.items())
    with atomic_file(arguments.out / "tables.md") as file:
        file.write(text.encode())
    write_json(arguments.out / "machine.json", describe_machine())
    plot(curves, arguments.out / "growth.png")


if __name__ == "__main__":
    main()
