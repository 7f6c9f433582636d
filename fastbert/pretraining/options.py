"""What `fastbert pretrain` takes: every option with its help; groups of options stand beside the code they steer."""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from fastbert.config import BOOKKEEPING, FLAT, MACHINE, choice, leaves
from fastbert.data.sources import check_source
from fastbert.data.stages import StageOptions
from fastbert.downloads import check_downloaded
from fastbert.errors import OptionError, UserError, brief
from fastbert.hub.folders import check_model_folder
from fastbert.model.options import EncoderOptions, NoteDictionaryOptions
from fastbert.objectives import OBJECTIVES, group_of
from fastbert.objectives.options import MaskRate, ObjectiveOptions
from fastbert.ranges import (
    LARGEST,
    Count,
    Fraction,
    Length,
    Minutes,
    Range,
    Seed,
    Tokens,
    Vocabulary,
    Workers,
    check_values,
)
from fastbert.training.options import MachineOptions, OptimizerOptions, ScheduleOptions, TrainingMachineOptions


@dataclass(frozen=True)
class PretrainMachineOptions(TrainingMachineOptions):
    """The machine of a pretraining, which may prepare its data first."""

    workers: Workers = 0
    """Processes that tokenize, where --data is a source; 0 is one for each core."""
    compile: str = choice("auto", ("auto", "on", "off"))
    """torch.compile the encoder's blocks: on, off, or auto (on a GPU; on a CPU it was measured to be slower)."""
    micro_batch_size: Count | None = 32
    """Sequences in one forward pass; smaller ones are accumulated to the batch. None: the whole batch."""
    activation_checkpointing: bool = False
    """Compute each block again in the backward pass instead of keeping what is in it: less memory, about a third more
    time."""


@dataclass(frozen=True)
class PretrainScheduleOptions(ScheduleOptions):
    """The course of the learning rate, as a fraction of its peak (--optimizer.learning-rate)."""

    warmup: Annotated[float, Range(0, LARGEST)] = 0.01
    """Linear warm-up: a fraction of all steps if below 1, else a number of steps."""


