"""Setup of a run before its first step: data, vocabulary, encoder and machine. Most user errors are found here."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from fastbert import config as configuration
from fastbert.data.batches import PackedRows, Replay, ReplayedRows, TrainingBatches, validation_batches
from fastbert.data.prepare import PrepareOptions, prepared_folder
from fastbert.data.replay import ReplaySchedule
from fastbert.data.shards import Dataset, open_dataset
from fastbert.data.stages import NOMINAL_STEPS, BatchPlan, all_shapes, make_plan
from fastbert.data.tokenizer import WordPiece
from fastbert.data.tokenizer_check import differences
from fastbert.data.tokenizer_folders import load_tokenizer
from fastbert.errors import UserError
from fastbert.hub.export_code import check_exportable
from fastbert.model.config import EncoderConfig
from fastbert.model.encoder import blocks_of, initialize, set_execution
from fastbert.model.flops import encoder_parameters
from fastbert.objectives import OBJECTIVES, group_of
from fastbert.objectives.objective import Objective
from fastbert.pretraining.branch import suggest_constant
from fastbert.pretraining.evaluation import evaluate
from fastbert.pretraining.initial import (
    check_positions,
    check_tokenizer,
    initial_config,
    load_initial,
    read_initial,
    tokenizer_to_prepare,
)
from fastbert.pretraining.note_corpus import NoteCorpus, find_note_words, rare_word_range
from fastbert.pretraining.options import SOURCE_ONLY, PretrainOptions
from fastbert.pretraining.other_data import open_others
from fastbert.streams import echo
from fastbert.training.apex import check_apex
from fastbert.training.hardware import device_of_rank, memory, resolve_precision, setup_machine
from fastbert.training.optimizers import build_optimizer
from fastbert.training.splits import NEW, OLD
from fastbert.training.step import Updater
from fastbert.training.world import ONE_PROCESS, World


@dataclass
class PretrainSetup:
    """Parts of a run before its first step."""

    options: PretrainOptions
    dataset: Dataset
    vocabulary: WordPiece
    config: EncoderConfig
    device: torch.device
    precision: str
    note_corpus: NoteCorpus | None = None
    """The words that have notes; None without a note dictionary."""
    started: PretrainOptions | None = None
    """Options in config.yaml, if a run is resumed."""
    world: World = ONE_PROCESS
    others: dict[str, Dataset] = field(default_factory=dict)
    """Other data by name: `old` (--replay.data), and that of --eval-data."""

    @property
    def fingerprint(self) -> str:
        """Hash of the training data."""
        return data_fingerprint(self.dataset, self.others[OLD] if self.options.replay.active else None)

    def objective(self, initial: bool = True) -> Objective:
        """The networks on the device, with the weights of --init-from if that is given and `initial` is set."""
        options = self.options
        notes = self.note_corpus.notes(self.config.width, options.seed, self.device) if self.note_corpus else None
        objective = OBJECTIVES[options.objective](
            self.config, options.of_objective, self.vocabulary, options.machine.kernels, notes
        )
        initialize(objective, options.seed, self.config.initializer_std)
        if initial and options.init_from is not None:
            load_initial(objective, options, self.vocabulary)
        machine = options.machine
        compiled = machine.compile == "on" or (machine.compile == "auto" and self.device.type == "cuda")
        set_execution(objective, compiled, machine.activation_checkpointing)
        # Sharding moves one block after the other, so the whole encoder need not fit the device.
        return objective if self.world.sharded else objective.to(self.device)

    def updater(self, objective: Objective) -> Updater:
        """Builds the updater of all training steps, with a new optimizer over all parameters of the networks."""
        options, apex, world = self.options.optimizer, self.options.machine.apex, self.world
        network = world.distributed(objective, self.device, blocks_of(objective))
        optimizer = build_optimizer(objective.named_parameters(), options, self.device, apex, world)
        return Updater(objective, optimizer, options.clip_norm, self.precision, world, network)

    def plan(self, steps: int | None = None) -> BatchPlan:
        """Batches of a run of `steps` steps; None means the number in the options, or a nominal number."""
        options = self.options
        return make_plan(options.stages, options.batch_size, options.length, steps or options.steps or NOMINAL_STEPS)

    def shapes(self) -> set[tuple[int, int]]:
        """All (batch_size, length) that a step can have, for any number of steps."""
        return all_shapes(self.options.stages, self.options.batch_size, self.options.length)

    def rows(self, split: str, length: int | None = None, name: str = NEW) -> PackedRows:
        """The split of the data `name` in sequences of `length` tokens, or of the run's length if None."""
        options, ids = self.options, self.vocabulary.ids
        length = length or options.length
        dataset = self.dataset if name == NEW else self.others[name]
        noted = self.note_corpus.noted[name, split, length] if self.note_corpus else None
        return PackedRows(dataset.split(split), length, ids["[CLS]"], ids["[SEP]"], options.document_mask, noted)

    def batches(self, plan: BatchPlan | None = None) -> TrainingBatches:
        """Training batches of `plan`, or of the run's plan if None."""
        options, plan, replay = self.options, plan or self.plan(), None
        rows = {length: self.rows("train", length) for length in plan.lengths}
        if options.replay.active:
            fraction = options.replay.fraction
            old = {length: self.rows("train", length, OLD) for length in plan.lengths}
            rows = {length: ReplayedRows(new, old[length], fraction) for length, new in rows.items()}
            replay = Replay(ReplaySchedule(fraction), options.replay.seed)
        return TrainingBatches(rows, plan, options.micro_batch_size, options.seed, self.device, self.world, replay)

    def validate(self, objective: Objective, length: int | None = None) -> dict[str, dict[str, float]]:
        """Losses on held-out sequences of `length` tokens, or of the run's length if None, for each validation split by
        name; that of --data is the first."""
        options = self.options
        found = {}
        for name in (NEW, *self.others):
            rows = self.rows("validation", length, name)
            count = min(options.eval_sequences, len(rows))
            batches = validation_batches(rows, count, options.micro_batch_size, self.device, self.world)
            found[name] = evaluate(objective, batches, self.precision, self.world, count)
        return found


