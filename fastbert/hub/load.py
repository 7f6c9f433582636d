"""Loading of pretrained encoders: a Hugging Face BERT or ELECTRA, an export of fastbert, a run, a checkpoint.

No code of the folder is executed and no arbitrary objects are unpickled.
"""

import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fastbert.config import differences
from fastbert.data.foreign_tokenizer import AnyTokenizer, load_foreign_tokenizer
from fastbert.data.tokenizer_folders import load_tokenizer
from fastbert.downloads import local_folder, shown_folder
from fastbert.errors import UserError, abbreviated, brief
from fastbert.hub.export import NO_TYPES, SETTINGS, TOKENIZER
from fastbert.hub.folders import check_model_folder
from fastbert.hub.names import (
    BERT_OPTIONS,
    DISCRIMINATOR,
    OWN_OPTIONS,
    TIED,
    bert_names,
    check_weights,
    exported_weights,
    head_of,
)
from fastbert.hub.weight_files import INDEX, WEIGHTS, joined, read_weights
from fastbert.model.config import EncoderConfig
from fastbert.model.foreign import FAMILIES, ForeignConfig
from fastbert.progress import progress
from fastbert.ranges import plain
from fastbert.records import COUNT, check, parse_json, read_json
from fastbert.streams import echo
from fastbert.training.checkpoints import Checkpoint, read_checkpoint, read_newest
from fastbert.training.splits import NEW

LARGEST_CONFIG = 2**24  # bytes; there may be many labels
# Defaults of transformers' BertConfig for keys that config.json lacks. Sizes have no default here.
_BERT_DEFAULTS = {
    "type_vocab_size": 2,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "layer_norm_eps": 1e-12,
    "initializer_range": 0.02,
}
# Values of options that older exports do not have.
_OWN_DEFAULTS = {name: getattr(EncoderConfig, name) for name in ("feed_forward", "bias", "rope_base")}
_TYPES = {field.name: plain(field.type) for field in fields(EncoderConfig)}
# With other values, the hidden states of a BERT differ from those of fastbert's encoder.
BERT_ONLY = {
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}
# Entries of a checkpoint's state that are used here, if present.
_STATE = {
    "tokenizer?": str,
    "objective?": (str, type(None)),
    "progress?": {"tokens?": COUNT},
    "science?": {
        **{f"optimizer.{name}?": float for name in ("learning_rate", "weight_decay", "beta1", "beta2")},
        "optimizer.name?": str,
        "schedule.warmup?": float,
        "seed?": COUNT,
    },
}
# Tensors of a BERT that are not weights: buffers of older versions of transformers.
_BERT_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")


@dataclass(frozen=True)
class Pretrained:
    """A pretrained encoder and its source."""

    config: EncoderConfig | ForeignConfig
    """A `ForeignConfig` only from `fastbert.hub.foreign`."""
    weights: dict[str, Tensor]
    """`encoder.<names of Encoder>` and, if there is a head, `head.<names of MLMHead or ReplacedHead>`; on the CPU, in
    the file's precision. The tied word embedding is listed under both names. With a `ForeignConfig`, `encoder.<names of
    ForeignEncoder>` and `head.<names in the file>`."""
    tokenizer: Path
    """Folder of its tokenizer, which may be missing; it is checked when the tokenizer is loaded."""
    source: str
    """Description of the source, for messages and records."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Facts about the training of a checkpoint, for the model card."""
    science: dict[str, Any] = field(default_factory=dict)
    """Options that define the experiment of a checkpoint, by name."""

    @property
    def seed(self) -> int | None:
        """Seed of the training, if it is a checkpoint."""
        return self.science.get("seed")

    @property
    def has_head(self) -> bool:
        """True if there is an MLM head."""
        if isinstance(self.config, ForeignConfig):
            return self.config.predicts_words
        return head_of(self.weights) == "mlm"


def load_pretrained(path: str | Path) -> Pretrained:
    """Reads one of these folders, or downloads it if `path` is the name of a repository on the Hugging Face hub:

    - a Hugging Face BERT, or an ELECTRA whose embedding is as wide as its hidden states: config.json with
      `model_type: bert` or `electra`, and model.safetensors, also in several files with an index, or
      pytorch_model.bin;
    - an export of fastbert;
    - a run of `fastbert pretrain`: its newest complete checkpoint is used;
    - one checkpoint of a run;
    - one seed of `fastbert finetune`: the encoder in its model/.

    Heads other than the MLM head and that of ELECTRA's discriminator (poolers, classifiers) are ignored.

    Raises:
        UserError: the folder does not exist or is none of these; its configuration is not supported; a file is missing
            or damaged; weights are missing or do not fit; its tokenizer is unusable or was replaced.
    """
    return read_model(path)[0]


