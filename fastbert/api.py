"""The functions of `import fastbert`: load a model, pretrain, resume, and fine-tune, from Python.

They do what the commands of the same names do, with the same options, files and messages on standard error; errors that
a user can correct are a `UserError`.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerFast

from fastbert.config import from_dict, to_dict
from fastbert.data.foreign_tokenizer import AnyTokenizer
from fastbert.downloads import local_folder, with_downloads
from fastbert.errors import UserError, brief
from fastbert.finetuning.options import FinetuneOptions
from fastbert.finetuning.results import read_results
from fastbert.finetuning.saved import fine_tuned_folder, load_task_model
from fastbert.finetuning.several_tasks import finetune_tasks
from fastbert.hub.load import Pretrained, load_pretrained, tokenizer_of
from fastbert.hub.names import head_of
from fastbert.inheritance import merged, read_yaml
from fastbert.model.encoder import Encoder
from fastbert.model.foreign import ForeignEncoder
from fastbert.model.heads import MLMHead, ReplacedHead
from fastbert.named_configs import config_path
from fastbert.pretraining.options import BUDGETS, PretrainOptions
from fastbert.pretraining.pretrain import pretrain as run_pretraining
from fastbert.pretraining.run import stored_options
from fastbert.training.callbacks import Callback, TrainingStart
from fastbert.training.training_progress import Column

# --- models


@dataclass(frozen=True)
class LoadedModel:
    """A model for use in Python, on the CPU, in evaluation mode, in the precision of its file."""

    encoder: Encoder | ForeignEncoder
    """Called as `encoder(**tokenizer(texts, padding=True, return_tensors="pt"))`: hidden states [B, T, D]."""
    tokenizer: PreTrainedTokenizerFast
    """The tokenizer of transformers."""
    head: nn.Module | None
    """Maps hidden states to logits: [B, T, D] to [B, T, V] (masked language modeling), to [B, T] (ELECTRA's
    discriminator), or as the task of a fine-tuned model does. None for an encoder alone."""
    labels: tuple[str, ...] = ()
    """Names of the head's outputs, for a fine-tuned classifier."""


def load(path: str | Path, *, kernels: str = "auto") -> LoadedModel:
    """Loads an encoder with its tokenizer and head.

    Args:
        path: a run of `fastbert pretrain` (its newest checkpoint), a checkpoint, an export, a Hugging Face BERT folder,
            its name on the hub, or the folder of a seed of `fastbert finetune`.
        kernels: implementation of the attention, as in --machine.kernels.

    Raises:
        UserError: there is no such model, or it is damaged.
    """
    path = local_folder(path)
    if fine_tuned_folder(path) is not None:
        tuned = load_task_model(path, kernels)
        model = tuned.model.eval()
        head, kind = model.head(tuned.record.task), tuned.record.kind
        return LoadedModel(model.encoder, fast_tokenizer(tuned.vocabulary), head, tuple(kind.labels))
    pretrained = load_pretrained(path)
    encoder = Encoder(pretrained.config, kernels)
    encoder.load_state_dict(_part(pretrained, "encoder"))
    head = _head(pretrained, encoder)
    return LoadedModel(encoder.eval(), fast_tokenizer(tokenizer_of(pretrained)), head and head.eval())


def _head(pretrained: Pretrained, encoder: Encoder) -> nn.Module | None:
    kind = head_of(pretrained.weights)
    if kind is None:
        return None
    config = pretrained.config
    head = MLMHead(config, encoder.words) if kind == "mlm" else ReplacedHead(config)
    head.load_state_dict(_part(pretrained, "head"))
    return head


def _part(pretrained: Pretrained, name: str) -> dict[str, Any]:
    prefix = f"{name}."
    weights = pretrained.weights.items()
    return {key.removeprefix(prefix): tensor for key, tensor in weights if key.startswith(prefix)}


def fast_tokenizer(vocabulary: AnyTokenizer) -> PreTrainedTokenizerFast:
    """transformers' tokenizer for a vocabulary."""
    built = vocabulary.build()
    roles = ("pad", "unk", "cls", "sep", "mask")
    special = {f"{role}_token": built.id_to_token(vocabulary.ids[f"[{role.upper()}]"]) for role in roles}
    return PreTrainedTokenizerFast(tokenizer_object=built, **special)


# --- training


@dataclass
class PretrainResult:
    """A pretraining that has ended."""

    folder: Path
    """Folder of the run; `folder / "model"` is its export, once it is finished."""
    finished: bool
    """False if a signal ended it: `resume(folder)` continues."""
    validation: Mapping[str, Column] = field(default_factory=dict)
    """Figures of the last validation of this call: loss (nats), accuracy, ..."""


