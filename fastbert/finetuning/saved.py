"""Folder of a fine-tuned model, which transformers opens: `AutoModelForSequenceClassification.from_pretrained`, with
`trust_remote_code=True` unless the encoder is a BERT. `task.json` in it describes the task.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastbert import __version__
from fastbert.config import differences
from fastbert.data.foreign_tokenizer import AnyTokenizer, load_foreign_tokenizer
from fastbert.data.tokenizer_folders import load_tokenizer
from fastbert.errors import UserError, brief, choose, nearest
from fastbert.files import atomic_folder
from fastbert.finetuning.foreign_heads import check_heads
from fastbert.finetuning.kinds import KINDS
from fastbert.finetuning.kinds.kind import TaskKind
from fastbert.finetuning.model import TaskModel, encoder_weights
from fastbert.hub.export import MARK, export_model, write_model
from fastbert.hub.foreign import load_any, open_tokenizer
from fastbert.hub.load import Pretrained
from fastbert.hub.names import is_bert
from fastbert.hub.weight_files import read_stored
from fastbert.model.foreign import ForeignConfig
from fastbert.records import COUNT, Whole, json_text, parse_json, read_json
from fastbert.training.finite import require_finite
from fastbert.training.tensors import read_metadata, read_tensors

TASK_FILE = "task.json"
TASK = "task"
"""Key in the metadata of the weights, with the content of task.json."""


@dataclass(frozen=True)
class TaskRecord:
    """Content of task.json: the inputs that a fine-tuned model expects and the meaning of its scores."""

    task: str
    kind: TaskKind
    is_pair: bool
    both_orders: bool
    """Predictions are the mean over the two orders of a pair."""
    max_length: int
    seed: int
    dev: dict[str, dict[str, float]]
    """Metrics of the saved epoch, by split."""

    def to_json(self) -> dict[str, Any]:
        first = {"task": self.task, "kind": self.kind.name, "labels": list(self.kind.labels)}
        first |= {"settings": settings} if (settings := self.kind.settings()) else {}
        return first | {name: value for name, value in vars(self).items() if name not in first}


_TASK_SHAPE = {
    "task": str,
    "kind": str,
    "labels": [str],
    "settings?": dict,
    "is_pair": bool,
    "both_orders": bool,
    "max_length": Whole(1),
    "seed": COUNT,
    "dev": {str: {str: (float, type(None))}},
    "tokenizer?": str,
}


def save_task_model(model: TaskModel, record: TaskRecord, tokenizer: Path, out: Path) -> None:
    """Writes the encoder and the head of `record.task` to the folder `out`, whole or not at all; replaces an older one.

    Raises:
        UserError: no space, no permission; weights that are not finite.
    """
    config, kind = model.encoder.config, record.kind
    if isinstance(config, ForeignConfig):
        save_foreign_model(model, record, tokenizer, out)
        return
    native = is_bert(config)
    encoder = {f"encoder.{name}": tensor for name, tensor in model.encoder.state_dict().items()}
    head = {name: tensor.cpu() for name, tensor in _exported(model.head(record.task), native).items()}
    settings = _task_settings("Bert" if native else "FastBert", kind)
    require_finite({"head": head}, "the model to save")  # export_model checks the encoder
    with atomic_folder(out) as folder:
        export_model(config, encoder, tokenizer, folder, max_length=record.max_length)
        encoder, mark = read_tensors(folder / "model.safetensors")
        prefix = "bert." if native else "encoder."
        tensors = {f"{prefix}{name}": tensor for name, tensor in encoder.items()}
        settings = read_json(folder / "config.json", "model configuration") | settings
        facts = record.to_json() | {"tokenizer": load_tokenizer(folder).fingerprint}
        write_model(folder, settings, tensors | head, mark | {TASK: json_text(facts, sort_keys=True)})
        (folder / TASK_FILE).write_text(json_text(facts, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(_card(record, native), encoding="utf-8")


def _task_settings(classes: str, kind: TaskKind) -> dict[str, Any]:
    """Keys of config.json for a model with a head; `classes` is the prefix of the names of its classes."""
    return {
        "architectures": [f"{classes}{kind.architecture}"],
        "id2label": kind.id2label,
        "label2id": {label: int(output) for output, label in kind.id2label.items()},
        **({} if kind.problem_type is None else {"problem_type": kind.problem_type}),
    }


def save_foreign_model(model: TaskModel, record: TaskRecord, tokenizer: Path, out: Path) -> None:
    """`save_task_model` for an encoder of another architecture: the folder that transformers' class would save."""
    config: ForeignConfig = model.encoder.config
    family, words = config.architecture, load_foreign_tokenizer(tokenizer)
    head = {name: tensor.cpu() for name, tensor in _exported(model.head(record.task), native=True).items()}
    encoder = {f"{family.prefix}{name}": tensor.cpu() for name, tensor in model.encoder.model.state_dict().items()}
    require_finite({"encoder": encoder, "head": head}, "the model to save")
    settings = {**config.settings, **_task_settings(family.classes, record.kind), "dtype": "float32"}
    settings.pop("torch_dtype", None)
    facts = record.to_json() | {"tokenizer": words.fingerprint}
    with atomic_folder(out) as folder:
        mark = {MARK: __version__, TASK: json_text(facts, sort_keys=True)}
        write_model(folder, settings, encoder | head, mark)
        words.save(folder)
        (folder / TASK_FILE).write_text(json_text(facts, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(_card(record, native=True), encoding="utf-8")


def _exported(head: nn.Module, native: bool) -> dict[str, Tensor]:
    """Weights of a head, by their names in the folder."""
    named = {}
    for name, parameter in head.named_parameters():
        layer, _, end = name.rpartition(".")
        named[f"{head.bert_names[layer] if native else layer}.{end}"] = parameter.detach()
    return named


def _card(record: TaskRecord, native: bool) -> str:
    trust = "" if native else ", trust_remote_code=True"
    metrics = "\n".join(
        f"- {split}, {name}: {value:.4f}" for split, values in record.dev.items() for name, value in values.items()
    )
    limit = "It reads longer texts in overlapping windows of" if record.kind.labels_words else "Inputs are cut to"
    return f"""---
library_name: transformers
pipeline_tag: {record.kind.pipeline}
tags:
- fastbert
# license: choose one before you publish this model
---

# A text encoder fine-tuned on {record.task}

Trained by fastbert {__version__}, seed {record.seed}: the epoch with the best metric on dev.

{metrics}
{record.kind.card()}
`AutoModel{record.kind.architecture}.from_pretrained(folder{trust})` opens it, `AutoTokenizer` its tokenizer, and
`fastbert predict --model folder` reads it too. {limit} {record.max_length} tokens.
"""


def fine_tuned_folder(path: str | Path) -> Path | None:
    """Folder of a fine-tuned model: `path` or `path`/model; None if there is none."""
    for folder in (Path(path), Path(path) / "model"):
        if (folder / TASK_FILE).is_file():
            return folder
    return None


@dataclass(frozen=True)
class FineTuned:
    model: TaskModel
    vocabulary: AnyTokenizer
    record: TaskRecord


def read_task_record(folder: Path) -> tuple[TaskRecord, AnyTokenizer]:
    """Record and tokenizer of a fine-tuned model.

    Raises:
        UserError: the record is damaged, or the tokenizer is not the one with which the model was trained.
    """
    values, vocabulary = read_json(folder / TASK_FILE, "task record", _TASK_SHAPE), open_tokenizer(folder)
    known = {name.removesuffix("?") for name in _TASK_SHAPE}
    if unknown := sorted(values.keys() - known):
        raise UserError(
            f"the task record {folder / TASK_FILE} has {brief(unknown[0])}, which this version of fastbert does not "
            f"know; {nearest(unknown[0], known)}"
        )
    trained_with = values.get("tokenizer", vocabulary.fingerprint)
    kind = KINDS[choose(f"kind of task in {folder / TASK_FILE}", values["kind"], KINDS)]
    where = f"the task record {folder / TASK_FILE}"
    kind = kind.restored(tuple(values["labels"]), values.get("settings", {}), where)
    if len(kind.labels) < kind.min_labels:
        raise UserError(
            f"the task record {folder / TASK_FILE} is damaged: a task has at least {kind.min_labels} labels"
        )
    parts = {name: value for name, value in values.items() if name not in ("kind", "labels", "settings", "tokenizer")}
    record = TaskRecord(kind=kind, **parts)
    weights = folder / "model.safetensors"
    where = f"the task record in {weights}"
    written = parse_json(read_metadata(weights).get(TASK, "{}"), where, dict) if weights.is_file() else {}
    if written and (changed := differences(written, {"tokenizer": written.get("tokenizer")} | values)):
        raise UserError(f"{folder / TASK_FILE} was changed since it was written ({'; '.join(changed)}); restore it")
    if trained_with != vocabulary.fingerprint:
        raise UserError(
            f"{folder} has another tokenizer than the one with which its model was trained; restore that one"
        )
    return record, vocabulary


def load_task_model(path: str | Path, kernels: str = "auto") -> FineTuned:
    """Loads a fine-tuned model, bit for bit as trained, from its folder or the folder of its seed.

    Raises:
        UserError: there is none, or it is damaged.
    """
    folder = fine_tuned_folder(path)
    if folder is None:
        raise not_fine_tuned(path)
    record, vocabulary = read_task_record(folder)
    pretrained = load_any(folder)
    model = TaskModel(pretrained.config, {record.task: record.kind}, kernels)
    model.encoder.load_state_dict(encoder_weights(pretrained))
    native = isinstance(pretrained.config, ForeignConfig) or is_bert(pretrained.config)
    head = _exported(model.head(record.task), native)
    stored = read_stored(folder, head)
    with torch.no_grad():
        for name, weight in head.items():
            if name not in stored or stored[name].shape != weight.shape:
                raise UserError(f"{folder} is damaged: its weight {name} is missing or does not fit {TASK_FILE}")
            weight.copy_(stored[name])
            if not weight.isfinite().all():
                raise UserError(f"{folder}: its weight {name} holds numbers that are not finite; train it again")
    return FineTuned(model, vocabulary, record)


def not_fine_tuned(path: str | Path) -> UserError:
    return UserError(
        f"{path} is not a fine-tuned model: there is no {TASK_FILE} in it or in its model/; give the folder of a "
        "seed of `fastbert finetune`, or run that first: fastbert finetune --model MODEL --task TASK --out OUT"
    )


def load_encoder(path: str | Path) -> Pretrained:
    """Loads an encoder like `load_any`, also from the folder of a seed of `fastbert finetune`."""
    folder = fine_tuned_folder(path)
    if folder is not None:
        read_task_record(folder)  # refuses another tokenizer
    pretrained = load_any(folder or path)
    if isinstance(pretrained.config, ForeignConfig):
        check_heads(pretrained.config)
    return pretrained
