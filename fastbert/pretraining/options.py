"""Options of `fastbert pretrain`, each with its help. Groups of options are defined next to the
code that they control."""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from fastbert.config import BOOKKEEPING, FLAT, MACHINE, choice, leaves
from fastbert.data.replay import ReplayOptions
from fastbert.data.sources import check_source
from fastbert.data.stages import StageOptions
from fastbert.downloads import FROM_HUB, TOKENIZER, TOKENIZER_FROM_HUB, check_downloaded
from fastbert.errors import OptionError, UserError, brief
from fastbert.hub.folders import check_model_folder
from fastbert.model.options import EncoderOptions, NoteDictionaryOptions
from fastbert.objectives import OBJECTIVES, group_of
from fastbert.objectives.options import ObjectiveOptions
from fastbert.pretraining.checkpoint_words import parse_counts
from fastbert.ranges import (
    LARGEST,
    Count,
    Fraction,
    Length,
    Minutes,
    Processes,
    Range,
    Seed,
    Tokens,
    Vocabulary,
    Workers,
    check_values,
)
from fastbert.training.options import (
    PretrainOptimizerOptions,
    PretrainScheduleOptions,
    TrainingMachineOptions,
)
from fastbert.training.schedules import annealing_steps
from fastbert.training.splits import OLD, check_best_by, named_folders
from fastbert.training.trackers import TRACKERS


@dataclass(frozen=True)
class PretrainMachineOptions(TrainingMachineOptions):
    """Options that may change speed and memory, but not the result beyond rounding; --workers is for preparing data."""

    workers: Workers = 0
    """Number of tokenizing processes if --data is a source; 0: one per core."""
    compile: str = choice("auto", ("auto", "on", "off"))
    """Compile the encoder's blocks with torch.compile: on, off, or auto (on a GPU; on a CPU it was slower)."""
    micro_batch_size: Count | None = 32
    """Sequences in one forward pass; their gradients are accumulated over the batch. None: the whole batch."""
    shard: str = choice("none", ("none", "blocks"))
    """Division of the weights between several processes: none (DDP: each has all of them) or blocks (FSDP2: each has a
    part of every weight, gradient and moment, and gathers a block's weights when it is computed)."""
    activation_checkpointing: bool = False
    """Recompute each block's activations in the backward pass: less memory, about a third more time."""


