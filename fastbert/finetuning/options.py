"""What `fastbert finetune` takes, and what the papers recommend for each task."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from fastbert.config import BOOKKEEPING, MACHINE, convert_text, leaves
from fastbert.errors import OptionError, UserError, brief, choose
from fastbert.finetuning.custom import CustomTaskOptions, check_custom_file
from fastbert.finetuning.glue import GLUE, check_glue_folder
from fastbert.finetuning.tasks import Task, check_glue_options, check_task, task_names
from fastbert.hub.folders import check_model_folder
from fastbert.inputs import check_folder, open_input, refuse_slash
from fastbert.ranges import LARGEST_SEED, Count, Natural, NotNegative, Part, Positive, Range, Rate, Seed, check_values
from fastbert.training.options import MachineOptions, OptimizerOptions, ScheduleOptions, TrainingMachineOptions

# Learning rate and epochs. TUPE (arXiv 2006.15595) trains MNLI, QQP and QNLI for 5 epochs and all others for 10, at
# 2e-5 to 5e-5, whichever is best on dev; it names no rate for a task. So the middle of that range for the large tasks,
# its upper end for the small ones, which get few updates. Batch 32 and a warm-up of 6 % are its too.
TASK_DEFAULTS: dict[str, tuple[float, int]] = {
    **dict.fromkeys(("mnli", "qqp", "qnli"), (3e-5, 5)),
    "sst2": (3e-5, 10),
    **dict.fromkeys(("cola", "mrpc", "stsb", "rte", "wnli"), (5e-5, 10)),
}
OWN_DEFAULTS = (5e-5, 5)

MOST_TRAININGS = 10_000  # of one call


@dataclass(frozen=True)
class FinetuneOptions:
    """Fine-tune an encoder: `fastbert finetune [configs/finetune/x.yaml] [options]`; options win over the file."""

    model: str | None = field(default=None, metadata=BOOKKEEPING)
    """A run, a checkpoint, an export, or a Hugging Face BERT folder: its encoder is used, the head is new."""
    init_from: str | None = field(default=None, metadata=BOOKKEEPING)
    """Instead of --model: a model that `fastbert finetune` has trained on another task, such as MNLI before RTE. The
    folder of a seed, or an --out, whose best seed on dev is used. The head is new."""
    task: str | None = None
    """A GLUE task (cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli), the YAML file of a custom task, or any name
    for the one that --custom... flags give. Several with commas between, or glue for the eight of the GLUE table: each
    trained in a folder of --out, and a table ends the call."""
    glue_dir: str | None = field(default=None, metadata=BOOKKEEPING)
    """Folder of the official GLUE archive, or of Parquet files (default: nyu-mll/glue through `datasets`)."""
    glue_subset: bool = field(default=False, metadata=BOOKKEEPING)
    """Take GLUE files that have fewer rows than the official ones."""
    out: str | None = field(default=None, metadata=BOOKKEEPING)
    """Folder for results.json and one folder a seed. Seeds that are finished there are not trained again, and others
    continue after their last finished epoch."""
    custom: CustomTaskOptions = field(default_factory=CustomTaskOptions, metadata=BOOKKEEPING)

    seeds: Count = field(default=5, metadata=BOOKKEEPING)
    """Runs, each with a seed of its own: of the head's first weights, the order and dropout."""
    first_seed: Seed = field(default=0, metadata=BOOKKEEPING)
    """The first of the seeds; the others follow it."""
    train_fraction: str = field(default="1.0", metadata=BOOKKEEPING)
    """Fractions of the training split, such as 0.1,0.3,1.0: each is trained on, the smaller within the larger."""

    epochs: Count | None = None
    """Passes over the training split (default: the task's)."""
    batch_size: Count = 32
    """Examples in one optimizer step."""
    max_length: Annotated[int, Range(8, 2**20)] | None = None
    """Longest input in tokens; longer ones are cut, a pair at its longer text, or where words have labels read in
    windows (default: the model's positions)."""
    learning_rate: Positive | None = None
    """Peak learning rate (default: the task's)."""
    layer_decay: Part = 1.0
    """Factor on the learning rate from each layer to the one below (arXiv 2003.10555: 0.8); 1 gives all the same."""
    weight_decay: NotNegative = 0.01
    """Decoupled weight decay of the matrices."""
    beta2: Rate = 0.999
    """Decay of AdamW's running mean of the squared gradient."""
    eps: Positive = 1e-6
    """Added to the root of AdamW's second moment."""
    clip_norm: NotNegative = 1.0
    """Largest norm of all gradients together; 0 turns clipping off."""
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    dropout: Rate = 0.1
    """Dropout on embeddings, sublayer outputs and the head's input."""
    attention_dropout: Rate = 0.1
    """Dropout on attention probabilities."""
    symmetric: bool = False
    """Read pairs in both orders, where the task does not care which text comes first: training samples one for each
    pair and epoch, at no cost, and predictions are the mean of both."""

    worst: Natural = field(default=50, metadata=BOOKKEEPING)
    """Dev examples with the highest loss, written to errors.jsonl."""
    save_model: bool = field(default=True, metadata=BOOKKEEPING)
    """Keep each seed's best epoch as a model; without it only the figures are written."""
    log_every: Count = field(default=20, metadata=BOOKKEEPING)
    """Steps a logged training loss is the mean of."""
    machine: TrainingMachineOptions = field(default_factory=TrainingMachineOptions, metadata=MACHINE)

    @property
    def start(self) -> str:
        """Where the encoder comes from, as the user gave it."""
        return self.model or self.init_from

    def __post_init__(self) -> None:
        check_values(self)
        if self.model is not None and self.init_from is not None:
            raise UserError("give --model (a pretrained encoder) or --init-from (a fine-tuned model), not both")
        if self.first_seed > (most := LARGEST_SEED - (self.seeds - 1)):
            raise OptionError(self, "first_seed", f"must be at most {most:,}, as the other seeds follow it")
        if (trainings := self.seeds * len(self.fractions())) > MOST_TRAININGS:
            problem = f"with train_fraction make {trainings:,} trainings, and the most is {MOST_TRAININGS:,}"
            raise OptionError(self, "seeds", problem)

    def check_inputs(self) -> None:
        """Checks, before torch is imported, that model and tasks are there.

        Raises:
            UserError: they are not, or an option is missing that has no default.
        """
        if self.start is not None:  # what is wrong with what was given comes before what is missing
            check_model_folder(self.start, one=self.model is not None)
        for name, value in (("model (or --init-from)", self.start), ("task", self.task), ("out", self.out)):
            if value is None:
                raise UserError(f"--{name} is missing; see fastbert finetune --help")
        names = task_names(self.task)
        if names is not None and self.custom != CustomTaskOptions():
            raise UserError("--custom... describes one task; among several, give a task of your own as a YAML file")
        for name in names or [self.task]:
            try:
                check_task(name, self.custom)
            except UserError as error:
                raise UserError(f"{name}: {error}" if names else str(error)) from None
        check_glue_folder(self.glue_dir)
        check_glue_options(names or [self.task], self.glue_dir, self.glue_subset)

    def fractions(self) -> list[float]:
        """The shares of `train_fraction`, in the order given.

        Raises:
            UserError: one is no number, lies outside (0, 1], or comes twice.
        """
        try:
            fractions = [convert_text(part.strip(), float) for part in self.train_fraction.split(",")]
        except ValueError:
            problem = f"must be numbers with commas between, such as 0.1,0.3,1.0, not {brief(self.train_fraction)}"
            raise OptionError(self, "train_fraction", problem) from None
        if not all(0.0 < fraction <= 1.0 for fraction in fractions) or len(set(fractions)) < len(fractions):
            problem = f"must be different fractions above 0 and up to 1, not {brief(self.train_fraction)}"
            raise OptionError(self, "train_fraction", problem)
        return fractions

    def steps(self, examples: int) -> int:
        """Updates in a training on this many examples, with the epochs resolved."""
        return self.epochs * -(-examples // self.batch_size)

    def optimizer(self, learning_rate: float) -> OptimizerOptions:
        return OptimizerOptions(
            learning_rate=learning_rate,
            beta2=self.beta2,
            eps=self.eps,
            weight_decay=self.weight_decay,
            clip_norm=self.clip_norm,
        )

    def resolved(self, task: Task, positions: int) -> "FinetuneOptions":
        """These options with the task's defaults and the model's length filled in.

        Raises:
            UserError: `max_length` is over the positions, or `symmetric` is asked of a task that is not.
        """
        if self.max_length is not None and self.max_length > positions:
            raise UserError(
                f"max_length {self.max_length} is longer than the {positions} positions of {self.start}; lower it"
            )
        if self.symmetric and not (task.symmetric and task.is_pair):
            raise UserError(f"the order of the texts matters in the task {task.name}: leave --symmetric out")
        learning_rate, epochs = TASK_DEFAULTS.get(task.name, OWN_DEFAULTS)
        return replace(
            self,
            learning_rate=self.learning_rate or learning_rate,
            epochs=self.epochs or epochs,
            max_length=self.max_length or positions,
        )


@dataclass(frozen=True)
class PredictOptions:
    """Labels and probabilities of a fine-tuned model, one JSON object a line."""

    model: str
    """A fine-tuned model: the folder of a seed of `fastbert finetune`, or the model/ in it. For an --out with several
    seeds, the mean of their probabilities (or numbers) is used; a threshold of a multi-label task is the mean of the
    seeds' thresholds."""
    out: str = "-"
    """JSONL file to write, or - for standard output. With kind tokens, a file named .conll, .bio, .iob or .iob2 gets
    CoNLL columns."""
    task: str | None = None
    """A GLUE task or the YAML file of a custom task, whose --split is predicted; give this or --source."""
    split: str | None = None
    """Split of the task (default: its first for development)."""
    glue_dir: str | None = None
    """Folder of the official GLUE archive, or of Parquet files (default: nyu-mll/glue through `datasets`)."""
    glue_subset: bool = False
    """Take GLUE files that have fewer rows than the official ones."""
    custom: CustomTaskOptions = field(default_factory=CustomTaskOptions)
    source: str | None = None
    """New text in JSONL, JSON, CSV, TSV or Parquet, with the columns --custom.text and, for pairs, --custom.pair
    (or pair); for a model of kind tokens, what its task takes, without tags."""
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
        """Checks, before torch is imported, that the model and what it predicts are there.

        Raises:
            UserError: they are not.
        """
        check_model_folder(self.model, one=False)
        if self.task is not None:
            check_task(self.task, self.custom)
            check_glue_folder(self.glue_dir)
            check_glue_options([self.task], self.glue_dir, self.glue_subset)
        else:
            refuse_slash(self.source)
            check_custom_file(Path(self.source), None)


@dataclass(frozen=True)
class SubmitOptions:
    """The archive that GLUE's server takes, from fine-tuned models; or a check of one."""

    models: tuple[str, ...] = ()
    """Fine-tuned models as task=folder, such as cola=results/cola/seed-0 rte=results/rte: the folder of a seed, or an
    --out of `fastbert finetune`, whose best seed on dev is used. That of mnli answers ax too, unless ax has one."""
    results: str | None = None
    """--out of `fastbert finetune`, with one task or several: of each task the seed that is best on dev is used, where
    --models names none."""
    glue_dir: str | None = None
    """Folder of the official GLUE archive, or of Parquet files (default: nyu-mll/glue through `datasets`)."""
    out: str | None = None
    """Zip file to write."""
    fill: bool = False
    """Give tasks without a model or test split the majority label in every row: the server takes only all files."""
    check: str | None = None
    """Instead: an archive, or a folder with its files, to check against the server's rules and row counts."""
    machine: MachineOptions = field(default_factory=MachineOptions, metadata=MACHINE)

    def __post_init__(self) -> None:
        check_values(self)

    def check_inputs(self) -> None:
        """Checks, before torch is imported, that what is submitted or checked is there.

        Raises:
            UserError: it is not, or options are missing or contradict each other.
        """
        if self.check is not None:
            if self.models or self.results or self.out or self.fill or self.glue_dir:
                raise UserError("--check only looks at an archive; leave all options but --check out")
            if not Path(self.check).is_dir():
                open_input(self.check, "archive").close()
            return
        if self.out is None:
            raise UserError("--out is missing: the zip file to write, such as glue.zip")
        for folder in self.folders().values():
            check_model_folder(folder, one=False)
        if self.results is not None:
            check_folder(self.results)
        check_glue_folder(self.glue_dir)

    def folders(self) -> dict[str, str]:
        """GLUE task -> folder, of `models`.

        Raises:
            UserError: one is not of that form, or of no GLUE task, or a task has two.
        """
        found: dict[str, str] = {}
        for text in self.models:
            name, equals, folder = text.partition("=")
            if not equals or not folder:
                raise UserError(f"--models takes task=folder, such as cola=results/cola/seed-0, not {brief(text)}")
            if choose("GLUE task", name, GLUE) in found:
                raise UserError(f"--models names two models for {name}; give one")
            found[name] = folder
        return found


def science(options: FinetuneOptions) -> dict[str, Any]:
    """The options that define the experiment, by dotted name; those without effect in this combination are left out."""
    return {leaf.name: leaf.value for leaf in leaves(options, active=True) if leaf.role == "science"}
