"""Report of a pipeline: a table models x tasks with the spread over seeds, paired comparisons with the baseline, costs,
and for each job the command that repeats it alone."""

from collections.abc import Sequence
from pathlib import Path

from fastbert.errors import plural
from fastbert.files import make_inner_folder
from fastbert.finetuning.results import score_summary
from fastbert.finetuning.table import NOTHING
from fastbert.report.page import Table, code
from fastbert.report.report_page import ReportPage
from fastbert.streams import echo
from fastbert.studies.engine.jobs import title
from fastbert.studies.engine.outcomes import print_failures
from fastbert.studies.engine.store import RESULTS, ResultRow, ResultStore, is_done
from fastbert.studies.pipelines.commands import command_of, repeated
from fastbert.studies.pipelines.graph import COMMAND, PREPARE, Graph
from fastbert.studies.pipelines.lost import without_models
from fastbert.studies.pipelines.results import BITS, LOSS, Figure, Results, results_of
from fastbert.studies.shared.comparison import ModelComparison
from fastbert.studies.shared.evaluate_jobs import EVALUATE
from fastbert.studies.shared.plots import plot_scores
from fastbert.studies.shared.pretrain_jobs import BRANCH, PRETRAIN
from fastbert.studies.shared.report import difference, interval, p_value, percent, provenance
from fastbert.studies.shared.statistics import flip_limits
from fastbert.studies.shared.trained import shown_size
from fastbert.studies.shared.tuning_report import printed_scores, write_compared, write_scores, write_tried

OWN_LOSS = (
    "A validation loss is that of a model's own objective, vocabulary and data: compare two only where these are equal."
)
SEVERAL = (
    "A seed in the tables of scores is a pretraining, with the mean over its fine-tunings: these have an encoder in "
    "common and would not be independent. An ensemble is that of the fine-tunings of one pretraining, averaged "
    "over the pretrainings."
)
SINGLE = (
    "Each model is one pretraining, and a seed in the tables of scores is a fine-tuning of it: the tests are about "
    "these encoders, not about the ways in which they were pretrained."
)


def report_pipeline(graph: Graph, store: ResultStore, selected: Sequence[object]) -> int:
    """Writes the report, prints the table and failures, and returns the exit code.

    Args:
        selected: the jobs of this call; the report covers all that are done.
    """
    results = results_of(graph, store)
    rows = store.ended
    done = [row for row in rows if is_done(row)]
    failed = [row for row in rows if not is_done(row)]
    folder = store.out / "report"
    make_inner_folder(folder)
    report = ReportPage(f"Pipeline {store.out.name}", folder)
    write_report(report, graph, store, results)
    report.write(provenance(graph.pipeline.path, graph.pipeline.threads, done))
    if done:
        print(f"{overview_table(results).plain()}\n")
        for figure in results.figures:
            if figure.name != LOSS and (lines := compared_figure(figure, results)):
                print(f"{figure.name}: models compared with {results.models[0]}\n{lines.plain()}\n")
        if results.comparison.trials:
            print(printed_scores(results.comparison, results.ensembles))
    print(f"{store.out / RESULTS}\n{folder / 'report.html'}")
    if len(selected) < len(graph.jobs) and (left := len(graph.jobs) - len(done) - len(failed)):
        echo(f"{plural(left, 'job')} of other entries are not done")
    return print_failures(failed, len(graph.jobs), shown)


def shown(row: ResultRow) -> str:
    """Text that distinguishes a job from others of its model and task."""
    names = ("learning_rate", "batch_size", "epochs", "trial")
    parts = [f"{name.replace('_', ' ')} {row[name]:g}" for name in names if name in row]
    parts += [f"seed {row['seed']}"] if row["seed"] is not None else []
    return ", ".join(parts) or row["kind"]


