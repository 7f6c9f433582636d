"""Tables and plot of docs/results/glue.md, from the files that against_trainer.py has written.

A table is between `<!-- NAME -->` and `<!-- end -->` in the document, and is rewritten from NAME's file next to it.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.errors import UserError
from fastbert.outputs import output_file
from fastbert.records import read_json
from fastbert.report.report_page import write_plot
from fastbert.studies.shared.plots import plot_scores
from fastbert.studies.shared.statistics import LEVEL, holm

SYSTEMS = ("fastbert", "trainer")


def report(arguments: argparse.Namespace) -> None:
    """Writes the tables whose files exist, and plots the seeds."""
    doc: Path = arguments.doc
    if not doc.is_file():
        raise UserError(
            f"there is no document {doc}; give one with the markers <!-- parity -->, <!-- end --> and so on"
        )
    text = doc.read_text(encoding="utf-8")
    for name, file, table in SECTIONS:
        path = doc.with_name(f"{doc.stem}-{file}")
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        if not re.search(pattern, text, re.DOTALL):
            raise UserError(f"{doc} has no <!-- {name} --> ... <!-- end --> to put the table in")
        body = table(path) if path.exists() else "(not measured yet)\n"
        text = re.sub(pattern, lambda match, body=body: f"{match[1]}{body}{match[2]}", text, flags=re.DOTALL)
    with output_file(doc, "w") as file:
        file.write(text)
    path = doc.with_name(f"{doc.stem}-quality.jsonl")
    if path.exists():
        rows = compare(read_lines(path))
        panels = {f"{row['task']}\n{row['metric']}": {system: list(row[system]) for system in SYSTEMS} for row in rows}
        write_plot(doc.with_name(f"{doc.stem}-quality.png"), plot_scores, panels, dict.fromkeys(panels, "x 100"))
    print(doc)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads the rows of a JSONL; none if there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# --- parity


def parity_table(path: Path) -> str:
    cases = read_json(path, "parity")["cases"]
    rows = []
    for name, case in cases.items():
        difference = np.abs(np.array(case["ours"]) - np.array(case["theirs"]))
        cells = [f"{case['ours'][0]:.4f} to {case['ours'][-1]:.4f}"]
        cells += [f"{difference[:count].max():.1e}" if count <= len(difference) else "" for count in (1, 20, 50, 100)]
        rows.append([name, str(len(difference)), *cells])
    head = ("precision", "steps", "loss", "first step", "first 20", "first 50", "first 100")
    return markdown(head, rows)


# --- quality


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compares both systems for every task and metric, in percent, over the seeds that both have finished; with two or
    more seeds also the difference of the means, its 95 % interval and p by Welch's test."""
    from scipy.stats import ttest_ind

    values: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    for row in rows:
        for metrics in row["dev"].values():
            for metric, value in metrics.items():
                if metric != "loss" and value is not None:  # None: training diverged
                    systems = values.setdefault((row["task"], metric), {})
                    systems.setdefault(row["system"], {})[row["seed"]] = 100 * value
    found = []
    for (task, metric), systems in sorted(values.items()):
        seeds = sorted(set.intersection(*(set(systems.get(system, {})) for system in SYSTEMS)))
        if not seeds:
            continue
        ours, theirs = (np.array([systems[system][seed] for seed in seeds]) for system in SYSTEMS)
        row = {"task": task, "metric": metric, "seeds": seeds, "fastbert": ours, "trainer": theirs}
        row["difference"] = float(ours.mean() - theirs.mean())
        if len(seeds) > 1:
            with np.errstate(all="ignore"):
                test = ttest_ind(ours, theirs, equal_var=False)
            interval = test.confidence_interval(0.95)
            row |= {"p": float(test.pvalue), "low": float(interval.low), "high": float(interval.high)}
        found.append(row)
    return found


