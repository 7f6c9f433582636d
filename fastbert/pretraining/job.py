"""`fastbert pretrain`: from options to a run folder with a trained encoder, its curves and its export."""

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastbert import config as configuration
from fastbert.data.batches import Rows, TrainingBatches, validation_batches
from fastbert.data.prepare import PrepareOptions
from fastbert.data.shards import Dataset, open_dataset, prepared_folder
from fastbert.data.tokenizer import WordPiece
from fastbert.errors import UserError
from fastbert.files import read_json, write_json
from fastbert.model.config import EncoderConfig
from fastbert.model.encoder import initialize
from fastbert.objectives import OBJECTIVES
from fastbert.pretraining.evaluation import evaluate
from fastbert.pretraining.finish import finish
from fastbert.pretraining.loop import Progress, Trainer
from fastbert.pretraining.options import SOURCE_ONLY, PretrainOptions, science
from fastbert.pretraining.run import RunFolder, check_same_experiment, merge, new_folder, session, stored_options
from fastbert.training.checkpoints import Checkpointer
from fastbert.training.hardware import (
    describe_machine,
    peak_flops,
    resolve_device,
    resolve_precision,
    setup_machine,
)
from fastbert.training.interrupts import Interrupts
from fastbert.training.logbook import Logbook
from fastbert.training.optimizers import build_optimizer
from fastbert.training.schedules import learning_rate_factor


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass
class Setup:
    """What a run is made of, before its first step."""

    options: PretrainOptions
    dataset: Dataset
    vocabulary: WordPiece
    config: EncoderConfig
    device: torch.device
    precision: str

    def objective(self, initial: bool = True) -> nn.Module:
        """The networks on the device; with the weights of --init-from, if that is given and they are wanted."""
        options = self.options
        objective = OBJECTIVES[options.objective](
            self.config, getattr(options, options.objective), self.vocabulary, options.machine.attention
        )
        initialize(objective, options.seed, self.config.initializer_std)
        if initial and options.init_from is not None:
            load_initial(objective, self.config, options.init_from)
        return objective.to(self.device)

    def rows(self, split: str) -> Rows:
        options, ids = self.options, self.vocabulary.ids
        return Rows(self.dataset.split(split), options.length, ids["[CLS]"], ids["[SEP]"], options.document_mask)

    def batches(self) -> TrainingBatches:
        options = self.options
        micro = options.machine.micro_batch_size or options.batch_size
        return TrainingBatches(self.rows("train"), options.batch_size, micro, options.seed, self.device)

    def validate(self, objective: nn.Module) -> dict[str, float]:
        options = self.options
        micro = options.machine.micro_batch_size or options.batch_size
        batches = validation_batches(self.rows("validation"), options.eval_sequences, micro, self.device)
        return evaluate(objective, batches, self.precision)


def pretrain(asked: PretrainOptions, name: str) -> int:
    """Runs or resumes a pretraining; returns the exit code.

    Args:
        asked: the options.
        name: of the run, where --out is not given.

    Raises:
        UserError: anything the user can mend, before training starts if it can be seen then.
    """
    if asked.resume:
        return resume(asked)
    given = [budget for budget in ("steps", "tokens", "minutes") if getattr(asked, budget) is not None]
    if len(given) != 1:
        raise UserError(f"give one of --steps, --tokens and --minutes, not {' and '.join(given) or 'none'}")
    run = new_folder(asked.out, name)
    setup = prepare_setup(replace(asked, out=str(run.path)))
    setup.options = resolve_steps(setup)
    learning_rate_factor(setup.options.schedule, 0, setup.options.steps)  # refuses a warm-up longer than the run
    manifest = describe_experiment(setup, science(setup.options, data_fingerprint(setup.dataset)))
    return train(setup, run, manifest, resumed=False)


def resume(asked: PretrainOptions) -> int:
    """Goes on with the run in `asked.out`, if `asked` is the same experiment."""
    stored = stored_options(asked.out)
    run = RunFolder(Path(asked.out))
    manifest = read_json(run.manifest, "the run's manifest")
    options, notes = merge(stored, asked)
    if options.data == stored.data and Path(manifest["data"]["folder"]).is_dir():
        options = replace(options, data=manifest["data"]["folder"])  # the source itself may be gone by now
    setup = prepare_setup(options, EncoderConfig.from_dict(manifest["encoder"]))
    check_same_experiment(run, manifest, science(setup.options, data_fingerprint(setup.dataset)))
    for line in notes:
        say(f"resumed with another {line}")
    return train(setup, run, manifest, resumed=True)


