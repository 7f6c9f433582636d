"""Models of a pipeline before they are trained."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fastbert.errors import UserError
from fastbert.finetuning.options import FinetuneOptions
from fastbert.hub.load import Pretrained
from fastbert.hub.names import head_of
from fastbert.model.config import EncoderConfig
from fastbert.model.flops import encoder_parameters
from fastbert.model.memory import training_memory
from fastbert.pretraining.held_out import find_checkpoint
from fastbert.pretraining.options import PretrainOptions
from fastbert.studies.pipelines.options import EncoderEntry
from fastbert.training.hardware import resolve_device
from fastbert.training.schedules import constant_phase


@dataclass(frozen=True)
class Input:
    """Something that a job reads."""

    path: str
    mark: str
    """Id of the job that writes it, or a hash of its contents."""
    job: str | None = None
    """Id of the job that writes it; None if it exists."""
    tokenizer: str | None = None
    """Id of the job that trains the tokenizer of these data, or hash of that of a checkpoint; None: unknown."""

    @property
    def after(self) -> tuple[str, ...]:
        return () if self.job is None else (self.job,)


@dataclass(frozen=True)
class PlannedModel:
    """A model of the pipeline."""

    entry: EncoderEntry
    config: EncoderConfig
    objective: str | None
    """None: unknown, for an existing checkpoint."""
    checkpoints: Mapping[int | None, Input]
    """Seed of the pretraining -> its folder."""
    identity: Mapping[str, str] = field(default_factory=dict)
    """Hashes of an existing checkpoint with its head, and of its tokenizer."""
    encoder: Mapping[str, str] = field(default_factory=dict)
    """The same of its encoder alone, from which a fine-tuning starts."""
    data: Input | None = None
    """Prepared data, or the folder of a checkpoint, with its tokenizer."""
    unscored: Mapping[str, str] = field(default_factory=dict)
    """Evaluation (pairs or pll) that it cannot have -> the reason."""
    options: PretrainOptions | None = None
    """Options of its pretraining, with the inputs as in the file; None for an existing checkpoint."""


def unscored(pretrained: Pretrained, path: str) -> dict[str, str]:
    """Evaluations that an existing checkpoint cannot have -> the reason."""
    head = head_of(pretrained.weights)
    if head == "mlm":
        return {}
    reasons = {"pll": "its encoder predicts no masked words"}
    if head is None and find_checkpoint(Path(path)) is None:
        reasons["pairs"] = "it has no head that scores words"
    return reasons


def pretraining_memory(options: PretrainOptions, config: EncoderConfig) -> int:
    """Expected bytes of main memory of a pretraining; 0 (unknown) on a GPU."""
    if resolve_device(options.machine.device).type != "cpu":
        return 0
    networks = options.of_objective.resolve(config).networks(config)
    tokens = min(options.micro_batch_size, options.batch_size) * options.length
    return training_memory(sum(map(encoder_parameters, networks)), networks, tokens, 5, predicts_words=True)


def tuning_memory(options: FinetuneOptions, config: EncoderConfig) -> int:
    """Expected bytes of main memory of a fine-tuning whose longest text fills its inputs; 0 (unknown) on a GPU."""
    if resolve_device(options.machine.device).type != "cpu":
        return 0
    length = min(options.max_length or config.max_positions, config.max_positions)
    tokens = (options.machine.micro_batch_size or options.batch_size) * length
    return training_memory(encoder_parameters(config), [config], tokens, 7, predicts_words=False)


def branch_step(entry: EncoderEntry, parent: PlannedModel, options: PretrainOptions) -> int:
    """The step at which a branch begins: that of the file, or the last checkpoint that stays with a constant rate.

    Args:
        options: options of the parent's pretraining, with a number of steps.

    Raises:
        UserError: no such checkpoint stays.
    """
    stays = {*options.marked_steps(options.steps), options.steps}
    if entry.step is not None:
        if entry.step not in stays:
            raise UserError(
                f"branch: {parent.entry.name} keeps no checkpoint of step {entry.step}; give it milestones: "
                f"{entry.step}"
            )
        return entry.step
    phase = constant_phase(options.schedule, options.steps)
    if phase is None:
        raise UserError(
            f"branch: the learning rate of {parent.entry.name} is never constant (schedule {options.schedule.name}); "
            "give it the schedule infinite, wsd or constant, or give a step here: "
            f"branch: {parent.entry.name}@{options.steps}"
        )
    constant = [step for step in stays if phase[0] <= step <= phase[1]]
    if not constant:
        raise UserError(
            f"branch: {parent.entry.name} keeps no checkpoint with a constant learning rate, which it has from step "
            f"{phase[0]} to {phase[1]}; give it milestones: {phase[1]}"
        )
    return max(constant)