def prepare_setup(
    options: PretrainOptions,
    config: EncoderConfig | None = None,
    verify_data: bool | None = None,
    world: World = ONE_PROCESS,
) -> PretrainSetup:
    """Opens the data and resolves encoder and machine; raises the user errors that can be found before training.

    Args:
        config: encoder of a run that is resumed.
        verify_data: replaces the option of that name unless None.
    """
    options.replay.check()
    device = device_of_rank(options.machine.device, world)
    precision, warning = resolve_precision(options.machine.precision, device)
    if warning:
        echo(warning)
    if options.machine.apex:
        check_apex(options.optimizer.name, device)
    setup_machine(options.machine, device)
    check_networks(options, device, world)
    pretrained = None
    if options.init_from is not None and config is None:
        pretrained = read_initial(options)
        if suggestion := suggest_constant(options.init_from):
            echo(suggestion)
        options = replace(options, encoder=options.encoder.like(pretrained.config))
        check_positions(options, pretrained.config)
        check_networks(options, device, world)
    folder = data_folder(options, tokenizer_to_prepare(options, pretrained))
    dataset = open_dataset(folder, options.verify_data if verify_data is None else verify_data)
    vocabulary = dataset.wordpiece
    if config is None:
        config = options.encoder.resolve(dataset.vocab_size, options.length)
        check_memory(options, [config], device, world)
        if pretrained is not None:
            check_tokenizer(pretrained, vocabulary, str(folder))
            config = initial_config(config, pretrained.config)
        elif options.tokenizer is not None and str(folder) == options.data:
            check_given_tokenizer(options, vocabulary)
    if not len(rows := PackedRows(dataset.split("validation"), options.length, 0, 0)):
        raise UserError(
            f"{folder} has {len(rows.stream)} tokens for validation, less than one sequence of {options.length}; "
            "lower --length, or prepare it with a larger --validation-fraction"
        )
    options = replace(options, **{group_of(options.objective): options.of_objective.resolve(config)})
    for warning in options.of_objective.warnings(config):
        echo(warning)
    verify = options.verify_data if verify_data is None else verify_data
    others = open_others(options, dataset, pretrained.tokenizer if pretrained else None, verify)
    if options.replay.active and options.replay.seed is None:
        seed = options.seed if pretrained is None or pretrained.seed is None else pretrained.seed
        options = replace(options, replay=replace(options.replay, seed=seed))
    lengths = {options.length, options.stages.first_length or options.length}
    note_corpus = None
    if options.notes.enabled:
        replayed = options.replay.fraction if options.replay.active else 0.0
        note_corpus = find_note_words(options.notes, dataset, options.length, lengths, others, replayed)
    return PretrainSetup(
        options, dataset, vocabulary, config, device, precision, note_corpus, world=world, others=others
    )


