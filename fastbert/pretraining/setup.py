"""What a run is made of before its first step: data, vocabulary, encoder, machine; most refusals happen here."""

import sys
from dataclasses import dataclass, replace

import torch
from torch import nn

from fastbert import config as configuration
from fastbert.data.batches import Rows, TrainingBatches, validation_batches
from fastbert.data.prepare import PrepareOptions, prepared_folder
from fastbert.data.shards import Dataset, open_dataset
from fastbert.data.tokenizer import WordPiece
from fastbert.errors import UserError
from fastbert.hub.load import load_pretrained
from fastbert.model.config import EncoderConfig
from fastbert.model.encoder import initialize
from fastbert.objectives import OBJECTIVES
from fastbert.pretraining.evaluation import evaluate
from fastbert.pretraining.options import SOURCE_ONLY, PretrainOptions
from fastbert.training.hardware import resolve_device, resolve_precision, setup_machine


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
            load_initial(objective, options.init_from)
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
    pretrained = None
    if options.init_from is not None and config is None:
        pretrained = load_pretrained(options.init_from)
        tokenizer = tokenizer or str(pretrained.tokenizer)
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
        if pretrained is not None:
            options = replace(options, encoder=options.encoder.like(pretrained.config))
        config = options.encoder.resolve(dataset.vocab_size, options.length)
        if pretrained is not None:
            config = initial_config(options, config, pretrained.config)
    if not len(rows := Rows(dataset.split("validation"), options.length, 0, 0)):
        raise UserError(
            f"{folder} holds {len(rows.stream)} tokens for validation, less than one sequence of {options.length}; "
            "lower --length, or prepare it with a larger --validation-share"
        )
    return Setup(options, dataset, vocabulary, config, device, precision)


def initial_config(options: PretrainOptions, config: EncoderConfig, given: EncoderConfig) -> EncoderConfig:
    """The shape of the encoder `given` by --init-from, with this run's dropout.

    Raises:
        UserError: its vocabulary or positions do not fit the data.
    """
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


def load_initial(objective: nn.Module, source: str) -> None:
    """Copies the weights of `source` into the objective; what it lacks keeps its initial value, and this is said."""
    weights = load_pretrained(source).weights
    missing, unexpected = objective.load_state_dict(weights, strict=False)
    if unexpected:
        raise UserError(f"{source} has weights this run has no place for: {', '.join(unexpected[:5])}")
    missing = [name for name in missing if name != "head.decoder.weight"]
    if missing:
        say(f"not in {source}, so freshly initialised: {', '.join(missing)}")


def data_fingerprint(dataset: Dataset) -> str:
    """Names the tokens of both splits and their tokenizer, wherever the folder lies."""
    return configuration.digest({"tokenizer": dataset.fingerprint, "splits": dataset.record["splits"]})
