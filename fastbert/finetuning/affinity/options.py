"""Options of `fastbert affinity`."""

from dataclasses import dataclass, field
from typing import Annotated

from fastbert.config import BOOKKEEPING, MACHINE
from fastbert.downloads import FROM_HUB
from fastbert.errors import OptionError, UserError, about
from fastbert.finetuning.affinity.groups import MOST_TASKS
from fastbert.finetuning.custom import CustomTaskOptions
from fastbert.finetuning.glue import check_glue_folder
from fastbert.finetuning.tasks import check_glue_options, check_task, task_names
from fastbert.hub.folders import check_model_folder
from fastbert.ranges import LARGEST_SEED, Count, Positive, Range, Seed, check_values
from fastbert.training.options import TrainingMachineOptions


@dataclass(frozen=True)
class AffinityOptions:
    """Measure which tasks help each other, and choose groups of tasks to fine-tune together.

    One encoder is trained on all tasks, with a batch of one task in each step. At intervals, a probe measures how a
    step of gradient descent on one task alone would change the losses of the others (TAG, arXiv 2109.04617)."""

    tasks: str | None = field(default=None, metadata=BOOKKEEPING)
    """Two or more tasks separated by commas: GLUE tasks, YAML files of custom tasks, or glue for the eight tasks of the
    GLUE table. Their order has no effect."""
    model: str | None = field(default=None, metadata={**BOOKKEEPING, **FROM_HUB})
    """Pretrained model, as for fastbert finetune: a run, a checkpoint, an export, or a Hugging Face model, as a folder
    or as owner/name[@revision] on the hub."""
    out: str | None = field(default=None, metadata=BOOKKEEPING)
    """Folder for affinity.json, affinity.png and the probes. The same command resumes an interrupted run; after it,
    other values of --groups and --allow-alone need no training."""
    glue_dir: str | None = field(default=None, metadata=BOOKKEEPING)
    """Folder of the official GLUE archive, or of Parquet files (default: nyu-mll/glue through `datasets`)."""
    glue_subset: bool = field(default=False, metadata=BOOKKEEPING)
    """Accept GLUE files with fewer rows than the official number."""

    groups: Count = field(default=2, metadata=BOOKKEEPING)
    """Maximum number of groups. Each task is in at least one group and may be in several."""
    allow_alone: bool = field(default=False, metadata=BOOKKEEPING)
    """Allow groups of one task, with an affinity of 0."""
    every: Count = 10
    """Interval of the probes in steps."""
    epochs: Count = 1
    """Passes over the training splits of all tasks."""
    steps: Count | None = None
    """Number of steps, instead of --epochs. The learning rate is scheduled over them."""
    batch_size: Count = 32
    """Examples per step, and of each task in a probe."""
    max_length: Annotated[int, Range(8, 2**20)] | None = None
    """Maximum input length in tokens (default: the model's positions)."""
    learning_rate: Positive = 5e-5
    """Peak learning rate, of the steps and of the probes."""
    train: bool = field(default=False, metadata=BOOKKEEPING)
    """Compare the chosen groups with the baselines: each task alone, all tasks together, and each task with the largest
    one. All are fine-tuned for the same number of steps, with several seeds, and scored on dev: comparison.json."""
    seeds: Count = field(default=3, metadata=BOOKKEEPING)
    """Number of seeds of the models that --train compares; they begin with --seed."""
    seed: Seed = 0
    """Random seed for the heads' initialization, the order of batches and dropout."""
    machine: TrainingMachineOptions = field(default_factory=TrainingMachineOptions, metadata=MACHINE)

    def __post_init__(self) -> None:
        check_values(self)
        if self.seed > (most := LARGEST_SEED - (self.seeds - 1)):
            raise OptionError(self, "seed", f"must be at most {most:,}, as the other seeds of --train follow it")

    def names(self) -> list[str]:
        """Names or YAML files of the tasks."""
        return task_names(self.tasks) or [self.tasks]

    def check_inputs(self) -> None:
        """Checks, before torch is imported, that model and tasks exist, and that there can be this number of groups.

        Raises:
            UserError: they do not exist, a required option is missing, or there are too few or too many tasks.
        """
        if self.model is not None:  # an error in a given option is reported before a missing one
            check_model_folder(self.model)
        for name in ("model", "tasks", "out"):
            if getattr(self, name) is None:
                raise UserError(f"--{name} is missing; see fastbert affinity --help")
        names = self.names()
        for name in names:
            try:
                check_task(name, CustomTaskOptions())
            except UserError as error:
                raise UserError(about(name, error)) from None
        if not 2 <= len(names) <= MOST_TASKS:
            found = f"are {len(names)}" if len(names) > 1 else "is one"
            raise UserError(f"--tasks must name 2 to {MOST_TASKS} tasks, such as mrpc,rte,stsb, and there {found}")
        check_number_of_groups(self, len(names))
        check_glue_folder(self.glue_dir)
        check_glue_options(names, self.glue_dir, self.glue_subset)


def check_number_of_groups(options: AffinityOptions, tasks: int) -> None:
    """Raises a UserError if there are more groups than tasks."""
    if options.groups > tasks:
        raise UserError(f"--groups must be at most {tasks}, the number of tasks, not {options.groups}")
