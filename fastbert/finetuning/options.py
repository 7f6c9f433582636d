"""Options of `fastbert finetune`, `predict` and `submit`, and defaults for each task from the papers."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from fastbert.config import BOOKKEEPING, FLAT, MACHINE, choice, convert_text, leaves
from fastbert.downloads import FROM_HUB
from fastbert.errors import OptionError, UserError, about, brief, choose
from fastbert.finetuning.custom import CustomTaskOptions, check_custom_file
from fastbert.finetuning.glue import GLUE, check_glue_folder
from fastbert.finetuning.mixture_options import MixtureOptions
from fastbert.finetuning.slices import load_slices
from fastbert.finetuning.tasks import Task, check_glue_options, check_task, task_names
from fastbert.hub.folders import check_model_folder
from fastbert.inputs import check_folder, open_input, refuse_slash
from fastbert.lists import paths
from fastbert.ranges import LARGEST_SEED, Count, Natural, NotNegative, Part, Positive, Range, Rate, Seed, check_values
from fastbert.training.options import MachineOptions, OptimizerOptions, ScheduleOptions, TrainingMachineOptions
from fastbert.training.trackers import TRACKERS

# Learning rate and epochs. TUPE (arXiv 2006.15595) trains MNLI, QQP and QNLI for 5 epochs and all others for 10, with
# the best rate on dev from 2e-5 to 5e-5, not stated by task. These defaults are the middle of that range for large
# tasks and its upper end for small ones, which have few updates. Batch size 32 and a warm-up of 6 % are from the same
# paper.
TASK_DEFAULTS: dict[str, tuple[float, int]] = {
    **dict.fromkeys(("mnli", "qqp", "qnli"), (3e-5, 5)),
    "sst2": (3e-5, 10),
    **dict.fromkeys(("cola", "mrpc", "stsb", "rte", "wnli"), (5e-5, 10)),
}
CUSTOM_DEFAULTS = (5e-5, 5)

MOST_TRAININGS = 10_000  # in one call


@dataclass(frozen=True)
class FinetuneOptions:
    """Fine-tune an encoder: `fastbert finetune [configs/finetune/x.yaml] [options]`; options override the file."""

    model: str | None = field(default=None, metadata={**BOOKKEEPING, **FROM_HUB})
    """Pretrained model: a run, a checkpoint, an export, or a Hugging Face BERT, RoBERTa, DistilBERT or ModernBERT, as a
    folder or as owner/name[@revision] on the hub. Its encoder is used; the head is new."""
    init_from: str | None = field(default=None, metadata={**BOOKKEEPING, **FROM_HUB})
    """Instead of --model, a model that `fastbert finetune` has trained on another task, such as MNLI before RTE: the
    folder of a seed, or an --out, whose best seed on dev is used. The head is new."""
    task: str | None = None
    """A GLUE task (cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli), the YAML file of a custom task, or any name
    for a task given by --custom... flags. Several tasks separated by commas, or glue for the eight tasks of the GLUE
    table, are trained one after the other, each in a folder of --out, and a table of their results is written."""
    glue_dir: str | None = field(default=None, metadata=BOOKKEEPING)
    """Folder of the official GLUE archive, or of Parquet files (default: nyu-mll/glue through `datasets`)."""
    glue_subset: bool = field(default=False, metadata=BOOKKEEPING)
    """Accept GLUE files with fewer rows than the official number."""
    out: str | None = field(default=None, metadata=BOOKKEEPING)
    """Folder for results.json and a folder for each seed. Finished seeds are not trained again; others continue after
    their last finished epoch."""
    custom: CustomTaskOptions = field(default_factory=CustomTaskOptions, metadata=BOOKKEEPING)
    slices: str | None = field(default=None, metadata=BOOKKEEPING)
    """YAML file with `slices`: named subsets of dev on which metrics are reported too. A custom task may have them in
    its own file."""
    mixture: MixtureOptions = field(default_factory=MixtureOptions, metadata={**BOOKKEEPING, **FLAT})

    seeds: Count = field(default=5, metadata=BOOKKEEPING)
    """Number of runs with different seeds for the head's initialization, the order of examples and dropout."""
    first_seed: Seed = field(default=0, metadata=BOOKKEEPING)
    """First seed; the others follow it."""
    train_fraction: str = field(default="1.0", metadata=BOOKKEEPING)
    """Fractions of the training split to train on, such as 0.1,0.3,1.0; each contains the smaller ones."""

    epochs: Count | None = None
    """Passes over the training split (default: by task)."""
    batch_size: Count = 32
    """Examples per optimizer step."""
    max_length: Annotated[int, Range(8, 2**20)] | None = None
    """Maximum input length in tokens. Longer inputs are truncated, a pair at its longer text; where words have labels,
    they are split into windows (default: the model's positions)."""
    learning_rate: Positive | None = None
    """Peak learning rate (default: by task)."""
    layer_decay: Part = 1.0
    """Ratio of a layer's learning rate to that of the layer above (arXiv 2003.10555: 0.8); 1: the same rate in all
    layers."""
    weight_decay: NotNegative = 0.01
    """Decoupled weight decay of the matrices."""
    beta2: Rate = 0.999
    """Decay of AdamW's running mean of the squared gradient."""
    eps: Positive = 1e-6
    """Constant added to the root of AdamW's second moment."""
    clip_norm: NotNegative = 1.0
    """Maximum norm of the gradient; 0 disables clipping."""
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    dropout: Rate = 0.1
    """Dropout on embeddings, sublayer outputs and the head's input."""
    attention_dropout: Rate = 0.1
    """Dropout on attention probabilities."""
    symmetric: bool = False
    """Read pairs in both orders, for tasks in which the order has no meaning: training samples one order for each pair
    and epoch, without additional cost, and predictions are the mean over both."""

    slice_heads: bool = False
    """Train a head for each slice next to that of the task, on the examples in it (MMTL); only the task's head
    predicts. An ablation: its authors' own experiments show no gain."""
    worst: Natural = field(default=50, metadata=BOOKKEEPING)
    """Number of dev examples with the highest loss to write to errors.jsonl."""
    save_model: bool = field(default=True, metadata=BOOKKEEPING)
    """Save each seed's best epoch as a model; without it only metrics are written."""
    log_every: Count = field(default=20, metadata=BOOKKEEPING)
    """Logging interval in steps; the logged loss is averaged over it."""
    track: str = choice("none", TRACKERS, **BOOKKEEPING)
    """Experiment tracker besides TensorBoard: wandb (Weights & Biases), trackio or none. A resumed seed continues its
    run there; the tracker's environment variables decide account and project."""
    machine: TrainingMachineOptions = field(default_factory=TrainingMachineOptions, metadata=MACHINE)

    @property
    def start(self) -> str:
        """The value of --model or --init-from."""
        return self.model or self.init_from

    def __post_init__(self) -> None:
        check_values(self)
        if self.model is not None and self.init_from is not None:
            raise UserError("give --model (a pretrained encoder) or --init-from (a fine-tuned model), not both")
        if self.first_seed > (most := LARGEST_SEED - (self.seeds - 1)):
            raise OptionError(self, "first_seed", f"must be at most {most:,}, as the other seeds follow it")
        several = "--together" if self.mixture.together else "--stages" if self.mixture.stages is not None else None
        if several and self.fractions() != [1.0]:
            raise OptionError(self, "train_fraction", f"is of one task and not for {several}; give smaller train files")
        if self.mixture.stages is not None and self.task is not None:
            raise UserError("give --task or --stages, not both")
        needs = "--stages" if self.mixture.stages is not None else "--then-single" if self.mixture.then_single else None
        if needs and not self.save_model:
            raise OptionError(self, "save_model", f"is needed by {needs}, which starts from the models of each seed")
        if (trainings := self.seeds * len(self.fractions())) > MOST_TRAININGS:
            problem = f"with train_fraction make {trainings:,} training runs, but the maximum is {MOST_TRAININGS:,}"
            raise OptionError(self, "seeds", problem)

    def check_inputs(self) -> None:
        """Checks, before torch is imported, that model and tasks exist.

        Raises:
            UserError: they do not exist, or a required option is missing.
        """
        if self.start is not None:  # an error in a given option is reported before a missing one
            check_model_folder(self.start, one=self.model is not None)
        stages = self.stage_names()
        task = ",".join(stages) or self.task
        for name, value in (("model (or --init-from)", self.start), ("task", task), ("out", self.out)):
            if value is None:
                raise UserError(f"--{name} is missing; see fastbert finetune --help")
        names = stages or task_names(self.task) or ([self.task] if self.mixture.together else None)
        if names is not None and self.custom != CustomTaskOptions():
            raise UserError("--custom... describes one task; among several, give a custom task as a YAML file")
        if self.slices is not None:
            if names is not None:
                raise UserError("--slices is for one task; among several, give a custom task's slices in its YAML file")
            load_slices(self.slices)
        for name in names or [self.task]:
            try:
                check_task(name, self.custom)
            except UserError as error:
                raise UserError(about(name, error) if names else str(error)) from None
        check_glue_folder(self.glue_dir)
        check_glue_options(names or [self.task], self.glue_dir, self.glue_subset)

    def stage_names(self) -> list[str]:
        """The tasks in --stages; none without it."""
        return paths(self.mixture.stages, os.path.isfile) if self.mixture.stages is not None else []

    def fractions(self) -> list[float]:
        """The values of `train_fraction`, in the order given.

        Raises:
            UserError: a value is not a number, is outside (0, 1], or is repeated.
        """
        try:
            fractions = [convert_text(part.strip(), float) for part in self.train_fraction.split(",")]
        except ValueError:
            problem = f"must be comma-separated numbers, such as 0.1,0.3,1.0, not {brief(self.train_fraction)}"
            raise OptionError(self, "train_fraction", problem) from None
        if not all(0.0 < fraction <= 1.0 for fraction in fractions) or len(set(fractions)) < len(fractions):
            problem = f"must be different fractions above 0 and up to 1, not {brief(self.train_fraction)}"
            raise OptionError(self, "train_fraction", problem)
        return fractions

    def optimizer(self, learning_rate: float) -> OptimizerOptions:
        return OptimizerOptions(
            learning_rate=learning_rate,
            beta2=self.beta2,
            eps=self.eps,
            weight_decay=self.weight_decay,
            clip_norm=self.clip_norm,
        )

    def resolved(self, task: Task, positions: int) -> "FinetuneOptions":
        """Fills in the task's defaults and the model's length.

        Raises:
            UserError: `max_length` exceeds the positions, or `symmetric` is set for a task that is not symmetric.
        """
        if self.max_length is not None and self.max_length > positions:
            raise UserError(
                f"max_length {self.max_length} is longer than the {positions} positions of {self.start}; lower it"
            )
        if self.symmetric and not (task.symmetric and task.is_pair):
            raise UserError(f"the order of the texts matters in the task {task.name}: leave --symmetric out")
        learning_rate, epochs = TASK_DEFAULTS.get(task.name, CUSTOM_DEFAULTS)
        return replace(
            self,
            learning_rate=self.learning_rate or learning_rate,
            epochs=self.epochs or epochs,
            max_length=self.max_length or positions,
        )


