"""What a finished run leaves behind: the export, the curves, and a summary of what it learned."""

from pathlib import Path

import torch
from torch import nn

from fastbert.files import make_inner_folder
from fastbert.hub.card import AUTO_CLASSES
from fastbert.hub.export import export_model
from fastbert.hub.names import head_of, kept
from fastbert.pretraining.examples import examples_of
from fastbert.pretraining.loop import Progress
from fastbert.pretraining.run import RunFolder
from fastbert.pretraining.setup import PretrainSetup
from fastbert.records import write_json
from fastbert.streams import say
from fastbert.training.hardware import describe_machine
from fastbert.training.logbook import NothingToDrawError, plot_curves

NOT_FINITE = "not finite"  # in place of a figure


def finish(setup: PretrainSetup, objective: nn.Module, run: RunFolder, progress: Progress) -> None:
    """Exports the model, draws the curves, prints the summary on standard output and keeps it in report/."""
    validation = setup.dataset.split("validation")
    unigram = validation.unigram_entropy
    final = {name: value for name, value in progress.last_eval.items() if name != "step"}
    weights = kept(objective.state_dict())
    if problem := run.restore_tokenizer(setup.vocabulary):  # damaged during the run
        say(problem)
    export_model(
        setup.config,
        weights,
        run.tokenizer,
        run.model,
        card=model_card(setup, progress, final, unigram),
    )
    make_inner_folder(run.report)
    plot: Path | None = run.report / "curves.png"
    try:
        title = f"{run.path.name}: {setup.config.position}, {setup.options.objective}"
        plot_curves(run.metrics, plot, title=title, baseline=unigram if setup.options.objective == "mlm" else None)
    except ImportError:
        say("matplotlib is not installed: no curves are drawn; metrics.jsonl has the figures")
        plot = None
    except NothingToDrawError as error:  # records may be lost between two sessions
        say(f"no curves are drawn: {error}")
        plot = None
    with torch.compiler.set_stance("force_eager"):  # no sentence is as long as another
        heading, found = examples_of(objective, validation, setup.vocabulary, setup.options.length)
    examples = [str(example) for example in found]
    write_json(
        run.report / "summary.json",
        {
            "step": progress.step,
            "tokens": progress.tokens,
            "validation": final,
            "unigram_entropy": unigram,
            "skipped_updates": progress.skipped,
            "examples": examples,
            "seconds": round(progress.seconds, 1),
            "sessions": progress.sessions,
        },
    )
    opens = AUTO_CLASSES[head_of(weights)]
    print(summary(run, progress, final, unigram, heading, examples, plot, opens))


def summary(
    run: RunFolder,
    progress: Progress,
    final: dict[str, float | None],
    unigram: float,
    heading: str,
    examples: list[str],
    plot: Path | None,
    opens: str,
) -> str:
    lines = [
        "",
        f"Trained {progress.step} steps on {progress.tokens / 1e6:.2f}M tokens in {minutes(progress)} minutes"
        f"{f' over {progress.sessions} sessions' if progress.sessions > 1 else ''}.",
        "",
        "Held-out documents",
        f"  unigram entropy   {unigram:.3f} nats   (guessing words by their frequency)",
    ]
    masked = final.get("mlm_loss", final["loss"])
    nats = NOT_FINITE if masked is None else f"{masked:.3f} nats   ({compared(unigram - masked)})"
    if "accuracy" in final:
        lines.append(f"  masked loss       {nats}")
        lines.append(f"  masked accuracy   {100 * final['accuracy']:.1f} %")
    else:
        lines.append(f"  {'generator' if 'rtd_loss' in final else 'meta controller':<17} {nats}")
        shown = {name: NOT_FINITE if value is None else f"{value:.4f}" for name, value in final.items()}
        lines += [f"  {name:<17} {value}" for name, value in shown.items() if name != "mlm_loss"]
    if examples:
        lines += ["", heading]
        lines += [f"  {number}. {example}" for number, example in enumerate(examples, 1)]
    lines += [
        "",
        f"Model   {run.model}   (transformers opens it: {opens}.from_pretrained)",
        *([f"Curves  {plot}"] if plot else []),
        f"Run     {run.path}   (tensorboard --logdir {run.path / 'tensorboard'})",
    ]
    return "\n".join(lines)


def minutes(progress: Progress) -> str:
    """Of all sessions."""
    return f"{progress.seconds / 60:.1f}"


def compared(gain: float) -> str:
    return f"{gain:.3f} nats under it" if gain > 0 else f"{-gain:.3f} nats over it: nothing learned yet"


def model_card(
    setup: PretrainSetup, progress: Progress, final: dict[str, float | None], unigram: float
) -> dict[str, object]:
    options, machine = setup.options, describe_machine()
    optimizer, schedule = options.optimizer, options.schedule
    on_gpu = setup.device.type == "cuda"
    kind = "nats" if options.objective == "mlm" else "weighted sum of the objective's"
    return {
        "objective": options.objective,
        "data": options.data,
        "steps": progress.step,
        "tokens": progress.tokens,
        "batches": setup.plan().describe(progress.step),
        "optimizer": f"{optimizer.name}, learning rate {optimizer.learning_rate:g}, weight decay "
        f"{optimizer.weight_decay:g}, betas {optimizer.beta1:g} and {optimizer.beta2:g}, clip {optimizer.clip_norm:g}",
        "schedule": f"{schedule.name}, warm-up {schedule.warmup:g}, final share {schedule.final:g}",
        "machine": f"{torch.cuda.get_device_name(setup.device) if on_gpu else machine['cpu']}, {setup.precision}",
        "minutes": minutes(progress),
        "commit and torch": f"{machine['commit']}, {machine['versions']['torch']}",
        f"validation loss ({kind})": NOT_FINITE if final["loss"] is None else round(final["loss"], 4),
        "unigram entropy of the same text (nats)": round(unigram, 4),
        "seed": options.seed,
    }