def prepare_setup(options: PretrainOptions, config: EncoderConfig | None = None) -> Setup:
    """Data, vocabulary, encoder and machine for `options`; everything that can be refused is refused here.

    Args:
        config: of a run that is resumed.
    """
    device = resolve_device(options.machine.device)
    precision, warning = resolve_precision(options.machine.precision, device)
    if warning:
        say(warning)
    setup_machine(options.machine, device)
    options.encoder.resolve(vocab_size=1, length=options.length)  # a wrong encoder shows before the data is prepared
    tokenizer = options.tokenizer
    if tokenizer is None and options.init_from is not None and config is None:
        from fastbert.hub.load import load_pretrained

        tokenizer = str(load_pretrained(options.init_from).tokenizer)
    folder = prepared_folder(
        options.data,
        PrepareOptions(
            source=options.data,
            out="",
            tokenizer=tokenizer,
            workers=options.machine.workers,
            **{name: getattr(options, name) for name in SOURCE_ONLY if name != "tokenizer"},
        ),
    )
    dataset = open_dataset(folder)
    vocabulary = dataset.wordpiece
    if config is None:
        config = options.encoder.resolve(dataset.vocab_size, options.length)
        if options.init_from is not None:
            config = initial_config(options, config)
    return Setup(options, dataset, vocabulary, config, device, precision)


def initial_config(options: PretrainOptions, config: EncoderConfig) -> EncoderConfig:
    """The shape of the encoder in --init-from, with this run's dropout.

    Raises:
        UserError: its vocabulary or positions do not fit the data.
    """
    from fastbert.hub.load import load_pretrained

    given = load_pretrained(options.init_from).config
    if given.vocab_size < config.vocab_size:
        raise UserError(
            f"the vocabulary of {options.data} has {config.vocab_size} words, larger than the embedding of "
            f"{options.init_from} with {given.vocab_size}; prepare the data with --tokenizer {options.init_from}"
        )
    if given.max_positions < options.length:
        raise UserError(
            f"length {options.length} is longer than the {given.max_positions} positions of {options.init_from}; "
            "lower --length"
        )
    return replace(given, dropout=config.dropout, attention_dropout=config.attention_dropout)


def load_initial(objective: nn.Module, config: EncoderConfig, source: str) -> None:
    """Copies the weights of `source` into the objective; what it lacks keeps its initial value, and this is said."""
    from fastbert.hub.load import load_pretrained

    weights = load_pretrained(source).weights
    missing, unexpected = objective.load_state_dict(weights, strict=False)
    if unexpected:
        raise UserError(f"{source} has weights this run has no place for: {', '.join(unexpected[:5])}")
    missing = [name for name in missing if name != "head.decoder.weight"]
    if missing:
        say(f"not in {source}, so freshly initialised: {', '.join(missing)}")