@progress("reading the model")
def read_model(path: str | Path) -> tuple[Pretrained, Checkpoint | None]:
    """The result of `load_pretrained`, with its errors, and the checkpoint that it comes from; None if that is a
    Hugging Face folder."""
    folder = check_model_folder(local_folder(path))
    if (folder / "config.json").is_file():
        return _from_hub(folder), None
    if (folder / "model" / "task.json").is_file():
        return _from_hub(folder / "model"), None
    if (checkpoint := find_checkpoint(folder)) is not None:
        return _from_checkpoint(checkpoint), checkpoint
    raise UserError(
        f"{folder} holds no model: looked for config.json (a Hugging Face BERT or an export of fastbert), "
        "checkpoints/ (a run) and state.json with manifest.json (a checkpoint of a run)"
    )


def find_checkpoint(folder: Path) -> Checkpoint | None:
    """Finds the newest complete checkpoint of a run, or opens a checkpoint; None if the folder is neither.

    Raises:
        UserError: the run has no checkpoint, or the checkpoint is damaged.
    """
    if (folder / "checkpoints").is_dir():
        if (checkpoint := read_newest(folder / "checkpoints", echo=echo)) is None:
            raise UserError(
                f"{folder / 'checkpoints'} holds no checkpoint yet; wait for the first checkpoint of the run"
            )
        return checkpoint
    if (folder / "manifest.json").is_file() and (folder / "state.json").is_file():
        return read_checkpoint(folder)
    return None


def tokenizer_of(pretrained: Pretrained) -> AnyTokenizer:
    """Loads the tokenizer of a pretrained encoder, a `ForeignTokenizer` if it has a `ForeignConfig`.

    Raises:
        UserError: there is none, it cannot be used, or it has more tokens than the embedding.
    """
    folder = pretrained.tokenizer
    foreign = isinstance(pretrained.config, ForeignConfig)
    if not foreign and not _has_tokenizer(folder):
        raise UserError(
            f"{folder} holds no tokenizer, so the ids of words in {pretrained.source} are unknown; copy the "
            "tokenizer.json or vocab.txt that it was trained with to that folder"
        )
    vocabulary = load_foreign_tokenizer(folder) if foreign else load_tokenizer(folder)
    if len(vocabulary.tokens) > pretrained.config.vocab_size:
        raise UserError(
            f"the tokenizer in {folder} has {len(vocabulary.tokens)} tokens and {pretrained.source} "
            f"{pretrained.config.vocab_size}; give the model with the tokenizer it was trained with"
        )
    return vocabulary


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt"))


# --- Hugging Face folders


def _from_hub(folder: Path) -> Pretrained:
    settings = read_json(folder / "config.json", "model configuration", dict, LARGEST_CONFIG)
    family = settings.get("model_type")
    if family not in ("bert", "electra", "fastbert"):
        if isinstance(family, str) and family in FAMILIES:
            raise UserError(
                f"{folder} holds a {FAMILIES[family].title}, whose architecture is not one of fastbert's encoders: it "
                "can be fine-tuned (finetune, predict, select, audit), and fill, evaluate --pairs and --pll read it; "
                "give a BERT, an ELECTRA or an export of fastbert here"
            )
        raise UserError(
            f"{folder / 'config.json'} has model_type {brief(family)}; fastbert reads bert, electra and its own exports"
            f" and, for fine-tuning, {', '.join(FAMILIES)}"
        )
    tensors, metadata = read_weights(folder)
    _check_tokenizer(folder, metadata.get(TOKENIZER), f"the model in {folder}")
    changed = _changed_settings(folder, settings, metadata)
    names = {"bert": "the BERT", "electra": "the ELECTRA", "fastbert": "the fastbert model"}
    try:
        if family != "fastbert":
            config = _config(folder, _BERT_DEFAULTS | settings, BERT_OPTIONS, tensors)
            config, weights = _from_bert(folder, config, settings, tensors, untyped=NO_TYPES in metadata)
        else:
            config = _config(folder, _OWN_DEFAULTS | settings, BERT_OPTIONS | OWN_OPTIONS, tensors)
            # The weights of a FastBertModel have no prefix.
            prefix = "" if any(name.startswith("encoder.") for name in tensors) else "encoder."
            named = {prefix + name: tensor for name, tensor in tensors.items()}
            named = {re.sub(f"^{DISCRIMINATOR}", "head.", name): tensor for name, tensor in named.items()}
            weights = {name: tensor for name, tensor in named.items() if name.startswith(("encoder.", "head."))}
        pretrained = _pretrained(config, weights, folder, f"{names[family]} in {shown_folder(folder)}")
    except UserError as error:
        raise UserError(f"{changed}: {error}" if changed else str(error)) from None
    if changed:
        raise UserError(f"{changed}; undo the change, or export the model again")
    if (folder / WEIGHTS).is_file() or (folder / INDEX).is_file():
        _check_dtype(folder, settings, weights)
    return pretrained


