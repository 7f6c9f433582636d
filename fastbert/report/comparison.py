"""`fastbert report`: compares pretraining runs on one page: curves, results, options, speed and examples."""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastbert import __version__
from fastbert.errors import UserError
from fastbert.outputs import check_output_file, is_standard_output, output_file
from fastbert.report.interactive import CONTROLS, curve_data, curve_scripts
from fastbert.report.options import ReportOptions
from fastbert.report.page import Table, bullets, fold, heading, html_page, paragraph, warning
from fastbert.report.run_page import cost_rows, result_rows
from fastbert.report.runs import NOTHING, Run, read_run, text_of

GENERATOR = "fastbert report"
MARK = f'<meta name="generator" content="{GENERATOR}">'


def report(options: ReportOptions) -> int:
    """Writes the page and prints where; returns the exit code.

    Raises:
        UserError: a folder is not a run, or the page cannot be written.
    """
    path = page_path(options.out)
    check_output_file(path)
    refuse_other_file(path)
    runs = with_unique_names(read_once(options.runs))
    page = comparison_page(runs)
    with output_file(path, "w") as file:
        file.write(page)
    if not is_standard_output(path):
        print(f"Report on {len(runs)} run{'' if len(runs) == 1 else 's'}: {path}   (open it in a browser)")
    return 0


def page_path(out: str) -> Path:
    """Path of the page: `out`, with .html appended unless it has this suffix or exists, as a device does; - is standard
    output."""
    if out == "-":
        return Path("/dev/stdout")
    return Path(out if out.lower().endswith((".html", ".htm")) or os.path.exists(out) else f"{out}.html")


def refuse_other_file(path: Path) -> None:
    """Raises a UserError if `path` is a file with content that `fastbert report` did not write."""
    if path.is_file() and path.stat().st_size and not is_standard_output(path):
        with open(path, "rb") as file:
            if MARK.encode() not in file.read(2000):
                raise UserError(f"{path} is a file that fastbert report did not write; choose another --out")


def read_once(paths: Sequence[str]) -> list[Run]:
    """The runs in the order of `paths`, each folder once."""
    unique = {os.path.realpath(path): path for path in reversed(paths)}
    return [read_run(path) for path in reversed(unique.values())]


def with_unique_names(runs: Sequence[Run]) -> list[Run]:
    """The runs with unique names: where folders have the same name, the path is the name."""
    counts = Counter(run.name for run in runs)
    return [replace(run, name=str(run.path)) if counts[run.name] > 1 else run for run in runs]


def comparison_page(runs: Sequence[Run]) -> str:
    """The HTML of the page.

    Raises:
        ImportError: plotly is not installed.
    """
    names = [run.name for run in runs]
    title = f"Runs compared: {', '.join(names)}" if len(runs) <= 3 else f"{len(runs)} runs compared"
    if len(runs) == 1:
        title = f"Run {names[0]}"
    body = [
        *(warning(text) for text in warnings_of(runs)),
        heading("Results"),
        results_table(runs).html(),
        paragraph(
            "The unigram entropy is the loss of guessing each held-out word by its frequency: a masked loss below it "
            "comes from context. All runs are measured on the same masked positions if data, length and number of "
            "held-out sequences are the same."
        ),
        heading("Curves"),
        CONTROLS,
        heading("Cost and speed"),
        cost_table(runs).html(),
        paragraph(
            "Tokens per second and MFU are medians over the logged steps; minutes of a finished run include "
            "validations and checkpoints. Compare them only between runs on the same machine without other load."
        ),
        *(differences(runs) if len(runs) > 1 else ()),
        *examples(runs),
        heading("Runs"),
        bullets([f"`{run.path}`: experiment {text_of(run.manifest.get('experiment'))}, {run.state}" for run in runs]),
        f'<p class="faint">Written by fastbert {__version__}.</p>',
    ]
    return html_page(title, "\n".join(body), curve_scripts(curve_data(runs)), GENERATOR)


def warnings_of(runs: Sequence[Run]) -> list[str]:
    """Warnings about single runs, and reasons why runs cannot be compared."""
    found = [f"{run.name}: {text}" for run in runs for text in run.warnings]
    objectives = sorted({run.objective for run in runs})
    if len(objectives) > 1:
        found.append(
            f"The runs have different objectives ({', '.join(objectives)}): their losses are different quantities and "
            "cannot be compared. Compare the encoders by minimal pairs (`fastbert evaluate --pairs`) or by fine-tuning."
        )
    for key, what in {"data": "data", "length": "sequence lengths"}.items():
        if len({text_of(run.science.get(key)) for run in runs}) > 1:
            found.append(f"The runs have different {what}: their validation losses are measured on different text.")
    if len({text_of(run.config.get("eval_sequences")) for run in runs}) > 1:
        found.append("The runs validate on different numbers of sequences (`--eval-sequences`).")
    return found


