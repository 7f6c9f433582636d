"""BERT's classifier on our encoder, its loss and its scores, and the folder it is kept in.

That folder is a model of transformers' own kind (`AutoModelForSequenceClassification` opens it, with
`trust_remote_code=True` unless the encoder is a BERT), and `task.json` beside it says what it was trained for.
"""

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from fastbert_kernels import combine, hash_dropout
from safetensors import safe_open
from torch import Tensor, nn

from fastbert import __version__
from fastbert.config import differences
from fastbert.data.tokenizer import WordPiece, load_tokenizer
from fastbert.errors import UserError, brief, nearest
from fastbert.files import atomic_folder
from fastbert.finetuning.batches import Batch
from fastbert.hub.export import export_model, write_model
from fastbert.hub.load import Pretrained, load_pretrained
from fastbert.hub.names import is_bert
from fastbert.inputs import input_errors
from fastbert.model.config import EncoderConfig
from fastbert.model.encoder import Encoder, initialize
from fastbert.records import COUNT, Whole, json_text, parse_json, read_json
from fastbert.training.finite import require_finite
from fastbert.training.tensors import read_metadata, read_tensors

TASK_FILE = "task.json"
TASK = "task"
"""Key in the metadata of the weights: task.json as it was written."""
HEAD_SITE = -1  # of dropout; those of the encoder count from 0

# Names of ours -> of transformers, for the head of a native BERT; our own class has ours.
_BERT_HEAD = {"pooler": "bert.pooler.dense", "classifier": "classifier"}


class Classifier(nn.Module):
    """[CLS] -> dense, tanh (the pooler) -> dropout -> linear: one score a class, or one number.

    Args:
        config: of the encoder, with the dropout to train with.
        outputs: classes, or 1 for a number.
    """

    def __init__(self, config: EncoderConfig, outputs: int, kernels: str = "auto") -> None:
        super().__init__()
        self.encoder = Encoder(config, kernels)
        self.pooler = nn.Linear(config.width, config.width)
        self.classifier = nn.Linear(config.width, outputs)

    def forward(self, batch: Batch, row_keys: Tensor | None = None) -> Tensor:
        """Logits [B, L]; dropout where `row_keys` (int32 [B]) are given."""
        hidden = self.encoder(
            batch.input_ids,
            attention_mask=batch.attention_mask,
            token_type_ids=batch.token_type_ids,
            row_keys=row_keys,
            only=slice(1),
        )
        pooled = torch.tanh(self.pooler(hidden[:, 0]))
        if row_keys is not None:
            pooled = hash_dropout(pooled, combine(row_keys, HEAD_SITE), self.encoder.config.dropout)
        return self.classifier(pooled)


def new_classifier(
    pretrained: Pretrained, outputs: int, seed: int, *, dropout: float, attention_dropout: float, kernels: str
) -> Classifier:
    """The pretrained encoder under a head whose first weights depend on (seed, name) alone.

    A pooler that the pretrained model may have had is not taken: it was trained for another purpose, if at all.
    """
    config = replace(pretrained.config, dropout=dropout, attention_dropout=attention_dropout)
    model = Classifier(config, outputs, kernels)
    model.encoder.load_state_dict(_encoder_weights(pretrained))
    initialize(nn.ModuleDict({"pooler": model.pooler, "classifier": model.classifier}), seed, config.initializer_std)
    return model


def _encoder_weights(pretrained: Pretrained) -> dict[str, Tensor]:
    prefix = "encoder."
    return {name.removeprefix(prefix): w for name, w in pretrained.weights.items() if name.startswith(prefix)}


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """[B], float32 at least: cross-entropy where `labels` are integers, else the squared error of the one number."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if labels.is_floating_point():
        return (logits.squeeze(-1) - labels).square()
    return F.cross_entropy(logits, labels, reduction="none")


def scores(logits: Tensor, *, numbers: bool) -> Tensor:
    """Probabilities float64 [B, L], or numbers float64 [B]."""
    return logits.double().squeeze(-1) if numbers else logits.double().softmax(-1)


@dataclass(frozen=True)
class TaskRecord:
    """What task.json says: what a fine-tuned model expects and what its scores mean."""

    task: str
    kind: str
    labels: tuple[str, ...]
    is_pair: bool
    both_orders: bool
    """Its predictions are the mean over a pair's two orders."""
    max_length: int
    seed: int
    dev: dict[str, dict[str, float]]
    """The metrics of the epoch that was kept, by split."""

    @property
    def numbers(self) -> bool:
        return self.kind == "number"


_TASK_SHAPE = {
    "task": str,
    "kind": str,
    "labels": [str],
    "is_pair": bool,
    "both_orders": bool,
    "max_length": Whole(1),
    "seed": COUNT,
    "dev": {str: {str: (float, type(None))}},
    "tokenizer?": str,
}


