"""Options of `fastbert run`: flags for where and how to run, and the parts of a pipeline as declared in its YAML
file."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastbert.config import choice
from fastbert.downloads import FROM_HUB
from fastbert.errors import UserError
from fastbert.lists import words
from fastbert.pretraining.options import PretrainOptions
from fastbert.studies.engine.options import EngineOptions
from fastbert.studies.shared.grid import StudyGrid, TaskEntry

KEEP = ("best", "all", "none")
BRACES = re.compile(r"(?<!\$)\{([^{}]*)\}")
"""A name in braces in the line of a command, other than ${NAME}, which the shell replaces."""


@dataclass(frozen=True)
class RunOptions(EngineOptions):
    """Run a pipeline, from text to a table of results: `fastbert run configs/pipelines/x.yaml [options]`.

    The YAML file has models: each with a name and pretrain (a configuration of `fastbert pretrain`, further options of
    it next to it, seeds), path (an existing checkpoint), like (another model, with the options that differ), after (the
    model whose weights it starts from) or branch (model@step, with anneal or steps). data has texts by name, with the
    options of `fastbert prepare`. stages are fine-tunings of every model: name, tasks, learning_rates, batch_sizes,
    epochs, seeds (for each pretrained model), together, after (the stage whose encoders it starts from), models, and
    options of `fastbert finetune`. It may have evaluate (pairs, pll), commands (name, run, after), report (baseline),
    threads, finetune, and the flags below. The same command resumes a stopped pipeline, runs failed jobs again, and
    after a change of the file only what depends on it.
    """

    keep: str = choice("best", KEEP, "choice of models to keep")
    """Fine-tuned models to keep once all jobs are done: best (for each model and task the one with the best score on
    dev), all, or none."""
    only: str | None = None
    """Entries of the file (names, pairs or pll), separated by commas, whose jobs are run; what they depend on must be
    done."""
    until: str | None = None
    """Entries of the file (names, pairs or pll), separated by commas, whose jobs are run with everything that they
    depend on."""
    dry_run: bool = False
    """Print the jobs, how many of them are done, and estimates of time and disk space from short measurements, without
    running any."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.only is not None and self.until is not None:
            raise UserError("give --only or --until, not both")

    @property
    def selected(self) -> list[str]:
        """The names in `only` or `until`; empty for all jobs."""
        return words(self.only or self.until or "")


@dataclass(frozen=True)
class DataEntry:
    """A text to prepare."""

    name: str
    options: Mapping[str, Any]
    """Options of `fastbert prepare` without `out`. `tokenizer` may name other data, or a model."""


@dataclass(frozen=True)
class EncoderEntry:
    """A model to pretrain, or an existing checkpoint (`path`)."""

    name: str
    seeds: tuple[int | None, ...]
    """Seeds of the pretraining; (None,) for an existing checkpoint."""
    values: Mapping[str, Any]
    """Options of `fastbert pretrain` as written; for a branch only those of the branch."""
    options: PretrainOptions | None = None
    """The same options, checked; None for an existing checkpoint and a branch."""
    path: str | None = field(default=None, metadata=FROM_HUB)
    after: str | None = None
    """Model whose weights it starts from."""
    branch: str | None = None
    """Model of which it is a branch."""
    step: int | None = None
    """Step at which the branch begins; None for the newest checkpoint with a constant learning rate."""


@dataclass(frozen=True)
class Stage:
    """Fine-tunings of every model on the same tasks."""

    name: str
    tasks: tuple[TaskEntry, ...]
    """Tasks with their settings; together, the settings of the first are those of all."""
    grid: StudyGrid
    """Options of its jobs."""
    trials: int
    """Number of fine-tunings of each pretrained model with different seeds."""
    after: str | None = None
    """Stage from whose encoders it starts."""
    together: bool = False
    mixture: Mapping[str, Any] = field(default_factory=dict)
    """Options of --together."""
    models: tuple[str, ...] | None = None
    """Names of its models; None for all."""


@dataclass(frozen=True)
class Command:
    """A command of the user."""

    name: str
    run: str
    """Line for the shell; {name} is replaced by the folders of the jobs of that entry, {out} by that of the command."""
    after: tuple[str, ...]
    """Entries that must be done before it, including those in braces."""
    resumes: bool = False
    """The command continues what an earlier attempt left in its folder; otherwise the folder is empty when it
    starts."""