def beyond(tests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows whose difference is significant by Holm's correction, by ascending p."""
    adjusted = holm({f"{row['task']} {row['metric']}": row["p"] for row in tests})
    found = [row for row, p in zip(tests, adjusted.values(), strict=True) if p < LEVEL]
    return sorted(found, key=lambda row: row["p"])


def quality_table(path: Path) -> str:
    def spread(values: np.ndarray) -> str:
        return f"{values.mean():.2f} ± {values.std(ddof=1):.2f}" if len(values) > 1 else f"{values.mean():.2f}"

    rows = compare(read_lines(path))
    table = []
    for row in rows:
        cells = [row["task"], row["metric"], str(len(row["seeds"])), spread(row["fastbert"]), spread(row["trainer"])]
        cells.append(f"{row['difference']:+.2f}")
        cells += [f"{row['low']:+.2f} to {row['high']:+.2f}", f"{row['p']:.2f}"] if "p" in row else ["", ""]
        table.append(cells)
    head = ("task", "metric", "seeds", "fastbert", "Trainer", "difference", "95 % interval", "p (Welch)")
    return f"{markdown(head, table)}\n{verdict(rows)}\n"


def verdict(rows: list[dict[str, Any]]) -> str:
    """Conclusion from the tests, as a sentence."""
    tests = [row for row in rows if np.isfinite(row.get("p", np.nan))]
    if not tests:
        return "There are too few seeds for a test."
    how = f"Welch's test, Holm's correction over {len(tests)} rows, 5 %"
    if found := beyond(tests):
        named = (f"{row['task']} {row['metric']} ({row['difference']:+.2f}, p {row['p']:.2g})" for row in found)
        return f"Differences beyond the spread over seeds ({how}): {'; '.join(named)}."
    widest = max(tests, key=lambda row: row["high"] - row["low"])
    smallest = min(row["p"] for row in tests)
    return (
        f"No difference beyond the spread over seeds ({how}; smallest p {smallest:.2f}). What it could have missed is "
        f"in the intervals, the widest {widest['low']:+.1f} to {widest['high']:+.1f} points ({widest['task']} "
        f"{widest['metric']})."
    )


# --- speed


def cell(values: list[float], digits: int) -> str:
    return f"{np.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def speed_table(path: Path) -> str:
    """Table of the contestants, and of fastbert with one optimization switched off; ratios are within a round."""
    found = read_json(path, "speed")
    tables = []
    for task in dict.fromkeys(run["task"] for run in found["runs"]):
        runs: dict[str, dict[int, dict[str, Any]]] = {}
        for run in found["runs"]:
            if run["task"] == task:
                runs.setdefault(run["case"], {})[run["round"]] = run
        ours, rows = runs.get("fastbert", {}), {False: [], True: []}
        for case, rounds in runs.items():
            speeds = [run["examples_per_second"] for run in rounds.values()]
            common = [turn for turn in rounds if turn in ours]
            ratios = [ours[turn]["examples_per_second"] / rounds[turn]["examples_per_second"] for turn in common]
            variant = ", " in case
            if variant:
                case, ratios = case.partition(", ")[2], [1 / ratio for ratio in ratios]
            cells = [case, cell(speeds, 1), cell(ratios, 2) if ratios and case != "fastbert" else ""]
            cells += [f"{next(iter(rounds.values()))['tokens_per_example']:.1f}"]
            rows[variant].append([*cells, cell([run["peak_mib"] for run in rounds.values()], 0)])
        first = next(iter(next(iter(runs.values())).values()))
        head = ("examples/s", "tokens/example, with padding", "peak memory, MiB")
        title = f"**{task}**, {first['examples']} examples, {first['threads']} threads, {len(ours)} rounds"
        tables.append(f"{title}\n\n{markdown(('', head[0], 'fastbert : this', *head[1:]), rows[False])}\n")
        if rows[True]:
            without = "fastbert with, instead of its own"
            tables.append(f"{markdown((without, head[0], 'this : fastbert', *head[1:]), rows[True])}\n")
    load = f"Load average before: {found['load_before']:.2f}; at the end: {found['load_after']:.2f}.\n"
    return "".join(tables) + load


SECTIONS: tuple[tuple[str, str, Callable[[Path], str]], ...] = (
    ("parity", "parity.json", parity_table),
    ("quality", "quality.jsonl", quality_table),
    ("speed", "speed.json", speed_table),
)