def resolve_steps(setup: Setup) -> PretrainOptions:
    """The options with a budget in tokens or minutes turned into steps, and with all intervals set."""
    options = setup.options
    micro = options.machine.micro_batch_size or options.batch_size
    steps = options.steps
    if options.tokens is not None:
        steps = max(1, options.tokens // (options.batch_size * options.length))
    elif options.minutes is not None:
        steps = steps_in(setup, options.minutes * 60.0)
    return replace(
        options,
        steps=steps,
        eval_every=options.eval_every or max(1, steps // 10),
        checkpoint_every=options.checkpoint_every or min(1000, max(1, steps // 5)),
        machine=replace(options.machine, micro_batch_size=micro),
    )


def steps_in(setup: Setup, seconds: float) -> int:
    """How many steps fit, by timing a few on networks that are then thrown away, ten validations included."""
    objective, batches = setup.objective(), setup.batches()
    optimizer = build_optimizer(objective.named_parameters(), setup.options.optimizer, setup.device)
    objective.train()
    times = []
    start = time.perf_counter()
    while len(times) < 4 or (len(times) < 30 and time.perf_counter() - start < 0.03 * seconds):
        before = time.perf_counter()
        for batch in batches.at(len(times)):
            drawn = objective.draw(batch, setup.options.seed, 0)
            sums = objective(drawn)
            sum(sums[name] / drawn.counts[name] for name in objective.loss_weights).backward()
        optimizer.step()
        optimizer.zero_grad()
        if setup.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - before)
    before = time.perf_counter()
    setup.validate(objective)
    validation = time.perf_counter() - before
    step = sorted(times[1:])[len(times[1:]) // 2]
    return max(1, int((seconds - 10 * validation - (time.perf_counter() - start)) / step))


def data_fingerprint(dataset: Dataset) -> str:
    """Names the tokens of both splits and their tokenizer, wherever the folder lies."""
    return configuration.digest({"tokenizer": dataset.fingerprint, "splits": dataset.record["splits"]})


def describe_experiment(setup: Setup, experiment: dict[str, Any]) -> dict[str, Any]:
    dataset = setup.dataset
    return {
        "experiment": configuration.digest(experiment),
        "science": experiment,
        "data": {"folder": str(dataset.folder), "fingerprint": data_fingerprint(dataset)},
        "encoder": setup.config.to_dict(),
        "sessions": [],
    }


def train(setup: Setup, run: RunFolder, manifest: dict[str, Any], resumed: bool) -> int:
    """Builds the trainer, trains, and writes what the run leaves behind."""
    options = setup.options
    batches = setup.batches()
    checkpoint = None
    if resumed:
        checkpointer = Checkpointer(run.checkpoints, options.keep_checkpoints, say)
        checkpoint = checkpointer.load_latest()
    objective = setup.objective(initial=checkpoint is None)
    optimizer = build_optimizer(objective.named_parameters(), options.optimizer, setup.device)
    parameters = objective.parameter_count()
    flops = objective.flops(options.batch_size, options.length)
    run.claim((options.keep_checkpoints + 3) * 12 * parameters)  # weights and two moments in fp32
    if not resumed:
        run.write(options, manifest, setup.dataset.tokenizer)
        checkpointer = Checkpointer(run.checkpoints, options.keep_checkpoints, say)
    start = checkpoint.step if checkpoint else 0
    peak, how = peak_flops(setup.device, setup.precision)
    resolved = {"device": str(setup.device), "precision": setup.precision, "threads": torch.get_num_threads()}
    manifest["sessions"].append(session(start, describe_machine(), resolved))
    write_json(run.manifest, manifest)
    say(
        f"{parameters / 1e6:.2f}M parameters ({options.objective}, {setup.config.position}), "
        f"{options.steps} steps of {options.batch_size} x {options.length} tokens, "
        f"{flops * options.steps:.2e} FLOPs; {setup.device} {setup.precision}, peak {peak / 1e9:.0f} GFLOP/s ({how})"
    )
    logbook = Logbook(run.path, options.steps, start_step=start)
    if resumed:
        logbook.say(f"resuming {run.path} at step {start} of {options.steps}")
    trainer = Trainer(
        objective=objective,
        optimizer=optimizer,
        batches=batches,
        steps=options.steps,
        seed=options.seed,
        optimizer_options=options.optimizer,
        schedule=options.schedule,
        precision=setup.precision,
        checkpointer=checkpointer,
        logbook=logbook,
        validate=lambda: setup.validate(objective),
        eval_every=options.eval_every,
        checkpoint_every=options.checkpoint_every,
        log_every=options.log_every,
        peak_flops=peak,
        state={"encoder": setup.config.to_dict(), "objective": options.objective, "science": manifest["science"]},
        progress=Progress(),
    )
    if checkpoint:
        trainer.restore(checkpoint)
    seconds = time.perf_counter()
    with logbook, Interrupts() as interrupts:
        trainer.run(interrupts)
    seconds = time.perf_counter() - seconds
    if trainer.progress.step < options.steps:
        say(
            f"stopped at step {trainer.progress.step} of {options.steps}; "
            f"go on with: fastbert pretrain --resume {run.path}"
        )
        return interrupts.exit_code
    finish(setup, objective, run, trainer.progress, seconds)
    return 0
