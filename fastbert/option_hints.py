"""Names of options in other programs (transformers' Trainer and its example scripts, nanochat) and in earlier versions,
with the corresponding flags, for the error message about an unknown option."""

import re
from collections.abc import Collection

_BATCH = ("batch-size", "machine.micro-batch-size")
_LENGTH = ("length", "max-length")
_MODEL = ("model", "init-from", "run", "models")
_OUT = ("out",)
_STEPS = ("steps",)
_TEXT = ("source", "data")
_WARMUP = ("schedule.warmup",)
_WORKERS = ("workers", "machine.workers")
_BUDGET = "the budget is --steps, --tokens or --minutes"
_ACCUMULATION = (
    "gradient accumulation follows from --batch-size (of an optimizer step) and --machine.micro-batch-size (of a "
    "forward pass)"
)
_JOBS = "fastbert pretrain and finetune train; evaluate and predict use the result"
_PROCESSES = "pretrain and finetune use several GPUs under torchrun (docs/gpus.md)"
_SHARDED = "several processes under torchrun divide the weights with --machine.shard blocks (FSDP2; docs/gpus.md)"
_METRICS = "metrics are written to metrics.jsonl and as TensorBoard events, below --out"

NAMES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("model-name-or-path", "model-name", "model-path", "checkpoint", "checkpoint-path"), _MODEL),
    **dict.fromkeys(("pretrained-model", "pretrained-model-name-or-path", "model", "from-pretrained"), _MODEL),
    **dict.fromkeys(("output-dir", "output", "output-file", "save-dir", "run-name", "model-tag"), _OUT),
    **dict.fromkeys(("input", "input-file", "corpus", "text-file", "files", "dataset-name", "dataset"), _TEXT),
    **dict.fromkeys(("data", "source", "data-path"), _TEXT),
    **dict.fromkeys(("train-file", "train-data", "train-path"), ("custom.train", *_TEXT)),
    **dict.fromkeys(("validation-file", "eval-file", "dev-file", "valid-file"), ("custom.dev", "source")),
    **dict.fromkeys(("test-file", "predict-file"), ("source", "custom.test")),
    "data-dir": ("glue-dir", *_TEXT),
    "task-name": ("task",),
    **dict.fromkeys(("text-column", "text-column-name", "text-field", "column"), ("column", "custom.text")),
    **dict.fromkeys(("label-column", "label-column-name"), ("custom.label",)),
    **dict.fromkeys(("num-train-epochs", "num-epochs", "max-epochs", "n-epochs"), ("epochs",)),
    **dict.fromkeys(("max-steps", "max-train-steps", "num-iterations", "iterations", "train-steps"), _STEPS),
    **dict.fromkeys(("train-batch-size", "per-device-train-batch-size", "per-gpu-train-batch-size"), _BATCH),
    **dict.fromkeys(("eval-batch-size", "per-device-eval-batch-size"), ("machine.micro-batch-size",)),
    **dict.fromkeys(("device-batch-size", "micro-batch", "mbs"), ("machine.micro-batch-size",)),
    **dict.fromkeys(("max-seq-length", "max-seq-len", "seq-len", "seq-length", "sequence-length"), _LENGTH),
    **dict.fromkeys(("block-size", "context-length", "max-length", "length"), _LENGTH),
    **dict.fromkeys(("warmup-ratio", "warmup-steps", "num-warmup-steps", "warmup-proportion"), _WARMUP),
    **dict.fromkeys(("lr-scheduler-type", "lr-scheduler", "scheduler"), ("schedule.name",)),
    **dict.fromkeys(("optim", "optimizer"), ("optimizer.name",)),
    **dict.fromkeys(("adam-epsilon", "adam-eps", "epsilon"), ("optimizer.eps", "eps")),
    "adam-beta1": ("optimizer.beta1",),
    "adam-beta2": ("optimizer.beta2", "beta2"),
    **dict.fromkeys(("max-grad-norm", "grad-clip", "gradient-clip-val"), ("optimizer.clip-norm", "clip-norm")),
    **dict.fromkeys(("mlm-probability", "masking-ratio", "mask-prob"), ("mlm.mask-rate", "mask-rate")),
    **dict.fromkeys(("logging-steps", "log-interval", "log-freq"), ("log-every",)),
    **dict.fromkeys(("save-steps", "save-interval", "save-every"), ("checkpoint-every",)),
    **dict.fromkeys(("eval-steps", "eval-interval"), ("eval-every",)),
    "save-total-limit": ("keep-checkpoints",),
    **dict.fromkeys(("resume-from-checkpoint", "resume-from"), ("resume",)),
    **dict.fromkeys(("tokenizer-name", "tokenizer-path", "vocab-file"), ("tokenizer",)),
    **dict.fromkeys(("do-lower-case", "uncased"), ("lowercase",)),
    **dict.fromkeys(("depth", "num-layers", "num-hidden-layers", "n-layer", "n-layers"), ("layers",)),
    **dict.fromkeys(("hidden-size", "hidden-dim", "d-model", "n-embd", "model-dim"), ("width",)),
    **dict.fromkeys(("num-attention-heads", "num-heads", "n-head", "n-heads"), ("heads",)),
    "intermediate-size": ("ffn",),
    **dict.fromkeys(("num-workers", "num-proc", "preprocessing-num-workers", "dataloader-num-workers"), _WORKERS),
    **dict.fromkeys(("no-cuda", "use-cpu", "cpu", "cuda", "gpu", "use-gpu"), ("machine.device",)),
    **dict.fromkeys(("fp16", "bf16", "fp32", "amp", "mixed-precision", "dtype"), ("machine.precision",)),
    "gradient-checkpointing": ("machine.activation-checkpointing",),
    "random-seed": ("seed", "first-seed"),
    **dict.fromkeys(("valid-split", "validation-split-percentage", "test-size"), ("validation-fraction",)),
}
"""Name in another program -> flags; the first flag that the job has is suggested."""