def write_report(report: ReportPage, graph: Graph, store: ResultStore, results: Results) -> None:
    """Adds all sections to the page, and writes the plots."""
    done = sum(map(store.is_done, graph.jobs))
    failed = [row for row in store.ended if not is_done(row)]
    count = f"{done} of {len(graph.jobs)} jobs are done" + (f", {len(failed)} failed or did not run" if failed else "")
    report.text(
        f"{count}. {plural(len(results.models), 'model')}, the baseline is {results.models[0]}. Figures are medians "
        f"over the seeds ± the standard deviation; scores of tasks and accuracies are x 100, on dev."
    )
    report.table(overview_table(results))
    legends = {LOSS: OWN_LOSS, BITS: "Bits per byte are those of the pseudo-log-likelihood: lower is better."}
    if lines := [legends[figure.name] for figure in results.figures if figure.name in legends]:
        report.text(" ".join(lines))
    if results.comparison.trials:
        report.text(SEVERAL if results.several_pretrainings else SINGLE)
    if results.comparison.trials:
        write_scores(report, results.comparison, results.ensembles)
        write_compared(report, results.comparison)
        write_tried(report, results.comparison)
    _figures(report, results)
    for line in graph.left_out:
        report.text(f"{line}.")
    report.heading("Models")
    report.table(models_table(graph))
    report.heading("Cost")
    report.table(cost_table(graph, store, results.models))
    report.text("Seconds of the jobs that are done, on whatever ran next to them; interrupted attempts count.")
    if failed:
        report.heading("Failed jobs")
        report.table(Table(["job", "model", "setting", "reason"], [_failed(row) for row in failed]))
        for row in failed:
            if row["log"]:
                report.text(f"The end of the log of {row['task']}, {row['model']}, {shown(row)}:")
                report.points([code(line) for line in row["log"]])
        report.text("The same command runs them again.")
    report.heading("Jobs")
    report.text(
        f"The command of a job repeats it alone, in {Path.cwd()}, with what the jobs before it wrote. `run first` has "
        "jobs whose fine-tuned models were removed: run their commands first."
    )
    report.table(jobs_table(graph, store))


def _failed(row: ResultRow) -> list[str]:
    return [row["task"], row["model"], shown(row), row["reason"]]


def _cell(values: Sequence[float], percentage: bool = False) -> str:
    if not values:
        return NOTHING
    figures = score_summary(values)
    text = percent if percentage else (lambda value: NOTHING if value is None else f"{value:.3f}")
    return text(figures["median"]) + ("" if figures["std"] is None else f" ± {text(figures['std'])}")


def overview_table(results: Results) -> Table:
    """Models x figures and tasks, each at its best setting."""
    comparison = results.comparison
    head = ["model", *(figure.name for figure in results.figures), *comparison.tasks]
    rows = []
    for model in results.models:
        cells = [_cell(figure.of(model)) for figure in results.figures]
        for task in comparison.tasks:
            trials = comparison.trials.get((model, task))
            cells.append(NOTHING if trials is None else _cell(trials.scores(trials.best), percentage=True))
        rows.append([model, *cells])
    return Table(head, rows)


def compared_figure(figure: Figure, results: Results) -> Table | None:
    """Every model compared with the baseline by a figure; None if there is no other."""
    rows = [
        [
            line.other,
            str(line.result.n),
            difference(line.result) if figure.scale == 100 else f"{line.result.mean:+.4f}",
            interval(line.result) if figure.scale == 100 else _interval(line.result.low, line.result.high),
            p_value(line.p_t),
            p_value(line.p_flip),
            verdict(line, lower_is_better=figure.name == BITS),
        ]
        for line in figure.compared(results.models[0])
    ]
    head = ["model", "seeds", "difference", "95 % interval", "p (t), Holm", "p (sign flips), Holm", "verdict"]
    return Table(head, rows) if rows else None


