"""Pretrains a BERT with transformers' Trainer and the data collator of its example run_mlm.py, by the recipe of a YAML
file of `fastbert pretrain`, so that both loops can train the same encoder on the same rows.

    SCRIPT=scripts/against_transformers/pretrain_with_trainer.py
    python $SCRIPT RECIPE.yaml --data data/wiki --steps 1000 --out runs/bert

--out receives config.yaml (the options), steps.jsonl (a line for each --log-every steps: step, loss, seconds of these
steps), an export for each of --milestones in step-N/, and the Trainer's checkpoints, of which the newest is continued
by the same command (not to the bit: the Trainer has sampled the masks of the next batch before it saves). Options that
the Trainer's example does not have are refused.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from fastbert.config import load_yaml, to_yaml
from fastbert.data.batches import PackedRows
from fastbert.data.shards import open_dataset
from fastbert.data.stages import make_plan
from fastbert.errors import UserError
from fastbert.files import atomic_file
from fastbert.flags import parse
from fastbert.hub.names import BERT_OPTIONS
from fastbert.model.config import EncoderConfig
from fastbert.pretraining.options import PretrainOptions
from fastbert.records import json_text
from fastbert.training.hardware import resolve_device, resolve_precision

SPECIAL = ("cls", "sep", "pad", "mask", "unk")


class Numbers(Dataset):
    """Numbers of the training rows, which the collator reads."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


class Collator(TrainerCallback):
    """Reads the rows of `fastbert pretrain` and masks them by the collator of run_mlm.py.

    In the stage of short sequences, row i of the final length stands for the rows k i ... k i + k - 1 that are k times
    shorter, so the Trainer's batches are the recipe's.
    """

    def __init__(self, options: PretrainOptions, rows: dict[int, PackedRows], masks: Callable) -> None:
        self.plan = make_plan(options.stages, options.batch_size, options.length, options.steps)
        self.micro_batches = options.batch_size // min(options.micro_batch_size, options.batch_size)
        self.options, self.rows, self.masks, self.calls = options, rows, masks, 0

    def on_train_begin(self, args, state, control, **more) -> None:
        self.calls = state.global_step * self.micro_batches

    def __call__(self, numbers: list[int]) -> dict[str, torch.Tensor]:
        length = self.plan.at(self.calls // self.micro_batches).length
        self.calls += 1
        times = self.options.length // length
        short = np.add.outer(times * np.array(numbers), np.arange(times)).flatten() % len(self.rows[length])
        batch = self.rows[length].on_host(short, short)
        return self.masks([{"input_ids": row} for row in batch.input_ids])


class Clock(TrainerCallback):
    """Times the steps, without saving and exporting, and exports at milestones."""

    def __init__(self, options: PretrainOptions, milestones: frozenset[int], out: Path) -> None:
        self.options, self.milestones, self.out = options, milestones, out
        self.seconds = self.start = self.loss = 0.0

    def on_step_begin(self, args, state, control, **more) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, model=None, processing_class=None, **more) -> None:
        self.seconds += time.perf_counter() - self.start
        if state.global_step in self.milestones:
            partial = self.out / f"step-{state.global_step}.partial"
            model.save_pretrained(partial)
            processing_class.save_pretrained(partial)
            os.replace(partial, self.out / f"step-{state.global_step}")

    def on_log(self, args, state, control, logs=None, **more) -> None:
        if "loss" in logs:
            line = {"step": state.global_step, "loss": logs["loss"], "seconds": self.seconds}
            with (self.out / "steps.jsonl").open("a", encoding="utf-8") as file:
                file.write(json_text(line) + "\n")
            self.seconds = 0.0