RENAMED: dict[str, tuple[str, ...]] = {
    "batch-start": ("initial-batch-size",),
    "cls": ("cls-attention",),
    "least": ("min-count",),
    "most": ("max-count",),
    "weight": ("mix", "loss-weight"),
}
"""Name in an earlier version -> present names; the first one in the same group is suggested."""

REMARKS: dict[str, str] = {
    **dict.fromkeys(("epochs", "num-train-epochs", "num-epochs", "max-epochs", "n-epochs"), _BUDGET),
    **dict.fromkeys(("gradient-accumulation-steps", "grad-accum", "grad-accum-steps"), _ACCUMULATION),
    **dict.fromkeys(("gpus", "num-gpus", "n-gpu", "n-gpus", "devices", "ngpus", "world-size"), _PROCESSES),
    **dict.fromkeys(("local-rank", "ddp", "nproc-per-node", "num-processes"), _PROCESSES),
    **dict.fromkeys(("deepspeed", "fsdp"), _SHARDED),
    **dict.fromkeys(("do-train", "do-eval", "do-predict"), _JOBS),
    **dict.fromkeys(("report-to", "wandb", "logging-dir", "wandb-project"), _METRICS),
    **dict.fromkeys(
        ("overwrite-output-dir", "overwrite", "force"), "nothing is overwritten: remove it or choose another --out"
    ),
    **dict.fromkeys(
        ("encoding", "input-encoding"), "text is UTF-8; for a file in another encoding an iconv command is printed"
    ),
    **dict.fromkeys(("delimiter", "sep", "separator"), "the delimiter of a .csv is recognized by its header"),
}
"""Name in another program -> advice, which is shown if the job has all flags in it."""


def hint_for(name: str, flags: Collection[str]) -> str:
    """Advice about an option of another program or version, as the end of a sentence; empty if it is unknown.

    Args:
        name: name without the leading dashes.
        flags: flags of the job, without dashes.
    """
    group, dot, last = name.rpartition(".")
    for own in (*equivalent_flags(name), *(f"{group}{dot}{own}" for own in equivalent_flags(last))):
        if own in flags:
            return f"did you mean --{own}?"
    remark = REMARKS.get(name.lower(), "")
    return remark if all(flag in flags for flag in re.findall(r"--([\w.-]+)", remark)) else ""


def equivalent_flags(name: str) -> tuple[str, ...]:
    """Possible flags for an option of another program or version, written with - or _; a job has only part of them."""
    name = name.lower().replace("_", "-")
    return NAMES.get(name) or RENAMED.get(name, ())