def check_networks(options: PretrainOptions, device: torch.device, world: World = ONE_PROCESS) -> None:
    """Raises a UserError, before the data is prepared, for networks that are invalid or too large for `device`."""
    config = options.encoder.resolve(vocab_size=1, length=options.length)
    check_exportable(config.scaled(min(config.width, 64)))  # builds the position encoding
    check_memory(options, options.of_objective.networks(config), device, world)


def check_memory(
    options: PretrainOptions, configs: Sequence[EncoderConfig], device: torch.device, world: World = ONE_PROCESS
) -> None:
    """Compares a lower bound of the memory for training the networks `configs` with that of `device`, for one rank.

    Raises:
        UserError: it does not fit.
    """
    parameters = sum(map(encoder_parameters, configs))
    rows = min(options.micro_batch_size, -(-options.batch_size // world.size))
    needed = 16 * parameters  # weights, gradients and two moments in float32 (muon has one)
    if world.sharded:
        needed //= world.size
    needed += 4 * rows * options.length * options.encoder.resolve(1, options.length).width
    if needed > (available := memory(device)[1]):
        raise UserError(
            f"training {parameters:,} parameters on {rows:,} sequences of {options.length:,} tokens at a time takes "
            f"more than {needed / 1e9:,.0f} GB of memory, and {device} has {available / 1e9:,.0f} GB; choose a smaller "
            "encoder, --length or --machine.micro-batch-size"
        )


def data_folder(options: PretrainOptions, tokenizer: str | None) -> Path:
    """Prepared folder of --data; prepares it first if --data is a source."""
    return prepared_folder(
        options.data,
        PrepareOptions(
            source=options.data,
            out="data",  # has no effect
            tokenizer=tokenizer,
            workers=options.machine.workers,
            **rare_word_range(options.notes),
            **{name: getattr(options, name) for name in SOURCE_ONLY if name != "tokenizer"},
        ),
    )


def check_given_tokenizer(options: PretrainOptions, vocabulary: WordPiece) -> None:
    """Raises a UserError if --tokenizer differs from the tokenizer of the prepared --data and so would have no
    effect."""
    found = differences(vocabulary, load_tokenizer(options.tokenizer), (options.data, options.tokenizer))
    if found:
        raise UserError(
            f"--tokenizer {options.tokenizer} differs from that of {options.data}, which is prepared: "
            f"{'; '.join(found)}. "
            "Leave it out, or give --data the source to prepare it with this tokenizer"
        )


def data_fingerprint(dataset: Dataset, replayed: Dataset | None = None) -> str:
    """Hash of the tokens of both splits and of their tokenizer, and of those of replayed data; it does not depend on
    the folders' paths."""
    values = {"tokenizer": dataset.fingerprint, "splits": dataset.record["splits"]}
    return configuration.digest(values if replayed is None else {**values, "replay": data_fingerprint(replayed)})