def refuse_other_recipes(options: PretrainOptions) -> None:
    """Raises a UserError for options that run_mlm.py does not have."""
    example = PretrainOptions(data=options.data)
    allowed = {
        "objective": "mlm",
        "encoder.position": "absolute",
        "encoder.norm": "post",
        "optimizer.name": "adamw",
        "schedule.name": "linear",
        "stages.first_offset": False,
        "stages.initial_batch_size": None,
        "mlm.whole_word": False,
        "notes.enabled": False,
        "replay.data": None,
        "init_from": None,
        "encoder.feed_forward": example.encoder.feed_forward,
        "encoder.bias": True,
        "document_mask": False,
    }
    for name, value in allowed.items():
        found = options
        for part in name.split("."):
            found = getattr(found, part)
        if found != value:
            raise UserError(f"{name} is {found}; with transformers' Trainer it has to be {value}")
    if options.steps is None:
        raise UserError("give --steps: the schedule needs the number of steps")
    if options.length % (first := options.stages.first_length or options.length):
        raise UserError(f"length {options.length} is no multiple of first_length {first}")
    if options.batch_size % (micro := min(options.micro_batch_size, options.batch_size)):
        raise UserError(f"batch_size {options.batch_size} is no multiple of micro_batch_size {micro}")


def model_of(config: EncoderConfig) -> BertForMaskedLM:
    shape = {theirs: getattr(config, ours) for ours, theirs in BERT_OPTIONS.items()}
    return BertForMaskedLM(BertConfig(**shape, hidden_act="gelu", attn_implementation="sdpa"))


def arguments_of(options: PretrainOptions, out: Path, precision: str) -> TrainingArguments:
    """The Trainer's arguments for the recipe; all others have their defaults."""
    micro = min(options.micro_batch_size, options.batch_size)
    warmup = options.schedule.warmup
    return TrainingArguments(
        str(out / "trainer"),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=options.batch_size // micro,
        max_steps=options.steps,
        learning_rate=options.optimizer.learning_rate,
        warmup_steps=int(warmup) if warmup >= 1 else warmup,
        lr_scheduler_type="linear",
        weight_decay=options.optimizer.weight_decay,
        adam_beta1=options.optimizer.beta1,
        adam_beta2=options.optimizer.beta2,
        adam_epsilon=options.optimizer.eps,
        max_grad_norm=options.optimizer.clip_norm,
        bf16=precision == "bf16",
        use_cpu=options.machine.device == "cpu" or not torch.cuda.is_available(),
        seed=options.seed,
        logging_steps=options.log_every,
        save_steps=options.checkpoint_every or max(1, options.steps // 10),
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        dataloader_drop_last=True,
        remove_unused_columns=False,
    )


def pretrain(options: PretrainOptions) -> None:
    refuse_other_recipes(options)
    if options.machine.threads:
        torch.set_num_threads(options.machine.threads)
    device = resolve_device(options.machine.device)
    precision, _ = resolve_precision(options.machine.precision, device)
    data = open_dataset(options.data)
    names = {f"{name}_token": f"[{name.upper()}]" for name in SPECIAL}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(data.tokenizer / "tokenizer.json"), **names)
    ids = data.wordpiece.ids
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    with atomic_file(out / "config.yaml") as file:
        file.write(to_yaml(options).encode())
    (out / "steps.jsonl").touch()
    milestones = options.milestone_steps() if options.milestones else frozenset()
    lengths = {options.length, options.stages.first_length or options.length}
    rows = {length: PackedRows(data.split("train"), length, ids["[CLS]"], ids["[SEP]"]) for length in lengths}
    masks = DataCollatorForLanguageModeling(tokenizer, mlm_probability=options.mlm.mask_rate)
    collator = Collator(options, rows, masks)
    set_seed(options.seed)
    trainer = Trainer(
        model=model_of(options.encoder.resolve(data.vocab_size, options.length)),
        args=arguments_of(options, out, precision),
        train_dataset=Numbers(len(rows[options.length])),
        data_collator=collator,
        processing_class=tokenizer,
        callbacks=[Clock(options, milestones | {options.steps}, out), collator],
    )
    begun = any((out / "trainer").glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=begun)


def main() -> None:
    words = sys.argv[1:]
    try:
        recipe = load_yaml(PretrainOptions, words.pop(0)) if words and not words[0].startswith("-") else None
        pretrain(parse(PretrainOptions, words, "pretrain", recipe))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