@dataclass(frozen=True)
class _PretrainOptions:
    """Pretrain an encoder. A YAML file, by path or by name (tiny, wikipedia, small, base, modernbert, ...), sets any of
    these options; flags override it."""

    data: str = field(default="sotu", metadata=BOOKKEEPING)
    """Prepared folder (fastbert prepare), or a source to prepare first: sotu (State of the Union addresses), python
    (source code of its standard library), text files, tables (JSONL, JSON, CSV, TSV, Parquet), globs, hf:NAME of a
    dataset."""
    column: str = "text"
    """Column (in JSON: field) of the text if --data is a source; comma-separated, one for each source of a list."""
    streamed: bool = field(default=False, metadata=BOOKKEEPING)
    """Stream the dataset (--data hf:NAME) without a copy in the local cache."""
    vocab_size: Vocabulary = 32768
    """Vocabulary size of the tokenizer that is trained if --data is a source."""
    tokenizer: str | None = field(default=None, metadata=TOKENIZER_FROM_HUB)
    """Tokenizer to use instead of training one, a folder or a name on the hub, if --data is a source (default: that of
    --init-from)."""
    lowercase: bool = True
    """Lowercase the text if --data is a source and a tokenizer is trained."""
    strip_accents: bool | None = None
    """Strip accents if --data is a source and a tokenizer is trained (default: the value of --lowercase)."""
    validation_fraction: Fraction = 0.01
    """Fraction of the documents held out for validation if --data is a source."""
    out: str | None = field(default=None, metadata=BOOKKEEPING)
    """Folder of the run (default: runs/NAME after the YAML file, with a number if that folder exists)."""
    resume: bool = field(default=False, metadata=BOOKKEEPING)
    """Resume the run in --out from its newest checkpoint, exactly. `--resume runs/x` is short for --out runs/x
    --resume. With more --steps than before the run is lengthened, if the steps done so far remain the same: in the
    constant phase of the infinite schedule, for instance."""
    branch: str | None = field(default=None, metadata=BOOKKEEPING)
    """Start a new run in --out that begins with a checkpoint of another run, with its options: runs/x@9000 for the
    checkpoint of step 9000, runs/x for the newest one with a constant learning rate. Needs --anneal or --steps."""
    anneal: Annotated[float, Range(above=0, most=LARGEST)] | None = field(default=None, metadata=BOOKKEEPING)
    """Length of the annealing that begins at the checkpoint of --branch, as a fraction of the steps done (a number of
    steps if 1 or more); without it the run's schedule is followed to --steps."""
    init_from: str | None = field(default=None, metadata=FROM_HUB)
    """Start from the weights of a run, an export, or a Hugging Face BERT, a folder or owner/name[@revision] on the hub.
    A run or checkpoint of the same objective gives all its networks. The data may have further words, with ids after
    those of the model (fastbert extend-vocab): their rows start as the mean of the pieces that spelled the word."""

    objective: str = choice("mlm", OBJECTIVES)
    """Pretraining objective: mlm (masked language modeling, BERT), electra (replaced token detection, arXiv
    2003.10555) or multiple-choice (with a meta controller, arXiv 2006.05744)."""
    encoder: EncoderOptions = field(default_factory=EncoderOptions, metadata=FLAT)
    length: Length = 512
    """Tokens per sequence, [CLS] included."""
    batch_size: Count = 256
    """Sequences per optimizer step."""
    stages: StageOptions = field(default_factory=StageOptions, metadata=FLAT)
    document_mask: bool = False
    """Restrict attention to the tokens of the same document in a packed sequence."""
    steps: Count | None = None
    """Budget in optimizer steps. One of --steps, --tokens and --minutes is required."""
    tokens: Tokens | None = None
    """Budget in tokens, converted to steps."""
    minutes: Minutes | None = field(default=None, metadata=BOOKKEEPING)
    """Budget in minutes, converted to steps at the start by timing a few steps for a twentieth of it. Other load on the
    machine after that makes the run longer; the number of steps does not change."""
    seed: Seed = 0
    """Random seed for initialization, data order, masking and dropout."""

    eval_every: Count | None = field(default=None, metadata=BOOKKEEPING)
    """Validation interval in steps (default: a tenth of the run)."""
    eval_sequences: Count = field(default=512, metadata=BOOKKEEPING)
    """Sequences per validation, spread over the held-out text."""
    eval_data: str | None = field(default=None, metadata=BOOKKEEPING)
    """Further prepared data whose held-out documents are validated, by name: old=data/wiki,code=data/python. Its
    vocabulary is that of --data or its beginning."""
    best_by: str = field(default="new", metadata=BOOKKEEPING)
    """Validation split whose loss decides which checkpoint is the best: new (that of --data), old (that of
    --replay.data), a name in --eval-data, or mean (of all of them)."""
    checkpoint_every: Count | None = field(default=None, metadata=BOOKKEEPING)
    """Checkpoint interval in steps (default: a fifth of the run, at most 1000)."""
    keep_checkpoints: Count = field(default=2, metadata=BOOKKEEPING)
    """Number of newest checkpoints to retain, in addition to the one with the lowest validation loss."""
    milestones: str | None = field(default=None, metadata=BOOKKEEPING)
    """Comma-separated steps, such as 1000,3000, that are logged, validated and saved; their checkpoints are
    retained."""
    checkpoint_words: str | None = field(default=None, metadata=BOOKKEEPING)
    """Comma-separated numbers of words of the text, such as 1M,2M,...,10M,20M,...,100M: after the first step at which
    the model has seen this many, it is exported to exports/chck_1M and so on in the run's folder, as BabyLM asks
    for."""
    log_every: Count = field(default=20, metadata=BOOKKEEPING)
    """Logging interval in steps; the logged training loss is averaged over it."""
    track: str = choice("none", TRACKERS, **BOOKKEEPING)
    """Experiment tracker besides TensorBoard: wandb (Weights & Biases), trackio or none. A resumed run continues its
    run there; the tracker's environment variables decide account and project."""
    dry_run: bool = field(default=False, metadata=BOOKKEEPING)
    """Print parameters, FLOPs, memory, disk space and expected time, without training. Only prepared data is
    written."""
    verify_data: bool = field(default=False, metadata=BOOKKEEPING)
    """Verify the hashes of all data, including files that this machine has verified before."""
    profile: bool = field(default=False, metadata=BOOKKEEPING)
    """Profile a few steps; a table and a trace for ui.perfetto.dev are written to profile/ in the run's folder."""
    launch: str = choice("none", ("none", "ray"), **BOOKKEEPING)
    """Start --processes processes that train together: none (this one; or those that torchrun has started) or ray. Ray
    restarts them from the newest checkpoint if one fails, at most 3 times. All nodes need fastbert, and data and --out
    on a common file system."""
    processes: Processes | None = field(default=None, metadata=BOOKKEEPING)
    """Number of processes of --launch ray, each with one GPU if Ray has GPUs, otherwise with --machine.threads CPUs (at
    least one)."""
    ray_address: str | None = field(default=None, metadata=BOOKKEEPING)
    """host:port of a running Ray cluster; without it --launch ray starts Ray on this machine for this call."""

    replay: ReplayOptions = field(default_factory=ReplayOptions)
    notes: NoteDictionaryOptions = field(default_factory=NoteDictionaryOptions)
    optimizer: PretrainOptimizerOptions = field(default_factory=PretrainOptimizerOptions)
    schedule: PretrainScheduleOptions = field(default_factory=PretrainScheduleOptions)
    machine: PretrainMachineOptions = field(default_factory=PretrainMachineOptions, metadata=MACHINE)

    def __post_init__(self) -> None:
        check_values(self)
        self.stages.check(self.batch_size, self.length)
        if self.dry_run and self.profile:
            raise UserError("give --dry-run or --profile, not both: a dry run leaves no folder to write a profile to")
        if self.machine.shard != "none" and (self.optimizer.name == "lamb" or self.machine.apex):
            raise UserError(
                "--machine.shard blocks works with the optimizers adamw and muon, without --machine.apex: others would "
                "use norms or memory of a part of each weight"
            )
        self._check_launch()
        check_best_by(self.best_by, self.other_splits())
        self._check_branch()
        self.milestone_steps()
        self.word_counts()

    def _check_launch(self) -> None:
        """Raises a UserError if options of --launch ray do not fit."""
        if self.launch == "none":
            for name in ("processes", "ray_address"):
                if getattr(self, name) is not None:
                    flag = f"--{name.replace('_', '-')}"
                    raise UserError(f"{flag} has no effect without --launch ray (torchrun counts its own processes)")
            return
        if self.processes is None:
            raise UserError("--launch ray needs the number of processes: --processes N, one for each GPU")
        if self.dry_run:
            raise UserError("--dry-run measures one process; leave out --launch and --processes")

    def _check_branch(self) -> None:
        """Raises a UserError if options of --branch do not fit."""
        if self.branch is None:
            if self.anneal is not None:
                raise UserError("--anneal has no effect without --branch runs/x@STEP, the checkpoint to anneal from")
            return
        if self.resume:
            raise UserError(
                "give --branch to start a new run from a checkpoint, or --resume to continue a run, not both"
            )
        if (self.anneal is None) == (self.steps is None) or self.tokens is not None or self.minutes is not None:
            raise UserError(
                "--branch needs one of --anneal 0.1, to anneal the learning rate within a tenth of the steps done, and "
                "--steps N, to follow the run's schedule to N steps"
            )
        if self.anneal is not None and self.anneal >= 1 and self.anneal != int(self.anneal):
            problem = f"must be a fraction of the steps in (0, 1) or a whole number of steps, not {self.anneal}"
            raise OptionError(self, "anneal", problem)

    def other_splits(self) -> list[str]:
        """Names of the validation splits in addition to that of --data.

        Raises:
            UserError: --eval-data is no list of names and folders, or has the name of the old data.
        """
        names = list(named_folders(self.eval_data))
        if self.replay.data is None:
            return names
        if OLD in names:
            raise UserError(
                f"--eval-data: {OLD} is the name of --replay.data, which is validated anyway; choose another name"
            )
        return [*names, OLD]

    @property
    def of_objective(self) -> ObjectiveOptions:
        """Options of the chosen objective."""
        return getattr(self, group_of(self.objective))

    @property
    def micro_batch_size(self) -> int:
        """Sequences in one forward pass."""
        return self.machine.micro_batch_size or self.batch_size

    def inactive(self) -> set[str]:
        """Names of the options and groups without effect."""
        others = {group_of(name) for name in OBJECTIVES if name != self.objective}
        return {"tokens", *SOURCE_ONLY, *others, *(() if self.notes.enabled else ("notes",))}

    @property
    def validated_first(self) -> bool:
        """True for a run that is validated before its first step too: what it begins with is known from a model, and
        interesting if it is to learn without forgetting."""
        return self.init_from is not None or bool(self.other_splits())

    def check_inputs(self) -> None:
        """Checks, before torch is imported, that data, tokenizer and weights exist and that there is one budget.

        Raises:
            UserError: something is missing, or there is no budget, or more than one.
        """
        given = [budget for budget in BUDGETS if getattr(self, budget) is not None]
        if len(given) != 1:
            raise UserError(f"give one of --steps, --tokens and --minutes, not {' and '.join(given) or 'none'}")
        self.check_sources()

    def check_sources(self) -> None:
        """Raises a UserError if data, tokenizer or weights do not exist."""
        if not (Path(self.data) / "dataset.json").is_file():
            check_source(self.data, self.column)
            if self.tokenizer is not None:
                check_downloaded(self.tokenizer, TOKENIZER, "a Hugging Face tokenizer, prepared data or a run")
        if self.init_from is not None:
            check_model_folder(self.init_from)
        elif self.optimizer.keep:
            raise UserError("--optimizer.keep has no effect without --init-from, whose moments it keeps; leave it out")
        self.replay.check()
        if self.replay.data is not None and not (Path(self.replay.data) / "dataset.json").is_file():
            try:
                check_source(self.replay.data, "text")
            except UserError as error:
                raise UserError(f"--replay.data is neither prepared data nor a source: {error}") from None
        for name, folder in named_folders(self.eval_data).items():
            if not (Path(folder) / "dataset.json").is_file():
                raise UserError(
                    f"--eval-data {name}: {folder} is not a prepared folder; write it with fastbert prepare, and the "
                    "tokenizer of --data as its --tokenizer"
                )

    def milestone_steps(self) -> frozenset[int]:
        """The steps of `milestones`.

        Raises:
            UserError: one is not a positive whole number, or is beyond the end of the run.
        """
        parts = [] if self.milestones is None else [part.strip() for part in self.milestones.split(",")]
        if not all(re.fullmatch(r"0*[1-9][0-9]{0,9}", part) for part in parts):
            problem = f"must be comma-separated steps, such as 1000,3000, not {brief(self.milestones)}"
            raise OptionError(self, "milestones", problem)
        steps = frozenset(map(int, parts))
        if self.steps is not None and steps and max(steps) > self.steps:
            raise UserError(f"milestone {max(steps)} is beyond the {self.steps} steps of the run; leave it out")
        return steps

    def marked_steps(self, steps: int) -> frozenset[int]:
        """Steps of a run of `steps` steps that are logged, validated and saved, with a checkpoint that is retained: the
        milestones, and the end of the constant phase of the infinite schedule, from which the run can be continued."""
        marked = self.milestone_steps()
        if self.schedule.name != "infinite":
            return marked
        return marked | {max(1, steps - annealing_steps(self.schedule, steps))}

    def word_counts(self) -> list[int]:
        """The numbers of words of `checkpoint_words`, ascending. Raises a UserError if it is no list of them."""
        try:
            return [] if self.checkpoint_words is None else parse_counts(self.checkpoint_words)
        except ValueError as error:
            raise OptionError(self, "checkpoint_words", f"{error}, not {brief(self.checkpoint_words)}") from None


