"""Start of a run from a model (--init-from): its tokenizer is compared with that of the data, and its weights are
copied, with rows for the words that the data's tokenizer appends; with --optimizer.keep the optimizer's moments too."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.data.tokenizer import WordPiece, pieces_of
from fastbert.data.tokenizer_check import differences
from fastbert.data.tokenizer_files import PREFIX
from fastbert.data.tokenizer_folders import load_tokenizer
from fastbert.errors import UserError, plural
from fastbert.hub.load import Pretrained, read_model, tokenizer_of
from fastbert.model.config import EncoderConfig
from fastbert.objectives.objective import Objective
from fastbert.pretraining.options import PretrainOptions
from fastbert.records import check
from fastbert.streams import echo
from fastbert.training.checkpoints import Checkpoint
from fastbert.training.optimizer_state import grow_moments, restore_optimizer
from fastbert.training.world import World


def read_initial(options: PretrainOptions) -> Pretrained:
    """Reads the model of --init-from. Raises the errors of `load_pretrained` and `check_keep`."""
    pretrained, checkpoint = read_model(options.init_from)
    if options.optimizer.keep:
        check_keep(options, checkpoint)
    if remark := other_peak(options, pretrained):
        echo(remark)
    return pretrained


def other_peak(options: PretrainOptions, pretrained: Pretrained) -> str | None:
    """A remark if the run in --init-from had another optimizer or peak learning rate: rewarming to the same peak is
    what arXiv 2403.08763 recommends."""
    name, rate = (pretrained.science.get(f"optimizer.{key}") for key in ("name", "learning_rate"))
    given = options.optimizer
    if name is None or rate is None or (name, rate) == (given.name, given.learning_rate):
        return None
    return (
        f"{options.init_from} was trained with {name} and a peak learning rate of {rate:g}, this run has {given.name} "
        f"and {given.learning_rate:g}; a higher peak learns faster and forgets more"
    )


def tokenizer_to_prepare(options: PretrainOptions, pretrained: Pretrained | None) -> str | None:
    """Folder of the tokenizer for a source of text: --tokenizer, or else that of --init-from.

    Raises:
        UserError: --tokenizer differs from the tokenizer of the weights.
    """
    if pretrained is None:
        return options.tokenizer
    if options.tokenizer is None:
        return str(pretrained.tokenizer)
    if not (Path(options.data) / "dataset.json").is_file():  # otherwise the option has no effect
        check_tokenizer(pretrained, load_tokenizer(options.tokenizer), options.tokenizer)
    return options.tokenizer


def check_positions(options: PretrainOptions, given: EncoderConfig) -> None:
    """Raises a UserError if sequences are longer than the positions that the weights of --init-from were trained
    with."""
    if options.length > given.max_positions and given.has_position_table():
        raise UserError(
            f"length {options.length} is longer than the {given.max_positions} positions of {options.init_from}, "
            f"which are fixed; lower --length to {given.max_positions} or less"
        )


def check_tokenizer(pretrained: Pretrained, vocabulary: WordPiece, where: str) -> None:
    """Compares the tokenizer of the data with that of the weights of --init-from, id by id. It may have more words than
    that one, with later ids.

    Weights without a tokenizer are refused, because the meaning of their ids is unknown.

    Args:
        vocabulary: vocabulary of the data.
        where: folder of the data.

    Raises:
        UserError: they differ; the message lists settings and the first ids.
    """
    theirs = tokenizer_of(pretrained)
    if not vocabulary.extends(theirs):
        found = differences(vocabulary, theirs, (where, str(pretrained.tokenizer)))
        raise UserError(
            f"the tokenizer of {where} differs from that of {pretrained.source}, so its ids would mean other words: "
            f"{'; '.join(found)}. Prepare the data with `fastbert prepare --tokenizer {pretrained.tokenizer}`; to "
            f"append new words, extend that tokenizer: `fastbert extend-vocab --tokenizer {pretrained.tokenizer}`"
        )


def initial_config(config: EncoderConfig, given: EncoderConfig) -> EncoderConfig:
    """The encoder `given` by --init-from, with the dropout, longest sequence and new words of this run."""
    return replace(
        given,
        vocab_size=max(given.vocab_size, config.vocab_size),  # a model may have unused rows
        dropout=config.dropout,
        attention_dropout=config.attention_dropout,
        max_positions=config.max_positions,  # differs only where no weight depends on it
    )


def load_initial(objective: Objective, options: PretrainOptions, vocabulary: WordPiece) -> None:
    """Copies the weights of --init-from into the objective; missing weights keep their initialization and are reported.

    A run or checkpoint of the same objective gives all its networks, except the note dictionary; anything else gives
    the encoder, and its head if the objective has the same. A network is copied only if all its weights have the names
    and shapes of the objective's.
    """
    source = options.init_from
    pretrained, checkpoint = read_model(source)
    weights = pretrained.weights
    if checkpoint is not None and checkpoint.state.get("objective") == options.objective:
        weights = {name: value for name, value in checkpoint.tensors["model"].items() if not name.startswith("notes.")}
    weights = with_new_rows(weights, objective, tokenizer_of(pretrained), vocabulary, source)
    initial = objective.state_dict()
    shapes = [_shapes_by_network(objective, named) for named in (weights, initial)]
    same = {network for network, found in shapes[0].items() if network == "encoder" or found == shapes[1].get(network)}
    weights = {name: value for name, value in weights.items() if _network(objective, name) in same}
    _, unexpected = objective.load_state_dict(weights, strict=False)
    if unexpected:
        raise UserError(f"{source} has weights that this run does not use: {', '.join(unexpected[:5])}")
    given = {initial[name].data_ptr() for name in weights}  # tied weights have several names
    missing = [name for name, tensor in initial.items() if tensor.data_ptr() not in given]
    if missing:
        echo(f"not in {source}, newly initialized: {', '.join(missing)}")


def _network(objective: Objective, name: str) -> str:
    """The network that a weight belongs to: encoder, a part of the objective, or else the name of the module."""
    parts = (part for part, prefixes in objective.parts.items() if name.startswith(prefixes))
    return next(parts, name.partition(".")[0])


def _shapes_by_network(objective: Objective, weights: Mapping[str, Tensor]) -> dict[str, dict[str, torch.Size]]:
    found: dict[str, dict[str, torch.Size]] = {}
    for name, tensor in weights.items():
        found.setdefault(_network(objective, name), {})[name] = tensor.shape
    return found


def with_new_rows(
    weights: Mapping[str, Tensor], objective: Objective, old: WordPiece, new: WordPiece, source: str
) -> dict[str, Tensor]:
    """Weights with rows for the words that `new` appends to `old`; the other rows are equal to the bit.

    With E [V, D] the word embedding, and b [V] the bias of the output, a new word that `old` cuts into the pieces p has

        E_w = mean_p E_p        b_w = mean_p b_p

    A word with a character that `old` lacks has the means over all words of `old`. Prints the number of new rows.
    """
    words = new.tokens[len(old.tokens) :]
    if not words:
        return dict(weights)
    cuts = [cut_by(old, word) for word in words]
    rows = _word_rows(objective)
    grown: dict[int, Tensor] = {}  # a tied weight has several names
    found = dict(weights)
    for name in rows & weights.keys():
        tensor = weights[name]
        if tensor.data_ptr() not in grown:
            grown[tensor.data_ptr()] = _with_means(tensor, objective.config.vocab_size, cuts, len(old.tokens))
        found[name] = grown[tensor.data_ptr()]
    unknown = sum(cut is None for cut in cuts)
    entries = "1 entry" if unknown == 1 else f"{unknown:,} entries"
    rest = f"; for {entries} with a character that it lacks, of all rows" if unknown else ""
    echo(
        f"{plural(len(words), 'new row')} of the word embedding, each the mean of the rows of the pieces that spelled "
        f"the word in {source}{rest}"
    )
    return found


def cut_by(vocabulary: WordPiece, entry: str) -> list[int] | None:
    """Ids of the pieces into which `vocabulary` cuts the text of an entry of another one, within a word if the entry
    begins with ##; None if it is [UNK]."""
    within = entry.startswith(PREFIX) and entry != PREFIX
    pieces = pieces_of(entry[len(PREFIX) :] if within else entry, vocabulary.ids, within)
    return None if pieces is None else [vocabulary.ids[piece] for piece in pieces]