@dataclass(frozen=True)
class _PretrainOptions:
    """Pretrain an encoder: `fastbert pretrain [configs/pretrain/x.yaml] [options]`; options win over the file."""

    data: str = field(default="sotu", metadata=BOOKKEEPING)
    """A prepared folder (fastbert prepare), or a source to prepare first: sotu, text files, tables (JSONL, JSON,
    CSV, TSV, Parquet), globs, hf:NAME of a dataset."""
    column: str = "text"
    """Column of the text (of JSON: field) where --data is a source; with commas, one for each source of a list."""
    streamed: bool = field(default=False, metadata=BOOKKEEPING)
    """Read a dataset (hf:) where it lies, without a copy in the local cache, where --data is one."""
    vocab_size: Vocabulary = 32768
    """Words of the tokenizer that is trained where --data is a source."""
    tokenizer: str | None = None
    """Folder of a tokenizer to use instead, where --data is a source (default: that of --init-from, if given)."""
    lowercase: bool = True
    """Lower-case the text, where --data is a source and a tokenizer is trained."""
    strip_accents: bool | None = None
    """Strip accents, where --data is a source and a tokenizer is trained (default: as lowercase)."""
    validation_fraction: Fraction = 0.01
    """Fraction of the documents held out, where --data is a source."""
    out: str | None = field(default=None, metadata=BOOKKEEPING)
    """Folder of the run (default: runs/ and the name of the YAML file, numbered if it is there)."""
    resume: bool = field(default=False, metadata=BOOKKEEPING)
    """Resume the run in --out from its newest checkpoint, exactly. `--resume runs/x` names the run too."""
    init_from: str | None = None
    """Start from the weights of a run, an export, or a Hugging Face BERT folder."""

    objective: str = choice("mlm", OBJECTIVES)
    """What is learned: mlm (BERT), electra (replaced tokens, arXiv 2003.10555) or multiple-choice (with a meta
    controller, arXiv 2006.05744)."""
    encoder: EncoderOptions = field(default_factory=EncoderOptions, metadata=FLAT)
    length: Length = 512
    """Tokens in a sequence, [CLS] included."""
    batch_size: Count = 256
    """Sequences in one optimizer step."""
    stages: StageOptions = field(default_factory=StageOptions, metadata=FLAT)
    document_mask: bool = False
    """Let tokens see only their own document of a packed sequence."""
    steps: Count | None = None
    """Optimizer steps; give one of --steps, --tokens and --minutes."""
    tokens: Tokens | None = None
    """Budget in tokens, turned into steps."""
    minutes: Minutes | None = field(default=None, metadata=BOOKKEEPING)
    """Budget in minutes, turned into steps once, at the start: a twentieth of it goes to timing a few, and the plan is
    printed. Other work on the machine makes the run longer, not its steps fewer."""
    seed: Seed = 0
    """Of initial weights, order, masks and dropout."""

    eval_every: Count | None = field(default=None, metadata=BOOKKEEPING)
    """Steps between validations (default: a tenth of the run)."""
    eval_sequences: Count = field(default=512, metadata=BOOKKEEPING)
    """Held-out sequences in a validation, spread over the split."""
    checkpoint_every: Count | None = field(default=None, metadata=BOOKKEEPING)
    """Steps between checkpoints (default: a fifth of the run, at most 1000)."""
    keep_checkpoints: Count = field(default=2, metadata=BOOKKEEPING)
    """Newest checkpoints to retain; the best by validation loss is retained as well."""
    milestones: str | None = field(default=None, metadata=BOOKKEEPING)
    """Steps with commas between, such as 1000,3000: logged and validated, and their checkpoints retained as well."""
    log_every: Count = field(default=20, metadata=BOOKKEEPING)
    """Steps a logged training loss is the mean of."""
    dry_run: bool = field(default=False, metadata=BOOKKEEPING)
    """Show parameters, FLOPs, memory and the time expected, and stop. Only data that has to be prepared is written."""
    verify_data: bool = field(default=False, metadata=BOOKKEEPING)
    """Compare all data with its hashes, even what this machine has verified before and was not touched since."""
    profile: bool = field(default=False, metadata=BOOKKEEPING)
    """Write where the time of a few steps goes to profile/ of the run, with a trace for ui.perfetto.dev."""

    notes: NoteDictionaryOptions = field(default_factory=NoteDictionaryOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    schedule: PretrainScheduleOptions = field(default_factory=PretrainScheduleOptions)
    machine: PretrainMachineOptions = field(default_factory=PretrainMachineOptions, metadata=MACHINE)

    def __post_init__(self) -> None:
        check_values(self)
        self.stages.check(self.batch_size, self.length)
        if self.dry_run and self.profile:
            raise UserError("give --dry-run or --profile, not both: a dry run leaves no folder to write a profile to")
        self.milestone_steps()

    @property
    def of_objective(self) -> ObjectiveOptions:
        """The options of the objective that is chosen."""
        return getattr(self, group_of(self.objective))

    @property
    def micro_batch_size(self) -> int:
        """Sequences in one forward pass."""
        return self.machine.micro_batch_size or self.batch_size

    def inactive(self) -> set[str]:
        """The options and groups without effect."""
        others = {group_of(name) for name in OBJECTIVES if name != self.objective}
        return {"tokens", *SOURCE_ONLY, *others, *(() if self.notes.enabled else ("notes",))}

    def check_inputs(self) -> None:
        """Checks, before torch is imported, that what a new run starts from is there.

        Raises:
            UserError: it is not, or there is no budget, or more than one.
        """
        given = [budget for budget in BUDGETS if getattr(self, budget) is not None]
        if len(given) != 1:
            raise UserError(f"give one of --steps, --tokens and --minutes, not {' and '.join(given) or 'none'}")
        self.check_sources()

    def check_sources(self) -> None:
        """Checks that data, tokenizer and weights are there; raises a UserError if one is not."""
        if not (Path(self.data) / "dataset.json").is_file():
            check_source(self.data, self.column)
            if self.tokenizer is not None:
                check_downloaded(self.tokenizer, "tokenizer", "a Hugging Face tokenizer, prepared data or a run")
        if self.init_from is not None:
            check_model_folder(self.init_from)

    def milestone_steps(self) -> frozenset[int]:
        """The steps of `milestones`.

        Raises:
            UserError: one is no whole number from 1, or lies beyond the run.
        """
        parts = [] if self.milestones is None else [part.strip() for part in self.milestones.split(",")]
        if not all(re.fullmatch(r"0*[1-9][0-9]{0,9}", part) for part in parts):
            problem = f"must be steps with commas between, such as 1000,3000, not {brief(self.milestones)}"
            raise OptionError(self, "milestones", problem)
        steps = frozenset(map(int, parts))
        if self.steps is not None and steps and max(steps) > self.steps:
            raise UserError(f"milestone {max(steps)} lies beyond the {self.steps} steps of the run; leave it out")
        return steps


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


@dataclass(frozen=True)
class EvaluateOptions:
    """Masked loss, accuracy and bits per byte of a model on held-out text; of a run with ELECTRA or multiple choice,
    what its objective measures.

    Bits per byte are (loss / ln 2 * W + 8 * U) / B: loss in nats, the mean over the masked positions; W, the tokens of
    the text that are not special; U, the UTF-8 bytes of what became [UNK], which is never masked; B, the UTF-8 bytes of
    all of the text. Compare them between models with the same normalization (case, accents) and the same --mask-rate
    only."""

    model: str
    """A run, a checkpoint, an export, or a Hugging Face BERT folder with an MLM head. Of ELECTRA and multiple choice a
    run or a checkpoint: an export has the main network alone."""
    source: str
    """Held-out text, as for prepare: text files, tables (JSONL, JSON, CSV, TSV, Parquet), globs, hf:NAME, sotu."""
    column: str = "text"
    """Column of a table, or field of JSON, that holds the text."""
    length: Length | None = None
    """Tokens in a sequence, [CLS] included (default: the model's positions, at most 512)."""
    max_tokens: Count = 1_000_000
    """Documents are read from the beginning of the text until they have this many tokens."""
    mask_rate: MaskRate = 0.15
    """Fraction of the tokens of a sequence that are masked; all of them show [MASK]."""
    json: bool = False
    """One JSON object on standard output instead of lines."""
    machine: MachineOptions = field(default_factory=MachineOptions, metadata=MACHINE)

    def __post_init__(self) -> None:
        check_values(self)

    def check_inputs(self) -> None:
        """Checks, before torch is imported, that model and text are there.

        Raises:
            UserError: they are not.
        """
        check_model_folder(self.model)
        check_source(self.source, self.column)


# What config.yaml keeps of these.
OF_ONE_CALL = {"resume": False, "dry_run": False, "verify_data": False, "profile": False}
BUDGETS = ("steps", "tokens", "minutes")
# What counts where --data is a source; the data's own hash speaks for it.
SOURCE_ONLY = ("column", "streamed", "vocab_size", "tokenizer", "lowercase", "strip_accents", "validation_fraction")


def science(options: PretrainOptions, data_fingerprint: str) -> dict[str, Any]:
    """The active options that define the experiment, by dotted name; a hash of them names it.

    Options without effect in this combination are left out, so that changing them changes nothing.
    """
    values = {leaf.name: leaf.value for leaf in leaves(options, active=True) if leaf.role == "science"}
    return {**values, "data": data_fingerprint}
