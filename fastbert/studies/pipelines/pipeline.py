"""A pipeline as its YAML file declares it, and the checks before torch is imported: everything that it names exists."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fastbert.data.replay import ReplayOptions
from fastbert.data.sources import check_source
from fastbert.downloads import TOKENIZER, check_downloaded
from fastbert.finetuning.custom import CustomTaskOptions
from fastbert.finetuning.glue import check_glue_folder
from fastbert.finetuning.tasks import check_glue_options, check_task
from fastbert.hub.folders import check_model_folder
from fastbert.pretraining.evaluate_options import EvaluateOptions
from fastbert.pretraining.options import PretrainOptions
from fastbert.studies.pipelines.options import Command, DataEntry, EncoderEntry, Stage
from fastbert.studies.shared.grid import StudyGrid, prefixed
from fastbert.training.options import PretrainOptimizerOptions
from fastbert.training.splits import named_folders


@dataclass(frozen=True)
class Pipeline:
    """A YAML file."""

    path: str
    data: Mapping[str, DataEntry]
    models: Mapping[str, EncoderEntry]
    stages: Mapping[str, Stage]
    evaluate: Mapping[str, EvaluateOptions]
    """Evaluations of each model: pairs, pll or both."""
    commands: Mapping[str, Command]
    baseline: str
    """Model with which the others are compared."""
    threads: int
    """CPU threads of each job."""

    def check_inputs(self, glue_dir: str | None) -> None:
        """Checks, before torch is imported, that texts, models, tasks, pairs and the GLUE folder exist.

        Raises:
            UserError: one of them does not.
        """
        for name, data in self.data.items():
            with prefixed(f"{self.path}: data: {name}"):
                check_source(data.options["source"], data.options.get("column", "text"))
                tokenizer = data.options.get("tokenizer")
                if tokenizer is not None and tokenizer not in {*self.data, *self.models}:
                    check_downloaded(tokenizer, TOKENIZER, "data or a model of this file, or a folder")
        for name, model in self.models.items():
            with prefixed(f"{self.path}: models: {name}"):
                if model.path is not None:
                    check_model_folder(model.path)
                elif model.options is not None:
                    of_files(self, model).check_sources()
        for name, stage in self.stages.items():
            with prefixed(f"{self.path}: stages: {name}"):
                for task in stage.tasks:
                    check_task(task.task, CustomTaskOptions())
                    check_glue_options([task.task], None, bool(task.overrides.get("glue_subset")), dashes="")
        check_glue_folder(glue_dir)
        with prefixed(self.path):
            tasks = [task.task for stage in self.stages.values() for task in stage.tasks]
            subset = any(stage.grid.finetune.get("glue_subset") for stage in self.stages.values())
            check_glue_options(tasks, glue_dir, subset, dashes="")
        self.grid_of_evaluations().check_inputs(None)

    def grid_of_evaluations(self) -> StudyGrid:
        return StudyGrid((), (), (), self.threads, {}, dict(self.evaluate), self.path)


def of_files(pipeline: Pipeline, model: EncoderEntry) -> PretrainOptions:
    """Options of a pretraining without what its pipeline makes: they name only files that exist already."""
    options, data = model.options, pipeline.data
    changes = {}
    if options.data in data:
        given = data[options.data].options
        changes |= {"data": given["source"], "column": given.get("column", "text")}
    if options.tokenizer in {*data, *pipeline.models}:
        changes["tokenizer"] = None
    if options.replay.data in data:
        changes |= {"replay": ReplayOptions(), "best_by": "new"}
    if options.eval_data is not None:
        rest = {key: folder for key, folder in named_folders(options.eval_data).items() if folder not in data}
        changes |= {"eval_data": ",".join(f"{key}={folder}" for key, folder in rest.items()) or None, "best_by": "new"}
    if model.after is not None:
        changes["optimizer"] = replace(options.optimizer, keep=PretrainOptimizerOptions.keep)
    return replace(options, **changes)