def _changed_settings(folder: Path, settings: dict[str, Any], metadata: dict[str, str]) -> str:
    """Describes how config.json differs from the one that the export was written with; empty if it does not. A key may
    be missing if the value was its default, and others may be added, but not both: that is a key with a damaged
    name."""
    if SETTINGS not in metadata:
        return ""
    written = parse_json(metadata[SETTINGS], f"the configuration in {folder / 'model.safetensors'}", dict)
    defaults = _OWN_DEFAULTS if written.get("model_type") == "fastbert" else _BERT_DEFAULTS
    if not settings.keys() - written.keys():
        settings = dict.fromkeys(written) | defaults | settings
    found = {key: settings.get(key, "missing") for key in written}
    changed = differences(written, found)
    return f"{folder / 'config.json'} was changed since it was written ({abbreviated(changed)})" if changed else ""


def _check_dtype(folder: Path, settings: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Checks that the weights have the precision in config.json, if there is one."""
    stated = settings.get("dtype", settings.get("torch_dtype"))
    if stated is None or stated == "auto":
        return
    for name, tensor in weights.items():
        if (found := str(tensor.dtype)) != f"torch.{str(stated).removeprefix('torch.')}":
            raise UserError(
                f"{folder / 'config.json'} names the dtype {brief(stated, str)}, and {name} in its weights has "
                f"{found[6:]}; restore the file that was changed, or set the dtype to that of the weights"
            )


def _check_tokenizer(folder: Path, trained_with: str | None, model: str) -> None:
    """Checks that the tokenizer in `folder`, if there is one, is usable and has the fingerprint `trained_with`."""
    if _has_tokenizer(folder) and load_tokenizer(folder).fingerprint != trained_with and trained_with:
        raise UserError(
            f"the tokenizer in {folder} is not the one that {model} was trained with, so its ids denote other words; "
            "restore the original tokenizer"
        )


def _config(folder: Path, settings: dict[str, Any], names: dict[str, str], tensors: dict[str, Tensor]) -> EncoderConfig:
    missing = [theirs for theirs in names.values() if theirs not in settings]
    if missing:
        raise UserError(f"{folder / 'config.json'} lacks {', '.join(missing)}")
    for ours, theirs in names.items():
        expected, value = _TYPES[ours], settings[theirs]
        if type(value) is not expected and not (expected is float and type(value) is int):
            raise UserError(
                f"{folder / 'config.json'} has {theirs} {brief(value)}, which must be of type {expected.__name__}"
            )
    if (layers := settings[names["layers"]]) > 1000 + len(tensors):  # before a model of that size is built
        raise UserError(f"{folder / 'config.json'} has {names['layers']} {layers}, and the weights lack those layers")
    try:
        return EncoderConfig(**{ours: settings[theirs] for ours, theirs in names.items()})
    except UserError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from None


def _from_bert(
    folder: Path, config: EncoderConfig, settings: dict[str, Any], tensors: dict[str, Tensor], untyped: bool
) -> tuple[EncoderConfig, dict[str, Tensor]]:
    family = settings["model_type"]
    for name, value in BERT_ONLY.items():
        if settings.get(name, value) != value:
            raise UserError(
                f"{folder / 'config.json'} has {name} {brief(settings[name])}; fastbert reads BERTs with {value!r} only"
            )
    if family == "electra" and (size := settings.get("embedding_size", 128)) != config.width:
        raise UserError(
            f"{folder / 'config.json'} has embedding_size {brief(size)} and hidden_size {config.width}; fastbert reads "
            "ELECTRAs in which the two are equal (base and large, not small)"
        )
    found = {_modern(name, family): tensor for name, tensor in tensors.items()}
    found = {name: tensor for name, tensor in found.items() if name.removeprefix(f"{family}.") not in _BERT_BUFFERS}
    if untyped:
        found.pop(f"{family}.embeddings.token_type_embeddings.weight", None)
        config = replace(config, type_vocab_size=0)
    decoder = found.pop("cls.predictions.decoder.weight", None)
    if "cls.predictions.decoder.bias" in found:
        found["cls.predictions.bias"] = found.pop("cls.predictions.decoder.bias")
    heads = {"cls.predictions.": "mlm", "discriminator_predictions.": "replaced"}
    head = next((head for prefix, head in heads.items() if any(name.startswith(prefix) for name in found)), None)
    names = bert_names(config, types=not untyped, head=head, family=family)
    expected = {theirs for group in names.values() for theirs in group}
    if missing := sorted(expected - found.keys()):
        raise UserError(f"the weights in {folder} lack {abbreviated(missing)}")
    parts = (f"{family}.embeddings.", f"{family}.encoder.")
    rest = [name for name in found if name.startswith(parts) and name not in expected]
    if rest:
        raise UserError(
            f"the weights in {folder} contain {abbreviated(rest)}, which a BERT of this configuration lacks"
        )
    weights = {ours: joined(found, theirs, folder) for ours, theirs in names.items()}
    if head == "mlm" and decoder is not None:
        weights[TIED] = decoder
    return config, weights


def _modern(name: str, family: str) -> str:
    """Converts the name of a BERT's weight to that of transformers 5, from TensorFlow's gamma and beta and from models
    that were saved without a prefix."""
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    return f"{family}.{name}" if name.startswith(("embeddings.", "encoder.", "pooler.")) else name


# --- runs and their checkpoints


def _from_checkpoint(checkpoint: Checkpoint) -> Pretrained:
    path = checkpoint.path
    if not isinstance(checkpoint.state.get("encoder"), dict) or "model" not in checkpoint.tensors:
        raise UserError(f"the checkpoint {path} is not from a pretraining run; give the folder of such a run")
    try:
        config = EncoderConfig.from_dict(checkpoint.state["encoder"])
    except UserError as error:
        raise UserError(f"{path / 'state.json'}: {error}") from None
    check(checkpoint.state, _STATE, f"the checkpoint's state {path / 'state.json'}")
    tokenizer = path.parent.parent / "tokenizer"
    _check_tokenizer(tokenizer, checkpoint.state.get("tokenizer"), f"the checkpoint {path}")
    weights = exported_weights(checkpoint.tensors["model"])
    objective = checkpoint.state.get("objective")
    unit = " (nats)" if objective in (None, "mlm") else ""  # else a weighted sum of several losses
    of = f" of {checkpoint.metric_of}" if checkpoint.metric_of not in (None, NEW) else ""
    facts = {
        "objective": objective,
        "steps": checkpoint.step,
        "tokens": checkpoint.state.get("progress", {}).get("tokens"),
        f"validation loss{of}{unit}": checkpoint.metric,
        **_recipe(checkpoint.state.get("science", {})),
    }
    known = {name: value for name, value in facts.items() if value is not None}
    pretrained = _pretrained(config, weights, tokenizer, f"the checkpoint {path}", known)
    return replace(pretrained, science=checkpoint.state.get("science", {}))


def _recipe(science: dict[str, Any]) -> dict[str, str]:
    """Rows of the model card, from the options that were saved with the checkpoint."""
    lines = {
        "batch": "{batch_size} sequences of {length} tokens",
        "optimizer": "{optimizer_name}, learning rate {optimizer_learning_rate:g}, weight decay "
        "{optimizer_weight_decay:g}, betas {optimizer_beta1:g} and {optimizer_beta2:g}",
        "schedule": "{schedule_name}, warm-up {schedule_warmup:g}",
        "seed": "{seed}",
        "data (fingerprint of its tokens)": "{data}",
    }
    values = {name.replace(".", "_"): value for name, value in science.items()}
    found = {}
    for name, line in lines.items():
        try:
            found[name] = line.format(**values)
        except KeyError:
            continue  # written by an older version without this option
    return found


def _pretrained(
    config: EncoderConfig,
    weights: dict[str, Tensor],
    tokenizer: Path,
    source: str,
    facts: dict[str, Any] | None = None,
) -> Pretrained:
    check_weights(config, weights, source)
    if head_of(weights) == "mlm":
        weights[TIED] = weights["encoder.words.weight"]
    return Pretrained(config, weights, tokenizer, source, facts or {})