def _with_means(tensor: Tensor, rows: int, cuts: list[list[int] | None], first: int) -> Tensor:
    """`tensor` with `rows` rows, of which those from `first` are means of the rows in `cuts`; all of its rows up to
    `first` where a cut is None."""
    old = tensor[:first].double().reshape(first, -1)
    means = old.mean(0).repeat(len(cuts), 1)
    known = [index for index, cut in enumerate(cuts) if cut is not None]
    if known:
        ids = torch.tensor([row for index in known for row in cuts[index]])
        offsets = torch.tensor([0, *(len(cuts[index]) for index in known[:-1])]).cumsum(0)
        means[known] = F.embedding_bag(ids, old, offsets, mode="mean")
    grown = tensor.new_zeros(rows, *tensor.shape[1:])
    grown[: len(tensor)] = tensor
    grown[first : first + len(cuts)] = means.reshape(len(cuts), *tensor.shape[1:]).to(tensor.dtype)
    return grown


def _word_rows(objective: Objective) -> set[str]:
    """Names of all weights with a row for each word, also those of tied weights."""
    state = objective.state_dict()
    memory = {state[name].data_ptr() for name in objective.word_rows if name in state}
    return {name for name, tensor in state.items() if tensor.data_ptr() in memory}


# --- the optimizer's moments