@dataclass(frozen=True)
class PredictOptions:
    """Predict labels and probabilities with a fine-tuned model, one JSON object per line."""

    model: str = field(metadata=FROM_HUB)
    """A fine-tuned model: the folder of a seed of `fastbert finetune`, or the model/ in it; or an ensemble: an --out
    with several seeds, or several of these, separated by commas. Its prediction is the mean of the models'
    probabilities (or numbers), with equal weights; a threshold of a multi-label task is the mean of the models'
    thresholds. The models may have different encoders, tokenizers and lengths, but must predict the same labels."""
    out: str = "-"
    """JSONL file to write, or - for standard output. With kind tokens, a file named .conll, .bio, .iob or .iob2 gets
    CoNLL columns."""
    with_text: bool = False
    """Write the text (and pair) of each example into its line as well and, of a --split with labels, the label as
    `expected`: a file that a custom task can train on, with the probabilities as soft labels."""
    task: str | None = None
    """A GLUE task or the YAML file of a custom task; its --split is predicted. Give this or --source."""
    split: str | None = None
    """Split of the task (default: its first dev split)."""
    glue_dir: str | None = None
    """Folder of the official GLUE archive, or of Parquet files (default: nyu-mll/glue through `datasets`)."""
    glue_subset: bool = False
    """Accept GLUE files with fewer rows than the official number."""
    custom: CustomTaskOptions = field(default_factory=CustomTaskOptions)
    source: str | None = None
    """New text in JSONL, JSON, CSV, TSV or Parquet, with the columns --custom.text and, for pairs, --custom.pair
    (or pair); for a model of kind tokens, the columns of its task without tags."""
    machine: MachineOptions = field(default_factory=MachineOptions, metadata=MACHINE)

    def __post_init__(self) -> None:
        check_values(self)
        if (self.task is None) == (self.source is None):
            raise UserError("give one of --task and --source")
        if self.source is not None:
            for name in ("split", "glue_dir", "glue_subset"):
                if getattr(self, name) not in (None, False):
                    raise OptionError(self, name, "belongs to a --task; leave it out with --source")

    def check_inputs(self) -> None:
        """Checks, before torch is imported, that the model and its input exist.

        Raises:
            UserError: one of them does not exist.
        """
        for model in self.models():
            check_model_folder(model, one=False)
        if self.task is not None:
            check_task(self.task, self.custom)
            check_glue_folder(self.glue_dir)
            check_glue_options([self.task], self.glue_dir, self.glue_subset)
        else:
            refuse_slash(self.source)
            check_custom_file(Path(self.source), None)

    def models(self) -> list[str]:
        """The folders in `model`.

        Raises:
            UserError: a name before or after a comma is missing.
        """
        return paths(self.model, os.path.isdir) or [self.model]