@dataclass
class FinetuneResult:
    """A fine-tuning that has ended."""

    folder: Path
    finished: bool
    """False if a signal ended it: the same call continues."""
    results: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Content of results.json by task; empty if it is not finished."""


def pretrain(
    options: PretrainOptions | str | Path | None = None, *, callbacks: Sequence[Callback] = (), **changes: Any
) -> PretrainResult:
    """Pretrains an encoder, like `fastbert pretrain`.

    Args:
        options: options, or a YAML file by path or by name, such as "tiny"; None: the defaults.
        changes: keys of the YAML file with other values: steps=1000, optimizer={"learning_rate": 1e-3}. A budget
            (steps, tokens or minutes) replaces the file's.

    Raises:
        UserError: any error in options, data or files.
    """
    values, name = {}, "pretrain"
    if isinstance(options, str | Path):
        file = config_path("pretrain", str(options))
        values, name = _values(file), Path(file).stem
        if set(changes) & set(BUDGETS):
            values = {key: value for key, value in values.items() if key not in BUDGETS}
    given = _changed(PretrainOptions, options, values, changes)
    if not given.resume and given.branch is None:
        given.check_inputs()
    return _pretrained(with_downloads(given), name, callbacks)


def resume(folder: str | Path, *, callbacks: Sequence[Callback] = (), **changes: Any) -> PretrainResult:
    """Resumes a run exactly, like `fastbert pretrain --resume`.

    Args:
        changes: options with other values; only those that do not change the experiment, or more steps where the run
            can be lengthened.

    Raises:
        UserError: there is no such run, it is damaged, or the changes would make it another experiment.
    """
    given = _changed(PretrainOptions, stored_options(str(folder)), {}, changes)
    return _pretrained(replace(given, out=str(folder), resume=True), "pretrain", callbacks)


def finetune(
    options: FinetuneOptions | str | Path | None = None, *, callbacks: Sequence[Callback] = (), **changes: Any
) -> FinetuneResult:
    """Fine-tunes an encoder on one task or several, like `fastbert finetune`.

    Args:
        options: options, or a YAML file by path or by name; None: the defaults.
        changes: keys of the YAML file with other values: model="runs/base", task="rte", out="results/rte".

    Raises:
        UserError: any error in options, data or files.
    """
    values = _values(config_path("finetune", str(options))) if isinstance(options, str | Path) else {}
    given = _changed(FinetuneOptions, options, values, changes)
    given.check_inputs()
    code = finetune_tasks(with_downloads(given), callbacks)
    folder = Path(given.out)
    found = {} if code else {read["task"]: read for read in map(read_results, _results(folder))}
    return FinetuneResult(folder, code == 0, found)


def _results(folder: Path) -> list[Path]:
    """Folders of the results of a fine-tuning: its own, or those of its tasks."""
    if (folder / "results.json").is_file():
        return [folder]
    return sorted(path.parent for path in folder.glob("*/results.json"))


def _values(file: str) -> dict[str, Any]:
    values, where = read_yaml(file)
    if not isinstance(values, dict):
        raise UserError(f"{where} must be a mapping of options")
    return values


def _changed(cls: type, options: Any, values: dict[str, Any], changes: Mapping[str, Any]) -> Any:
    """Options of a class, those given or those of a file, with other values for `changes`."""
    if isinstance(options, cls):
        values = to_dict(options)
    elif not isinstance(options, str | Path | None):
        raise UserError(f"the options must be {cls.__name__} or a YAML file, not {brief(options)}")
    return from_dict(cls, merged(values, dict(changes)), "the options")


def _pretrained(given: PretrainOptions, name: str, callbacks: Sequence[Callback]) -> PretrainResult:
    if given.launch != "none" and callbacks:
        raise UserError("callbacks are called in this process, and launch starts others; give one of the two")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and given.out is None:
        raise UserError("with several processes give out, the folder of the run, which all of them return")
    last = _Last()
    code = run_pretraining(given, name, [last, *callbacks])
    return PretrainResult(last.folder or Path(given.out), code == 0, last.validation)


class _Last(Callback):
    """Folder and last validation of a training."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.validation: Mapping[str, Column] = {}

    def on_start(self, training: TrainingStart) -> None:
        self.folder = training.folder

    def on_validation(self, step: int, split: str, columns: Mapping[str, Column]) -> None:
        if split == "validation":
            self.validation = columns