def transposed(first: str, runs: Sequence[Run], rows_of: Callable[[Run], Sequence[Sequence[str]]]) -> Table:
    """A table with a row for each run and a column for each name in the [name, value] rows of any run."""
    cells = [dict(rows_of(run)) for run in runs]
    columns = list(dict.fromkeys(name for row in cells for name in row))
    return Table(
        [first, *columns],
        [[run.name, *(row.get(name, NOTHING) for name in columns)] for run, row in zip(runs, cells, strict=True)],
    )


def results_table(runs: Sequence[Run]) -> Table:
    """The last validation of each run."""

    def rows(run: Run) -> list[list[str]]:
        loss = run.last("validation", "loss")
        first = [["objective", run.objective], ["state", run.state]]
        first.append(["validation loss", NOTHING if loss is None else f"{loss:.4f}"])
        return [*first, *(row[:2] for row in result_rows(run))] if run.summary else first

    return transposed("run", runs, rows)


def cost_table(runs: Sequence[Run]) -> Table:
    """Cost, speed and device of each run."""

    def rows(run: Run) -> list[list[str]]:
        resolved = run.resolved
        return [
            *cost_rows(run),
            ["device", run.device],
            ["precision", text_of(resolved.get("precision"))],
            ["CPU threads", text_of(resolved.get("threads"))],
        ]

    return transposed("run", runs, rows)


def differences(runs: Sequence[Run]) -> list[str]:
    """The options that differ between the runs, those of the experiment and those of the machine in separate tables."""
    science = [_flags(run.science) | {"data": _data(run)} for run in runs]
    machine = [
        _flags({f"machine.{name}": value for name, value in run.machine.items()}) | _software(run) for run in runs
    ]
    out = [heading("Options that differ")]
    for title, values in (("Experiment", science), ("Machine and versions", machine)):
        differing, same = _table(runs, values)
        out.append(heading(title, 3))
        out.append(differing.html() if differing.rows else paragraph("No difference."))
        if title == "Experiment":
            out.append(fold("Options that all runs have in common", same.html()))
    return out


def _flags(values: Mapping[str, Any]) -> dict[str, str]:
    return {f"--{name}".replace("_", "-"): text_of(value) for name, value in values.items() if name != "data"}


def _data(run: Run) -> str:
    return f"{run.manifest['data']['folder']} ({text_of(run.science.get('data'))})"


def _software(run: Run) -> dict[str, str]:
    machine = run.session_machine
    versions = machine.get("versions")
    named = (
        {f"version of {name}": text_of(value) for name, value in versions.items()} if isinstance(versions, dict) else {}
    )
    return {"device": run.device, "commit": text_of(machine.get("commit"))[:12], **named}


def _table(runs: Sequence[Run], values: Sequence[Mapping[str, str]]) -> tuple[Table, Table]:
    """The rows whose values differ, with a column for each run, and those that are equal, with one column."""
    differing, same = [], []
    for name in dict.fromkeys(name for one in values for name in one):
        cells = [one.get(name, NOTHING) for one in values]
        if len(set(cells)) > 1:
            differing.append([name, *cells])
        else:
            same.append([name, cells[0]])
    grid = [["option", *(run.name for run in runs)], *differing]
    if len(runs) > max(4, len(differing)) and differing:  # a row for each run
        grid = [list(row) for row in zip(*grid, strict=True)]
        grid[0][0] = "run"
    table = Table(grid[0], grid[1:])
    return table, Table(["option", "value"], same)


def examples(runs: Sequence[Run]) -> list[str]:
    """Held-out sentences with the answers of each run next to each other; a sentence of several runs appears once."""
    sentences: dict[str, dict[str, str]] = {}
    for run in runs:
        for example in run.summary["examples"] if run.summary else ():
            sentence, _, answer = example.partition("\n")
            sentences.setdefault(sentence.strip(), {})[run.name] = answer.strip().removeprefix("-> ") or NOTHING
    if not sentences:
        return []
    names = [run.name for run in runs if any(run.name in answers for answers in sentences.values())]
    rows = [[sentence, *(answers.get(name, NOTHING) for name in names)] for sentence, answers in sentences.items()]
    return [heading("Examples from held-out text"), Table(["sentence", *names], rows).html()]
