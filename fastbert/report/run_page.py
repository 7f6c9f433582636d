"""The page of one run, report/index.html: results, curves, examples, options, machine and cost."""

from collections.abc import Mapping
from typing import Any

from fastbert.config import leaves
from fastbert.files import atomic_file
from fastbert.report.curves import curves_svg
from fastbert.report.learned import changes
from fastbert.report.page import Table, excerpt, fold, heading, html_page, paragraph, warning
from fastbert.report.runs import NOTHING, Run, count_text, mapping, text_of
from fastbert.streams import echo

PAGE = "index.html"


def write_run_page(run: Run, options: Any, data: Mapping[str, str]) -> None:
    """Writes report/index.html of a finished run: one file that opens without a network.

    Args:
        options: the options of the run, a dataclass.
        data: properties of its data, by name.

    Raises:
        UserError: the file cannot be written.
    """
    body = "\n".join(
        [
            *(warning(text) for text in run.warnings),
            _results(run),
            _learned(run),
            _curves(run),
            _examples(run.summary),
            heading("Cost"),
            Table(["quantity", "value"], cost_rows(run)).html(),
            heading("Data"),
            Table(["property", "value"], [[name, value] for name, value in data.items()]).html(),
            options_section(options),
            heading("Machine and versions"),
            sessions_table(run).html(),
        ]
    )
    with atomic_file(run.path / "report" / PAGE, "w") as file:
        file.write(html_page(f"Pretraining run {run.name}", body))


def result_rows(run: Run) -> list[list[str]]:
    """[metric, value, difference from the unigram entropy] of the last validation of a finished run."""
    entropy, rows = run.summary["unigram_entropy"], []
    for figure in run.summary.get("figures", [{"label": k, "value": v} for k, v in run.summary["validation"].items()]):
        value, unit, difference = figure["value"], figure.get("unit", ""), ""
        text = "not finite" if value is None else f"{100 * value:.1f} %" if unit == "%" else f"{value:.4f}"
        if figure.get("chance") is not None:
            difference = f"chance: {figure['chance']:.4f}"
        if figure.get("words") and value is not None:
            difference = f"{abs(entropy - value):.3f} {'below' if value < entropy else 'above'} the unigram entropy"
        rows.append([figure["label"] + (" (nats)" if unit == "nats" else ""), text, difference])
    return [*rows, ["unigram entropy (nats)", f"{entropy:.4f}", ""]]


def _results(run: Run) -> str:
    text = (
        f"Objective {run.objective}, {text_of(run.science.get('position'))} positions, {run.summary['step']:,} steps. "
        "Measured on held-out documents, with the same masks for every run. The unigram entropy is the loss of "
        "guessing each word by its frequency: a loss below it comes from context."
    )
    skipped = run.summary.get("skipped_updates")
    more = warning(f"Skipped updates, because loss or gradient was not finite: {skipped}.") if skipped else ""
    return "\n".join(
        [heading("Results"), Table(["held out", "value", ""], result_rows(run)).html(), paragraph(text), more]
    )


def _learned(run: Run) -> str:
    """Losses on each validation split before and after, if there are several."""
    found = changes(run.records)
    if not found:
        return ""
    rows = [[one.split, one.metric, *one.texts(), one.meaning] for one in found]
    head = ["held-out documents", "", f"step {found[0].step}", "end", "change", ""]
    return heading("Learned and forgotten") + Table(head, rows).html()


def _curves(run: Run) -> str:
    try:
        svg = curves_svg(run, run.summary["unigram_entropy"] if run.summary.get("loss_in_nats") else None)
    except ImportError:
        echo("matplotlib is not installed: the page of the run has no curves")
        return warning("Without curves: matplotlib is not installed. The values are in metrics.jsonl.")
    if svg is None:
        return warning("Without curves: metrics.jsonl has no losses.")
    return heading("Curves") + svg


def _examples(summary: Mapping[str, Any]) -> str:
    if not summary["examples"]:
        return ""
    title = paragraph(text) if (text := summary.get("examples_heading")) else ""
    return heading("Examples from held-out text") + title + "\n".join(map(excerpt, summary["examples"]))


def cost_rows(run: Run) -> list[list[str]]:
    """Resource usage of a run, as [quantity, value] rows."""
    mfu, rate = run.median("mfu"), run.median("tokens_per_second")
    return [
        ["parameters", count_text((run.summary or {}).get("parameters"))],
        ["tokens", count_text(run.tokens)],
        ["training FLOPs", count_text(run.flops, "flops")],
        ["minutes", NOTHING if run.minutes is None else f"{run.minutes:.1f}"],
        ["tokens per second", count_text(rate)],
        ["MFU", NOTHING if mfu is None else f"{100 * mfu:.0f} %"],
    ]


def options_section(options: Any) -> str:
    """The options of a job: those that differ from their defaults, and all of them in a fold."""
    default = {leaf.name: leaf.value for leaf in leaves(type(options)())}
    active = {leaf.name for leaf in leaves(options, active=True)}
    everything = leaves(options)
    rows = [
        [_flag(leaf.name), text_of(leaf.value), text_of(default[leaf.name]), leaf.role]
        for leaf in everything
        if leaf.name in active
    ]
    changed = Table(["option", "value", "default", "concerns"], [row for row in rows if row[1] != row[2]])
    idle = [[_flag(leaf.name), text_of(leaf.value)] for leaf in everything if leaf.name not in active]
    body = Table(changed.head, rows).html()
    if idle:
        body += paragraph("Options without effect in this combination:") + Table(["option", "value"], idle).html()
    return "\n".join(
        [
            heading("Options"),
            paragraph(
                "Options that differ from their defaults. `science` defines the experiment; `machine` changes "
                "speed and memory only; `bookkeeping` sets how often something is measured or saved."
            ),
            changed.html(),
            fold("All options", body),
        ]
    )


def _flag(name: str) -> str:
    return f"--{name}".replace("_", "-")


def sessions_table(run: Run) -> Table:
    """A column for each session of a run: one for its start and each resume."""
    columns = []
    for session in run.manifest["sessions"]:
        machine, resolved = mapping(session.get("machine")), mapping(session.get("resolved"))
        gpus = machine.get("gpus")
        commit = text_of(machine.get("commit"))[:12] + (" with changes" if machine.get("dirty") else "")
        columns.append(
            {
                "started (UTC)": text_of(session.get("started")),
                "from step": text_of(session.get("from_step")),
                "device": text_of(resolved.get("device")),
                "precision": text_of(resolved.get("precision")),
                "CPU threads": text_of(resolved.get("threads")),
                "CPU": f"{text_of(machine.get('cpu'))}, {text_of(machine.get('cores'))} cores",
                "GPUs": ", ".join(map(text_of, gpus)) if isinstance(gpus, list) and gpus else "none",
                "optimizer": text_of(resolved.get("optimizer")),
                "system": text_of(machine.get("system")),
                "commit": commit,
                **{name: text_of(version) for name, version in mapping(machine.get("versions")).items()},
            }
        )
    names = list(dict.fromkeys(name for column in columns for name in column))
    head = ["property", *(["value"] if len(columns) == 1 else [f"session {n}" for n in range(1, len(columns) + 1)])]
    return Table(head, [[name, *(column.get(name, NOTHING) for column in columns)] for name in names])