@dataclass(frozen=True)
class SubmitOptions:
    """Write an archive for GLUE's server with the predictions of fine-tuned models, or check one."""

    models: tuple[str, ...] = field(default=(), metadata=FROM_HUB)
    """Fine-tuned models as task=folder, such as cola=results/cola/seed-0 rte=results/rte: the folder of a seed, or an
    --out of `fastbert finetune`, whose best seed on dev is used. Several folders separated by commas are an ensemble,
    as in `fastbert predict`, where an --out stands for all its seeds. The model of mnli also predicts ax, unless ax
    has a model."""
    results: str | None = None
    """--out of `fastbert finetune`, with one task or several: for each task without a model in --models, the best seed
    on dev is used."""
    glue_dir: str | None = None
    """Folder of the official GLUE archive, or of Parquet files (default: nyu-mll/glue through `datasets`)."""
    out: str | None = None
    """Zip file to write."""
    fill: bool = False
    """Use the majority label in every row for tasks without a model or test split; the server requires all files."""
    check: str | None = None
    """Check an existing archive, or a folder with its files, against the server's rules and row counts."""
    machine: MachineOptions = field(default_factory=MachineOptions, metadata=MACHINE)

    def __post_init__(self) -> None:
        check_values(self)

    def check_inputs(self) -> None:
        """Checks, before torch is imported, that models or archive exist.

        Raises:
            UserError: they do not, or options are missing or contradict each other.
        """
        if self.check is not None:
            if self.models or self.results or self.out or self.fill or self.glue_dir:
                raise UserError("--check only reads an archive; leave out all other options")
            if not Path(self.check).is_dir():
                open_input(self.check, "archive").close()
            return
        if self.out is None:
            raise UserError("--out is missing: the zip file to write, such as glue.zip")
        for folder in (folder for folders in self.folders().values() for folder in folders):
            check_model_folder(folder, one=False)
        if self.results is not None:
            check_folder(self.results)
        check_glue_folder(self.glue_dir)

    def folders(self) -> dict[str, list[str]]:
        """GLUE task -> its folder or, of an ensemble, folders, from `models`.

        Raises:
            UserError: an entry does not have that form or does not name a GLUE task, or a task has two models.
        """
        found: dict[str, list[str]] = {}
        for text in self.models:
            name, equals, folder = text.partition("=")
            if not equals or not folder:
                raise UserError(f"--models takes task=folder, such as cola=results/cola/seed-0, not {brief(text)}")
            if choose("GLUE task", name, GLUE) in found:
                raise UserError(f"--models names two models for {name}; give one, or an ensemble: {name}=A,B")
            found[name] = paths(folder, os.path.isdir) or [folder]
            for one in found[name]:
                if one.partition("=")[0] in GLUE and not os.path.isdir(one):
                    raise UserError(f"--models takes the tasks with a space between them: put one before {brief(one)}")
        return found


def science(options: FinetuneOptions) -> dict[str, Any]:
    """Options that define the experiment, by dotted name, except those without effect in this combination."""
    return {leaf.name: leaf.value for leaf in leaves(options, active=True) if leaf.role == "science"}
