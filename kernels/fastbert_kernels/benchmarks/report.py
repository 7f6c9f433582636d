"""Markdown tables and pictures of the benchmarks' rows."""

import io
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastbert_kernels.configurations import Tiles, write_whole


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    lines = [list(header), ["---"] * len(list(header)), *(["" if x is None else str(x) for x in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def header_lines(found: dict[str, Any]) -> str:
    names = ("date", "device", "threads", "torch", "triton", "tiles", "ceilings", "commit")
    lines = [f"- {name}: {found[name]}" for name in names if name in found]
    return "\n".join([*lines, *(["- dry run with tiny shapes: times are meaningless"] if found["toy"] else [])])


def compiled_table(found: dict[str, Any]) -> str:
    """Table with a row for each kernel, configuration and case and a column for each capability: registers / bytes
    spilled / KiB of shared memory / tensor-core instructions."""
    capabilities = sorted({row["capability"] for row in found["rows"]})
    cells: dict[tuple, dict[int, str]] = {}
    for row in found["rows"]:
        tiles = row["tiles"] if isinstance(row["tiles"], str) else " ".join(map(str, row["tiles"]))
        if "failed" in row:
            text = "does not fit"
        else:
            spilled = f"**{row['spilled']}**" if row["spilled"] else "0"
            text = f"{row['registers']} / {spilled} / {row['shared'] // 1024} / {row['tensor_cores']}"
        name = row["kernel"].removesuffix("_kernel")
        key = (name, row["case"], tiles)
        by_capability = cells.setdefault(key, {})
        before = by_capability.get(row["capability"])
        by_capability[row["capability"]] = text if before is None else f"{before}; {text}"
    rows = ([*key, *(texts.get(c, "-") for c in capabilities)] for key, texts in cells.items())
    legend = (
        "Cells: registers per thread / bytes spilled per thread / KiB of shared memory per block / tensor-core "
        "instructions."
    )
    head = ["kernel", "case", "tiles", *(f"{c // 10}.{c % 10}" for c in capabilities)]
    tiles = "Tiles: queries, keys, warps, stages, MiB for the gradient of the scores (0: recomputed)."
    return f"{legend} {tiles}\n\n{markdown_table(head, rows)}"


def roofline_fraction(row: dict[str, Any], passes: str, found: dict[str, Any]) -> float:
    """TFLOP/s relative to the roofline of the machine, for minimum traffic: q, k, v, o (and in the backward pass their
    gradients) once, the bias and its gradient once."""
    length, ceilings = row["length"], found["ceilings"]
    heads, size, tokens = found["shape"].values()
    tensors = {"forward": 4, "backward": 8, "both": 12}[passes] * tokens * heads * size * 2
    bias = (
        {"forward": 1, "backward": 2, "both": 3}[passes] * heads * length**2 * 4
        if "no bias" not in row["contestant"]
        else 0
    )
    flops = {"forward": 4, "backward": 10, "both": 14}[passes] * tokens * heads * length * size
    allowed = min(ceilings["tflops"], flops / (tensors + bias) * ceilings["tbytes"])
    return row[passes]["tflops"] / allowed


def attention_tables(found: dict[str, Any]) -> str:
    parts, passes = [], ("forward", "backward", "both")
    batch = [row for row in found["rows"] if row["case"] == "batch"]
    ours = {row["length"]: row for row in batch if row["contestant"] == "fastbert" and "both" in row}
    for length in sorted({row["length"] for row in batch}):
        rows = []
        for row in (row for row in batch if row["length"] == length):
            if "both" not in row:
                rows.append([row["contestant"], row.get("failed", row.get("wrong")), *[None] * 7])
                continue
            times = [f"{row[k]['ms']} ({row[k]['least']} to {row[k]['most']})" for k in passes]
            speed = [row["both"]["tflops"], f"{roofline_fraction(row, 'both', found):.2f}"]
            times_ours = f"{row['both']['ms'] / ours[length]['both']['ms']:.2f}" if length in ours else None
            errors = row.get("errors", {}).values()
            worst = max((math.inf if None in (a, b) else a / (2 * b + 1e-5) for a, b, _ in errors), default=None)
            rows.append([row["contestant"], *times, *speed, times_ours, row["peak_mib"], worst and f"{worst:.2f}"])
        head = [
            "contestant",
            *(f"{k}, ms" for k in passes),
            "TFLOP/s",
            "fraction of the roofline",
            "time relative to fastbert",
        ]
        parts += [f"### T = {length}", "", markdown_table([*head, "MiB", "error / bound"], rows), ""]
    others = [row for row in found["rows"] if row["case"] != "batch"]
    rows = [
        [
            r["length"],
            r["contestant"],
            *([r[k]["ms"] for k in passes] if "both" in r else [r["failed"]]),
            r.get("peak_mib"),
        ]
        for r in others
    ]
    parts += [
        "### Packed sequences, TUPE",
        "",
        markdown_table(["T", "contestant", *(f"{k}, ms" for k in passes), "MiB"], rows),
    ]
    return "\n".join(parts)


def tune_table(found: dict[str, Any]) -> str:
    rows = [
        [r["kernel"], " ".join(map(str, r["tiles"])), "yes" if r["correct"] else "**no**", r.get("ms", r.get("failed"))]
        for r in found["rows"]
        if "kernel" in r
    ]
    best = next((row["best"] for row in found["rows"] if "best" in row), None)
    return (
        markdown_table(["kernel", ", ".join(Tiles._fields), "correct", "ms of its pass"], rows) + f"\n\nFastest: {best}"
    )


def vocabulary_table(found: dict[str, Any]) -> str:
    names = ("operation", "contestant", "rows", "words", "width", "ms", "least", "most", "peak_mib", "failed")
    return markdown_table(names, ([row.get(name) for name in names] for row in found["rows"]))


def cpu_table(found: dict[str, Any]) -> str:
    names = ("dtype", "bias", "passes", "contestant", "ms", "least", "most", "over")
    head = [*"BHTK", *names[:-1], "time relative to fastbert"]
    return markdown_table(head, ([*row["shape"], *(row[name] for name in names)] for row in found["rows"]))


PAGES = {
    "attention-cpu": ("Attention on a CPU", cpu_table),
    "kernels-compiled": ("Resource usage of the compiled kernels", compiled_table),
    "attention-tune": ("Configurations of the attention kernels", tune_table),
    "attention": ("Attention on a GPU", attention_tables),
    "vocabulary": ("Loss and sampling over a vocabulary", vocabulary_table),
}
"""Name of a benchmark -> title and tables of its page."""


def plot(found: dict[str, Any], path: Path) -> None:
    """Plot TFLOP/s of forward, backward and both, by length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), sharey=True, layout="constrained")
    names = dict.fromkeys(row["contestant"] for row in found["rows"] if row["case"] == "batch")
    for axis, passes in zip(axes, ("forward", "backward", "both"), strict=True):
        for name in names:
            points = sorted(
                (row["length"], row[passes]["tflops"])
                for row in found["rows"]
                if row["case"] == "batch" and row["contestant"] == name and passes in row
            )
            style = "--" if "no bias" in name else "-"
            axis.plot(*zip(*points, strict=True), style, marker="o", label=name) if points else None
        axis.axhline(found["ceilings"]["tflops"], color="grey", linestyle=":", label="a large product")
        axis.set(xscale="log", xlabel="T", title=passes)
        ticks = sorted({row["length"] for row in found["rows"]})
        axis.set_xticks(ticks, ticks, minor=False)
        axis.minorticks_off()
    axes[0].set_ylabel("TFLOP/s")
    axes[0].legend(fontsize="small")
    heads, size, tokens = found["shape"].values()
    figure.suptitle(f"Attention, {tokens:,} tokens, {heads} heads of {size}, bfloat16, {found['device']}")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format="png")
    write_whole(path, picture.getvalue())
    plt.close(figure)


def report(folder: Path, commit: str | None = None) -> list[Path]:
    """Write NAME.md for each NAME.json of a benchmark in `folder`, and a plot for attention; returns the paths."""
    written = []
    for name, (title, tables) in PAGES.items():
        if not (folder / f"{name}.json").is_file():
            continue
        found = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        if commit:
            found["commit"] = commit
        text = [f"# {title}", "", header_lines(found), "", tables(found), ""]
        if name == "attention":
            plot(found, folder / "attention.png")
            written.append(folder / "attention.png")
            text[4:4] = ["![TFLOP/s by length](attention.png)", ""]
        write_whole(folder / f"{name}.md", "\n".join(text))
        written.append(folder / f"{name}.md")
    return written
