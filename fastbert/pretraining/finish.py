"""The end of a run: the export, the curves, and a summary of what the model learned."""

from collections.abc import Sequence
from pathlib import Path

import torch

from fastbert.data.batches import validation_batches
from fastbert.files import make_inner_folder
from fastbert.hub.card import model_card
from fastbert.hub.names import check_weights, exported_weights, head_of, is_bert
from fastbert.inputs import read_or_problem
from fastbert.objectives.objective import Metric, Objective
from fastbert.pretraining.closing_lines import closing_lines
from fastbert.pretraining.evaluation import evaluate, shown
from fastbert.pretraining.exports import export
from fastbert.pretraining.loop import Progress
from fastbert.pretraining.run import RunFolder
from fastbert.pretraining.setup import PretrainSetup
from fastbert.progress import progress
from fastbert.records import json_text, write_json
from fastbert.report.learned import change_lines, changes
from fastbert.report.run_page import PAGE, write_run_page
from fastbert.report.runs import read_run
from fastbert.streams import echo
from fastbert.training.logbook import NothingToPlotError, plot_curves, read_metrics


def finish(setup: PretrainSetup, objective: Objective, run: RunFolder, progress: Progress) -> None:
    """Exports the model, plots the curves, and writes the summary to report/ and standard output."""
    validation = setup.dataset.split("validation")
    unigram = validation.unigram_entropy
    final = {name: value for name, value in progress.last_eval.items() if name != "step"}
    export(setup, objective, run, progress, run.model)
    make_inner_folder(run.report)
    plot: Path | None = run.report / "curves.png"
    try:
        title = f"{run.path.name}: {setup.config.position}, {setup.options.objective}"
        plot_curves(run.metrics, plot, title=title, baseline=unigram if objective.loss_in_nats else None)
    except ImportError:
        echo("matplotlib is not installed: no curves are plotted; metrics.jsonl has the figures")
        plot = None
    except NothingToPlotError as error:  # records may be lost between two sessions
        echo(f"no curves are plotted: {error}")
        plot = None
    measured = objective.metrics(final)
    figures = summary_lines(measured, unigram)
    examples, lines = examples_of(setup, objective)
    write_json(
        run.report / "summary.json",
        {
            "step": progress.step,
            "tokens": progress.tokens,
            "validation": final,
            "figures": [figure._asdict() for figure in measured],
            "unigram_entropy": unigram,
            "loss_in_nats": objective.loss_in_nats,
            "parameters": objective.parameter_count(),
            "flops": setup.plan().total(objective.flops, 0, progress.step),
            "skipped_updates": progress.skipped,
            "examples": examples,
            "examples_heading": lines[1] if lines else "",
            "seconds": round(progress.seconds, 1),
            "sessions": progress.sessions,
        },
    )
    print(summary(progress, figures, unigram, [*change_lines(changes(read_metrics(run.metrics))), *lines]))
    written, problem = read_or_problem(read_run, run.path)
    if written:
        write_run_page(written, setup.options, data_facts(setup))
    else:
        echo(f"the run's report page is not written: {problem}")
    native, head = is_bert(setup.config), head_of(exported_weights(objective.state_dict()))
    exports = run.exports if run.exports.is_dir() else None
    page = run.report / PAGE if written else None
    closing = closing_lines(
        run.path, run.model, exports, plot, page, length=setup.options.length, native=native, head=head
    )
    print("\n".join(["", *closing]))


def data_facts(setup: PretrainSetup) -> dict[str, str]:
    """Facts about the data for the run's report page: name -> text."""
    train, validation = setup.dataset.split("train"), setup.dataset.split("validation")
    return {
        "folder": setup.options.data,
        "tokens for training": f"{len(train):,}",
        "tokens held out": f"{len(validation):,}",
        "vocabulary": f"{setup.config.vocab_size:,}",
        **{f"held out as {name}": str(data.folder) for name, data in setup.others.items()},
        **replayed_data(setup),
        "hash": setup.fingerprint,
    }


def replayed_data(setup: PretrainSetup) -> dict[str, str]:
    """The old data among the rows, for the run's report page; empty without replay."""
    replay = setup.options.replay
    return {"old data": f"{100 * replay.fraction:g} % of the rows"} if replay.active else {}


@progress("filling in the examples")
def examples_of(setup: PretrainSetup, objective: Objective) -> tuple[list[str], list[str]]:
    """Held-out sentences with the predictions of the networks, and their lines in the summary."""
    with torch.compiler.set_stance("force_eager"):  # compiled code would be recompiled for every length
        heading, examples = objective.examples(
            setup.dataset.split("validation"), setup.vocabulary, setup.options.length
        )
    numbered = [f"  {number}. {example}" for number, example in enumerate(examples, 1)]
    return examples, ["", heading, *numbered] if examples else []


@progress("checking export and summary")
def check_finish(setup: PretrainSetup, objective: Objective) -> None:
    """Computes everything that the end of a run needs from the objective once before training, so that a bug in it
    appears before the first step instead of after the last."""
    row = validation_batches(setup.rows("validation"), 1, 1, next(objective.parameters()).device)
    with torch.compiler.set_stance("force_eager"):
        measured = evaluate(objective, row, setup.precision)
    for values in (measured, dict.fromkeys(measured)):  # None: not finite
        summary_lines(objective.metrics(values), unigram=0.0)
    json_text(examples_of(setup, objective))
    weights = exported_weights(objective.state_dict())
    check_weights(setup.config, weights, f"objective {setup.options.objective}")
    model_card(setup.config, "", native=is_bert(setup.config), head=head_of(weights), parameters=0, facts={})


def summary(progress: Progress, figures: Sequence[str], unigram: float, examples: Sequence[str]) -> str:
    lines = [
        "",
        f"Trained {progress.step} steps on {progress.tokens / 1e6:.2f}M tokens in {progress.seconds / 60:.1f} minutes"
        f"{f' over {progress.sessions} sessions' if progress.sessions > 1 else ''}.",
        "",
        "Held-out documents",
        f"  unigram entropy   {unigram:.3f} nats   (guessing words by their frequency)",
        *figures,
        *examples,
    ]
    return "\n".join(lines)


def summary_lines(figures: Sequence[Metric], unigram: float) -> list[str]:
    """A line for each figure; losses of masked words are compared with the unigram entropy."""
    lines = []
    for figure in figures:
        is_loss = figure.words and figure.value is not None
        comparison = f"   ({compared(unigram - figure.value)})" if is_loss else ""
        lines.append(f"  {figure.label:<17} {shown(figure, digits=3)}{comparison}")
    return lines


def compared(gain: float) -> str:
    if gain > 0:
        return f"{gain:.3f} below the unigram entropy"
    return f"{-gain:.3f} above the unigram entropy: nothing learned yet"