def check_keep(options: PretrainOptions, checkpoint: Checkpoint | None) -> None:
    """Raises a UserError if --init-from has no moments that --optimizer.keep could use, or those of another objective
    or optimizer."""
    source = options.init_from
    if checkpoint is None:
        raise _cannot_keep(f"{source} is no run, nor a checkpoint of one, and has no moments")
    state = check(checkpoint.state, {"science": {"optimizer.name": str}}, f"the state in {checkpoint.path}")
    pairs = {
        "objective": (state.get("objective"), options.objective),
        "optimizer": (state["science"]["optimizer.name"], options.optimizer.name),
    }
    for what, (theirs, ours) in pairs.items():
        if theirs != ours:
            raise _cannot_keep(f"{source} was trained with the {what} {theirs}, and this run has {ours}")


_FRESH = "leave --optimizer.keep out to start with a fresh optimizer"


def _cannot_keep(problem: str) -> UserError:
    return UserError(f"--optimizer.keep: {problem}; {_FRESH}")


def keep_moments(
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    options: PretrainOptions,
    vocabulary: WordPiece,
    world: World,
) -> None:
    """Starts the optimizer with the moments and step counters of --init-from, and with the constants of this run. The
    moments of new words are zero.

    Raises:
        UserError: there are no moments, or those of other parameters.
    """
    pretrained, checkpoint = read_model(options.init_from)
    check_keep(options, checkpoint)
    if "optimizer" not in checkpoint.tensors:
        raise UserError(f"the checkpoint {checkpoint.path} is damaged: it has no optimizer.safetensors")
    new = slice(len(tokenizer_of(pretrained).tokens), len(vocabulary.tokens))
    # LAMB and apex count their steps in the groups.
    constants = [
        {key: value for key, value in group.items() if key not in ("params", "step")}
        for group in optimizer.param_groups
    ]
    try:
        rest = check(checkpoint.state, {"optimizer": dict}, f"the state in {checkpoint.path}")["optimizer"]
        tensors, rest = grow_moments(optimizer, checkpoint.tensors["optimizer"], rest, objective.word_rows, new)
        restore_optimizer(optimizer, tensors, rest, world.like, remedy=_FRESH)
    except UserError as error:
        raise UserError(f"--optimizer.keep: {error}") from None
    for group, values in zip(optimizer.param_groups, constants, strict=True):
        group.update(values)