def verdict(line: ModelComparison, lower_is_better: bool) -> str:
    """The verdict of a comparison; it names the better model, where that is the one with the lower figure too."""
    if not lower_is_better or line.verdict == "undecided":
        return line.verdict
    higher, lower = (line.other, line.first) if line.result.mean > 0 else (line.first, line.other)
    return line.verdict.replace(f"{higher} higher", f"{lower} lower", 1)


def _interval(low: float | None, high: float | None) -> str:
    return NOTHING if low is None else f"[{low:+.4f}, {high:+.4f}]"


def _figures(report: ReportPage, results: Results) -> None:
    panels = {figure.name: {model: figure.of(model) for model in figure.values} for figure in results.figures}
    if not panels:
        return
    report.heading("Pretraining and zero-shot evaluation")
    labels = {figure.name: "x 100" if figure.scale == 100 else figure.name for figure in results.figures}
    report.plot("figures.svg", "Figures of every seed, and their median.", plot_scores, panels, labels)
    for figure in results.figures:
        if figure.name == LOSS or (table := compared_figure(figure, results)) is None:
            continue
        report.text(f"{figure.name}: each model compared with {results.models[0]}, pairs of the same seed.")
        report.table(table)
        found = figure.compared(results.models[0])
        if limit := flip_limits((line.result.n for line in found), len(found)):
            report.text(limit)


def models_table(graph: Graph) -> Table:
    """Size and origin of each model."""
    rows = []
    for name, model in graph.models.items():
        entry = model.entry
        made = f"checkpoint {entry.path}" if entry.path else model.objective
        made += f", after {entry.after}" if entry.after else ""
        if entry.branch:
            made += f", branch of {entry.branch}" + (f" at step {entry.step}" if entry.step else "")
        rows.append(
            [
                name,
                shown_size(model.config),
                str(model.config.heads),
                model.config.position,
                f"{len(entry.seeds)}",
                made,
            ]
        )
    return Table(["model", "layers x width", "heads", "positions", "seeds", "pretraining"], rows)


def cost_table(graph: Graph, store: ResultStore, models: Sequence[str]) -> Table:
    """Minutes of the finished jobs of each model, and of those of no model."""
    kinds = {"pretraining": (PRETRAIN, BRANCH), "zero-shot": (EVALUATE,)}
    others = (PREPARE, COMMAND)
    minutes: dict[str, dict[str, float]] = {model: {} for model in models}
    for job in graph.jobs:
        if store.is_done(job):
            part = next((name for name, its in kinds.items() if job.kind in its), "fine-tuning")
            part = job.task if job.kind in others else part
            name = job.model if job.kind not in others else f"({job.model})"
            of_model = minutes.setdefault(name, {})
            of_model[part] = of_model.get(part, 0.0) + store.rows[job.id]["seconds"] / 60
    parts = list(dict.fromkeys(part for of_model in minutes.values() for part in of_model))
    rows = [
        [name, *(f"{found[part]:.2f}" if part in found else NOTHING for part in parts), f"{sum(found.values()):.2f}"]
        for name, found in minutes.items()
    ]
    return Table(["minutes", *parts, "all"], rows)


def jobs_table(graph: Graph, store: ResultStore) -> Table:
    """All jobs with their state and command. Where a fine-tuned model that a command reads was removed, the command
    reads what the command of that job writes."""
    rows = []
    by_id = {job.id: job for job in graph.jobs}
    for job in graph.jobs:
        row = store.rows.get(job.id)
        state = "to do" if row is None else row["status"]
        seconds = f"{row['seconds']:.1f}" if row is not None and row["seconds"] is not None else NOTHING
        gone = [one for one in job.after if store.is_done(by_id[one]) and without_models(job, by_id[one], store.out)]
        command = command_of(job, {graph.folder(one): repeated(one) for one in gone})
        rows.append([graph.entries[job.id], title(job), job.id, state, seconds, ", ".join(gone), code(command)])
    return Table(["entry", "job", "id", "state", "seconds", "run first", "command"], rows)