def save_classifier(model: Classifier, record: TaskRecord, tokenizer: Path, out: Path) -> None:
    """Writes the folder `out`, whole or not at all; an older one is replaced.

    Raises:
        UserError: no space, no permission; weights that are not finite.
    """
    config = model.encoder.config
    native = is_bert(config)
    encoder = {f"encoder.{name}": tensor for name, tensor in model.encoder.state_dict().items()}
    head = {
        f"{_BERT_HEAD[name] if native else name}.{kind}": getattr(getattr(model, name), kind).detach().cpu()
        for name in _BERT_HEAD
        for kind in ("weight", "bias")
    }
    labels = {"0": "score"} if record.numbers else {str(place): label for place, label in enumerate(record.labels)}
    settings = {
        "architectures": [f"{'Bert' if native else 'FastBert'}ForSequenceClassification"],
        "id2label": labels,
        "label2id": {label: int(place) for place, label in labels.items()},
        "problem_type": "regression" if record.numbers else "single_label_classification",
    }
    require_finite({"head": head}, "the model to save")  # export_model looks at the encoder
    with atomic_folder(out) as folder:
        export_model(config, encoder, tokenizer, folder, max_length=record.max_length)
        encoder, mark = read_tensors(folder / "model.safetensors")
        prefix = "bert." if native else "encoder."
        tensors = {f"{prefix}{name}": tensor for name, tensor in encoder.items()}
        settings = read_json(folder / "config.json", "model configuration") | settings
        facts = asdict(record) | {"tokenizer": load_tokenizer(folder).fingerprint}
        write_model(folder, settings, tensors | head, mark | {TASK: json_text(facts, sort_keys=True)})
        (folder / TASK_FILE).write_text(json_text(facts, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(_card(record, native), encoding="utf-8")


def _card(record: TaskRecord, native: bool) -> str:
    trust = "" if native else ", trust_remote_code=True"
    metrics = "\n".join(
        f"- {split}, {name}: {value:.4f}" for split, values in record.dev.items() for name, value in values.items()
    )
    return f"""---
library_name: transformers
pipeline_tag: text-classification
tags:
- fastbert
# license: to be chosen by whoever publishes this model
---

# A text encoder fine-tuned on {record.task}

By fastbert {__version__}, seed {record.seed}: the best epoch by its metric on dev.

{metrics}

`AutoModelForSequenceClassification.from_pretrained(folder{trust})` opens it, `AutoTokenizer` its tokenizer, and
`fastbert predict --model folder` reads it too. Inputs are cut to {record.max_length} tokens.
"""


def fine_tuned_folder(path: str | Path) -> Path | None:
    """Where the model that `save_classifier` wrote lies: `path` itself or `path`/model; None if there is none."""
    for folder in (Path(path), Path(path) / "model"):
        if (folder / TASK_FILE).is_file():
            return folder
    return None


@dataclass(frozen=True)
class FineTuned:
    model: Classifier
    vocabulary: WordPiece
    record: TaskRecord


def read_record(folder: Path) -> tuple[TaskRecord, WordPiece]:
    """What a fine-tuned model was trained for, and its tokenizer.

    Raises:
        UserError: the record is damaged, or the tokenizer is not the one the model was trained with.
    """
    values, vocabulary = read_json(folder / TASK_FILE, "task record", _TASK_SHAPE), load_tokenizer(folder)
    known = {field.name for field in fields(TaskRecord)} | {"tokenizer"}
    if unknown := sorted(values.keys() - known):
        raise UserError(
            f"the task record {folder / TASK_FILE} has {brief(unknown[0])}, which this version of fastbert does not "
            f"know; {nearest(unknown[0], known)}"
        )
    trained_with = values.get("tokenizer", vocabulary.fingerprint)
    record = {name: value for name, value in values.items() if name != "tokenizer"}
    record = TaskRecord(**{**record, "labels": tuple(values["labels"])})
    if not record.numbers and len(record.labels) < 2:
        raise UserError(f"the task record {folder / TASK_FILE} is damaged: a task has two labels at least")
    weights = folder / "model.safetensors"
    where = f"the task record in {weights}"
    written = parse_json(read_metadata(weights).get(TASK, "{}"), where, dict) if weights.is_file() else {}
    if changed := differences(*({key: facts[key] for key in written.keys() & values} for facts in (written, values))):
        raise UserError(f"{folder / TASK_FILE} was changed since it was written ({'; '.join(changed)}); put that back")
    if trained_with != vocabulary.fingerprint:
        raise UserError(f"{folder} holds another tokenizer than its model was trained with; put that one back")
    return record, vocabulary


def load_classifier(path: str | Path, kernels: str = "auto") -> FineTuned:
    """A fine-tuned model, bit for bit as it was trained, from its folder or its seed's.

    Raises:
        UserError: there is none, or it is damaged.
    """
    folder = fine_tuned_folder(path)
    if folder is None:
        raise UserError(
            f"{path} is not a fine-tuned model: there is no {TASK_FILE} in it or in its model/; give the folder of a "
            "seed of `fastbert finetune`, or run that first: fastbert finetune --model MODEL --task TASK --out OUT"
        )
    record, vocabulary = read_record(folder)
    pretrained = load_pretrained(folder)
    model = Classifier(pretrained.config, 1 if record.numbers else len(record.labels), kernels)
    model.encoder.load_state_dict(_encoder_weights(pretrained))
    native = is_bert(pretrained.config)
    with input_errors(folder), safe_open(folder / "model.safetensors", "pt") as file, torch.no_grad():
        there = set(file.keys())
        for name, parameter in model.named_parameters():
            module, _, kind = name.partition(".")
            if module == "encoder":
                continue
            theirs = f"{_BERT_HEAD[module] if native else module}.{kind}"
            if theirs not in there or tuple(file.get_slice(theirs).get_shape()) != tuple(parameter.shape):
                raise UserError(f"{folder} is damaged: its weight {theirs} is missing or does not fit {TASK_FILE}")
            parameter.copy_(file.get_tensor(theirs))
            if not parameter.isfinite().all():
                raise UserError(f"{folder}: its weight {theirs} holds numbers that are not finite; train it again")
    return FineTuned(model, vocabulary, record)


def load_encoder(path: str | Path) -> Pretrained:
    """As `load_pretrained`, and a seed's folder of `fastbert finetune` stands for the model in it."""
    folder = fine_tuned_folder(path)
    if folder is not None:
        read_record(folder)  # refuses another tokenizer
    return load_pretrained(folder or path)
