"""`fastbert submit`: an archive for GLUE's server with predictions of fine-tuned models, or a check of one."""

from dataclasses import dataclass
from pathlib import Path

import torch

from fastbert.errors import UserError
from fastbert.finetuning.averages import mean_of_models
from fastbert.finetuning.ensemble import Ensemble, open_ensemble
from fastbert.finetuning.glue import GLUE, GlueSource
from fastbert.finetuning.options import SubmitOptions
from fastbert.finetuning.predict import check_fits
from fastbert.finetuning.results import best_seed, read_results, tuned_folder
from fastbert.finetuning.saved import load_task_model
from fastbert.finetuning.scoring import BATCH
from fastbert.finetuning.submission import FILES, validate, write_submission
from fastbert.finetuning.tasks import open_task
from fastbert.outputs import check_output_file, is_standard_output
from fastbert.streams import echo
from fastbert.training.hardware import resolve_device, resolve_precision, setup_machine


@dataclass(frozen=True)
class ArchiveFile:
    """One file of the archive."""

    file: str
    task: str
    split: str
    model: Ensemble | None
    """One model or several; None if the majority label is written."""
    why: str = ""
    """Reason if there is no model."""


def submit(options: SubmitOptions) -> None:
    """Writes and validates an archive, or validates the one given by --check; prints its content.

    Raises:
        UserError: a model or a test split is missing or does not fit, before anything is predicted; or the server would
            not accept the archive given by --check.
    """
    if options.check is not None:
        rows = validate(options.check)
        print(
            "\n".join([f"{options.check}: valid for GLUE's server", *(f"  {f:<11} {n:>9,}" for f, n in rows.items())])
        )
        return
    check_output_file(options.out)
    device = resolve_device(options.machine.device)
    precision, warning = resolve_precision(options.machine.precision, device)
    if warning:
        echo(warning)
    setup_machine(options.machine, device)
    parts = plan(options)
    predictions: dict[str, dict[str, list]] = {}
    for part in parts:
        if part.model is not None:
            words = predict_part(part, part.model, options, device, precision)
            predictions.setdefault(part.task, {})[part.split] = words
    rows = write_submission(options.out, predictions, options.fill)
    lines = [f"{options.out}: {len(rows)} files, valid for GLUE's server"]
    for part in parts:
        filler = "majority label" if GLUE[part.task].kind.labels else "mean score"
        majority = f"{filler} {GLUE[part.task].majority} in every row: {part.why}"
        source = majority if part.model is None else names_of(part.model)
        lines.append(f"  {part.file:<11} {rows[part.file]:>9,}  {source}")
    write = echo if is_standard_output(options.out) else print  # nothing else in the archive
    write("\n".join(lines))


def plan(options: SubmitOptions) -> list[ArchiveFile]:
    """Source of each file, after checking the record of every model and every test split.

    Raises:
        UserError: see `submit`.
    """
    models = chosen_models(options)
    if not models:
        raise UserError("give models with --models task=folder or --results, or an archive to check with --check")
    for name, model in models.items():
        for member in model.members:
            trained_on = load_task_model(member.folder).record.task
            if trained_on != name and (name, trained_on) != ("ax", "mnli"):
                raise UserError(f"{member.name} was trained on {trained_on}, not on {name}; give the model of {name}")
    parts = []
    for file, (name, split) in FILES.items():
        model, why = models.get(name), "no model"
        if model is None and name == "ax":
            model = models.get("mnli")
        if model is not None and options.fill and (why := missing_split(name, split, options.glue_dir)):
            model = None
        if model is not None:
            check_split(model, name, split, options.glue_dir)
        parts.append(ArchiveFile(file, name, split, model, why))
    if all(part.model is None for part in parts):
        raise UserError(f"{options.glue_dir} holds no test split of {', '.join(models)}; fix --glue-dir")
    missing = [part.file for part in parts if part.model is None]
    if missing and not options.fill:
        raise UserError(
            f"no model for {', '.join(missing)}, and GLUE's server requires all {len(FILES)} files; give more "
            "--models, or --fill to use the majority label"
        )
    return parts


def chosen_models(options: SubmitOptions) -> dict[str, Ensemble]:
    """Task -> its model or models, from --results and --models."""
    chosen: dict[str, list[str]] = {}
    if options.results is not None:
        root = Path(options.results)
        found = sorted([*root.glob("results.json"), *root.glob("*/results.json")])
        if not found:
            raise UserError(f"{root} holds no results.json, nor does a folder in it; give an --out of finetune")
        for path in found:
            name = read_results(path.parent)["task"]
            if name not in GLUE:
                echo(f"{path.parent}: {name} is not a GLUE task, left out")
            else:
                chosen[name] = [str(best_seed(path.parent))]
    for name, folders in options.folders().items():
        chosen[name] = folders if len(folders) > 1 else [str(tuned_folder(Path(folders[0])))]
    return {name: open_ensemble(folders) for name, folders in chosen.items()}


def missing_split(name: str, split: str, glue_dir: str | None) -> str | None:
    """Reason why there is no test split to predict; None if there is one."""
    if glue_dir is None or not Path(glue_dir).is_dir():  # `datasets` has all splits; a wrong folder is reported later
        return None
    try:
        source = GlueSource(name, glue_dir, subset=True)
    except UserError:
        return f"{glue_dir} has no folder {GLUE[name].title}"
    return None if source.has(split) else f"{source.origins()[split]} does not exist"


def check_split(model: Ensemble, name: str, split: str, glue_dir: str | None) -> None:
    """Raises a UserError if the labels of the model differ from the task's, or the test split lacks official rows."""
    task = open_task(name, glue_dir=glue_dir, glue_subset=True)
    check_fits(task, model, names_of(model))
    count, official = len(task.examples(split)), GLUE[name].rows[split]
    if count != official:
        raise UserError(
            f"{task.splits[split]} holds {count:,} rows, and GLUE's server expects {official:,}; download it again"
        )


def predict_part(
    part: ArchiveFile, model: Ensemble, options: SubmitOptions, device: torch.device, precision: str
) -> list[str | float]:
    """Predicted labels, or numbers, for a test split."""
    task = open_task(part.task, glue_dir=options.glue_dir, glue_subset=True)
    examples = task.examples(part.split)
    each = model.encode(examples)
    echo(f"{part.file}: predicting {len(examples):,} rows with {names_of(model)}")
    for line in model.cut(each):
        echo(f"  {line}")
    batch_size = options.machine.micro_batch_size or BATCH
    scores = model.scores(each, device, precision, batch_size, options.machine.kernels)
    return [model.kind.prediction(value) for value in mean_of_models(scores)]


def names_of(model: Ensemble) -> str:
    """The folder of the model, or those of an ensemble."""
    names = ", ".join(member.name for member in model.members)
    return names if len(model.members) == 1 else f"the mean of {len(model.members)} models: {names}"