# The options of each objective are a group, --mlm... and so on.
_GROUPS: dict[str, type] = {}
for _name in OBJECTIVES:
    if (_group := group_of(_name)) in {*_GROUPS, *(leaf.name.partition(".")[0] for leaf in leaves(_PretrainOptions()))}:
        raise ValueError(f"the objective {_name!r} needs another name: {_group!r} is an option of fastbert pretrain")
    _GROUPS[_group] = OBJECTIVES.options(_name) or ObjectiveOptions
PretrainOptions = dataclasses.make_dataclass(
    "PretrainOptions",
    [(name, options, field(default_factory=options)) for name, options in _GROUPS.items()],
    bases=(_PretrainOptions,),
    frozen=True,
    namespace={"__doc__": _PretrainOptions.__doc__, "__module__": __name__, "GENERATED": True},
)


# Options of a single call; config.yaml has their defaults.
LAUNCH = {"launch": "none", "processes": None, "ray_address": None}
BRANCH = {"branch": None, "anneal": None}
SINGLE_CALL_OPTIONS = {"resume": False, "dry_run": False, "verify_data": False, "profile": False, **BRANCH, **LAUNCH}
BUDGETS = ("steps", "tokens", "minutes")
# Options that have an effect where --data is a source. They are not science: the hash of the data covers them.
SOURCE_ONLY = ("column", "streamed", "vocab_size", TOKENIZER, "lowercase", "strip_accents", "validation_fraction")


def science(options: PretrainOptions, data_fingerprint: str) -> dict[str, Any]:
    """The active options that define the experiment, by dotted name; their hash identifies it.

    Options without effect in this combination are left out, so that they do not change the hash.
    """
    values = {leaf.name: leaf.value for leaf in leaves(options, active=True) if leaf.role == "science"}
    return {**values, "data": data_fingerprint}
