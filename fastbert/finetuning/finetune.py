"""`fastbert finetune`: one task, several seeds, perhaps several shares of its training split; results that add up.

out/config.yaml         the options, complete
out/manifest.json       what the experiment is: options, model, data
out/results.json        every seed's metrics at its best and last epoch, and their summary
out/learning_curve.png  where several shares are trained on
out/seed-0/             config.yaml, metrics.jsonl, tensorboard/, errors.jsonl, model/, result.json (written last)
out/fraction-0.1/seed-0/    the same for a share below the whole
"""

import hashlib
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastbert import config as configuration
from fastbert.data.tokenizer import WordPiece
from fastbert.errors import LINE, UserError
from fastbert.files import LOCK, atomic_file, contents, disk_errors, locked_folder, remove
from fastbert.finetuning.batches import subset
from fastbert.finetuning.loop import ADVICE, Tuner
from fastbert.finetuning.metrics import check_scorable, compute
from fastbert.finetuning.model import (
    Classifier,
    TaskRecord,
    fine_tuned_folder,
    load_encoder,
    new_classifier,
    save_classifier,
)
from fastbert.finetuning.options import FinetuneOptions, science
from fastbert.finetuning.predict import BATCH, Inputs, answer, encode_inputs, predict_scores
from fastbert.finetuning.results import Figures, finished, seed_folder, tuned_folder, write_results
from fastbert.finetuning.tasks import Example, Task, open_task
from fastbert.hub.load import Pretrained, tokenizer_of
from fastbert.outputs import check_output_folder
from fastbert.records import finite_or_none, json_text, read_sealed, write_sealed
from fastbert.streams import say
from fastbert.training.apex import check_apex, fused_adam
from fastbert.training.finite import all_finite
from fastbert.training.hardware import describe_machine, resolve_device, resolve_precision, setup_machine
from fastbert.training.interrupts import Interrupts
from fastbert.training.logbook import Logbook
from fastbert.training.optimizers import implementation
from fastbert.training.schedules import learning_rate_factor


@dataclass
class Setup:
    """What all seeds share."""

    options: FinetuneOptions
    task: Task
    pretrained: Pretrained
    vocabulary: WordPiece
    train: list[Example]
    dev: dict[str, Inputs]
    device: torch.device
    precision: str
    notes: list[str]
    """What the user should know before it starts."""

    @property
    def numbers(self) -> bool:
        return self.task.kind == "number"


def task_record(options: FinetuneOptions, task: Task, seed: int, dev: Figures) -> TaskRecord:
    return TaskRecord(
        task=task.name,
        kind=task.kind,
        labels=tuple(task.labels),
        is_pair=task.is_pair,
        both_orders=options.symmetric,
        max_length=options.max_length,
        seed=seed,
        dev=dev,
    )


def finetune(asked: FinetuneOptions) -> int:
    """Trains every seed that is not finished yet, writes and prints the results; returns the exit code.

    Raises:
        UserError: anything the user can mend, before training starts if it can be seen then.
    """
    asked.check_inputs()
    check_output_folder(asked.out)
    check_others(Path(asked.out))
    setup = prepare_setup(asked)
    for note in setup.notes:
        say(note)
    out = Path(asked.out)
    results: dict[float, list[dict[str, Any]]] = {}
    with locked_folder(out), Interrupts() as interrupts:
        open_folder(out, setup)
        for fraction in setup.options.fractions():
            results[fraction] = []
            for seed in range(asked.first_seed, asked.first_seed + asked.seeds):
                folder = seed_folder(out, fraction, seed)
                result = finished(folder, setup.task.metrics)
                if result is None:
                    result = train_seed(setup, folder, fraction, seed, interrupts)
                if result is None:
                    say(f"stopped; the same command continues with {folder}")
                    return interrupts.exit_code
                results[fraction].append(result)
        write_results(setup.options, setup.task, setup.precision, out, results)
    return 0


def open_encoder(asked: FinetuneOptions) -> Pretrained:
    """The encoder to start from.

    Raises:
        UserError: there is none, or --init-from names no fine-tuned model.
    """
    if asked.init_from is None:
        return load_encoder(asked.model)
    folder = tuned_folder(Path(asked.init_from))
    if fine_tuned_folder(folder) is None:
        raise UserError(
            f"{folder} holds no fine-tuned model; give the folder of a seed of fastbert finetune, or its --out, with "
            "--init-from, and a pretrained encoder with --model"
        )
    return load_encoder(folder)


def prepare_setup(asked: FinetuneOptions) -> Setup:
    """Machine, model, task and texts; everything that can be refused is refused here."""
    device = resolve_device(asked.machine.device)
    precision, warning = resolve_precision(asked.machine.precision, device)
    if asked.machine.apex:
        check_apex("adamw", device)
    setup_machine(asked.machine, device)
    task = open_task(asked.task, glue_dir=asked.glue_dir, own=asked.own, glue_subset=asked.glue_subset)
    if "train" not in task.splits or not task.dev_splits:
        lacking = "train" if "train" not in task.splits else "dev"
        raise UserError(
            f"the task {task.name} has no {lacking} split; fine-tuning needs one to train on and one for dev: of a "
            f"custom task, --own.{lacking}"
        )
    pretrained = open_encoder(asked)
    vocabulary = tokenizer_of(pretrained)
    options = asked.resolved(task, pretrained.config.max_positions)
    record = task_record(options, task, 0, {})
    train = task.examples("train")
    dev = {split: encode_inputs(task.examples(split), vocabulary, record) for split in task.dev_splits}
    for inputs in dev.values():
        check_scorable(task, [example.label for example in inputs.examples])
    for fraction in options.fractions():  # refuses a warm-up longer than the training
        learning_rate_factor(options.schedule, 0, options.steps(len(subset(len(train), fraction))))
    notes = [*([warning] if warning else []), *task.notes]
    if len(vocabulary.tokens) < pretrained.config.vocab_size:
        notes.append(
            f"the tokenizer in {pretrained.tokenizer} has {len(vocabulary.tokens)} tokens and {asked.start} "
            f"{pretrained.config.vocab_size}: is it the one the model was trained with?"
        )
    return Setup(options, task, pretrained, vocabulary, train, dev, device, precision, notes)


# --- the folder


def describe_experiment(setup: Setup) -> dict[str, Any]:
    """What the results depend on, by name."""
    return {
        **science(setup.options),
        "labels": list(setup.task.labels),
        "metrics": list(setup.task.metrics),
        "model": fingerprint_of_weights(setup.pretrained),
        "tokenizer": setup.vocabulary.fingerprint[:8],
        "data": configuration.digest(
            {
                split: [[e.text, e.pair, e.label] for e in examples]
                for split, examples in (("train", setup.train), *((s, i.examples) for s, i in setup.dev.items()))
            }
        ),
    }


def check_folder(out: Path, setup: Setup, experiment: dict[str, Any]) -> None:
    """Sees to it that results of `experiment`, which is that of `setup`, may go to `out`, which is there.

    Raises:
        UserError: it holds another experiment, or something else; the result of a finished seed in it is damaged.
    """
    manifest_path = out / "manifest.json"
    if manifest_path.is_file():
        manifest = read_sealed(manifest_path, "the manifest", {"science": dict}, "restore it, or choose another --out")
        changed = configuration.differences(manifest["science"], experiment)
        if changed:
            lines = LINE.join(changed)
            raise UserError(
                f"{out} holds the results of another experiment. What differs:{LINE}{lines}{LINE}"
                "Give the same options to continue it, or choose another --out"
            )
    check_others(out)
    options = setup.options
    for fraction in options.fractions():
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            finished(seed_folder(out, fraction, seed), setup.task.metrics)


def check_others(out: Path) -> None:
    """Raises a UserError if `out` holds what no fine-tuning wrote. It may have been killed before its manifest: then
    the options are there, and the lock; so this is called before there is one, too."""
    if not out.is_dir() or (out / "manifest.json").is_file():
        return
    if contents(out) - ({"config.yaml"} if (out / LOCK).is_file() else set()):
        raise UserError(f"{out} is not empty and holds no results of fastbert finetune; choose another --out")


def open_folder(out: Path, setup: Setup) -> None:
    """Writes what the experiment is, if `out` may take it (see `check_folder`)."""
    experiment = describe_experiment(setup)
    check_folder(out, setup, experiment)
    write_options(out, setup.options)
    manifest = {
        "experiment": configuration.digest(experiment),
        "science": experiment,
        "model": setup.pretrained.source,
        "machine": describe_machine(),
        "resolved": {
            "device": str(setup.device),
            "precision": setup.precision,
            "threads": torch.get_num_threads(),
            "optimizer": implementation(fused_adam() if setup.options.machine.apex else torch.optim.AdamW),
        },
    }
    write_sealed(out / "manifest.json", manifest)


def write_options(folder: Path, options: FinetuneOptions) -> None:
    with atomic_file(folder / "config.yaml", "w") as file:
        file.write(configuration.to_yaml(options))


def fingerprint_of_weights(pretrained: Pretrained) -> str:
    """Eight hexadecimal digits that name the encoder, wherever it lies."""
    digest = hashlib.sha256(json.dumps(pretrained.config.to_dict(), sort_keys=True).encode())
    for name in sorted(pretrained.weights):
        if name.startswith("encoder."):
            digest.update(name.encode())
            digest.update(pretrained.weights[name].contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:8]


# --- one seed


def train_seed(setup: Setup, folder: Path, fraction: float, seed: int, interrupts: Interrupts) -> dict[str, Any] | None:
    """Trains one seed into its folder and returns its result; None if a signal ended it."""
    options = setup.options
    with disk_errors(folder):
        remove(folder)  # what an unfinished seed left
        folder.mkdir(parents=True)
    own = replace(options, seeds=1, first_seed=seed, train_fraction=str(fraction), out=str(folder))
    write_options(folder, own)
    examples = [setup.train[row] for row in subset(len(setup.train), fraction)]
    data = encode_inputs(examples, setup.vocabulary, task_record(options, setup.task, seed, {}))
    model = new_classifier(
        setup.pretrained,
        1 if setup.numbers else len(setup.task.labels),
        seed,
        dropout=options.dropout,
        attention_dropout=options.attention_dropout,
        kernels=options.machine.kernels,
    ).to(setup.device)
    steps = options.steps(len(examples))
    say(f"{setup.task.name}, seed {seed}: {len(examples)} examples, {steps} steps; {setup.device} {setup.precision}")
    with Logbook(folder, steps) as logbook:
        epochs = Epochs(setup, model, folder, seed, logbook)
        tuner = Tuner(
            model=model,
            orders=data.orders,
            options=options,
            seed=seed,
            device=setup.device,
            precision=setup.precision,
            logbook=logbook,
            after_epoch=epochs.measure,
        )
        if not tuner.run(interrupts):
            return None
    if not epochs.best:
        raise UserError(
            f"{setup.task.name}, seed {seed}: training diverged, in none of {options.epochs} epochs were weights and "
            f"scores on dev finite{ADVICE}"
        )
    write_errors(folder / "errors.jsonl", setup, epochs.best_scores)
    result = {
        "seed": seed,
        "best": epochs.best,
        "last": epochs.last,
        "train_examples": len(examples),
        "truncated": {"train": data.truncated, **{split: inputs.truncated for split, inputs in setup.dev.items()}},
        "skipped_updates": tuner.skipped,
        "examples_per_second": round(len(examples) * options.epochs / tuner.seconds, 1),
        "model": str(folder / "model") if options.save_model else None,
    }
    write_sealed(folder / "result.json", result)
    return result


@dataclass
class Epochs:
    """What is known after each epoch of a seed, and the best of them kept."""

    setup: Setup
    model: Classifier
    folder: Path
    seed: int
    logbook: Logbook
    best: dict[str, Any] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)
    best_scores: dict[str, np.ndarray] = field(default_factory=dict)

    def measure(self, epoch: int, step: int) -> None:
        """Scores dev, logs it, and keeps the model if it is the best so far. An epoch whose weights, scores or metrics
        are not finite is no candidate."""
        setup, scores, figures = self.setup, {}, {}
        finite = bool(all_finite(self.model.state_dict().values()))
        batch_size = setup.options.machine.micro_batch_size or BATCH
        for split, inputs in setup.dev.items():
            scores[split] = predict_scores(
                self.model, inputs, numbers=setup.numbers, precision=setup.precision, batch_size=batch_size
            )
            figures[split] = dev_figures(setup.task, scores[split], inputs.examples)
            finite = finite and None not in figures[split].values()
            self.logbook.log(step, split, {**figures[split], "epoch": epoch})
        self.last = {"epoch": epoch, "dev": figures}
        if not finite:
            self.logbook.say(f"epoch {epoch}: weights or scores on dev are not finite; it does not count as best")
        elif not self.best or value_of(setup.task, figures) > value_of(setup.task, self.best["dev"]):
            self.best, self.best_scores = self.last, scores
            if setup.options.save_model:
                record = task_record(setup.options, setup.task, self.seed, figures)
                save_classifier(self.model, record, setup.pretrained.tokenizer, self.folder / "model")


def dev_figures(task: Task, scores: np.ndarray, examples: Sequence[Example]) -> dict[str, float | None]:
    """The task's metrics, and the mean loss; None for what is not finite, and for all where a score is not."""
    if not np.isfinite(scores).all():
        return dict.fromkeys((*task.metrics, "loss"))
    labels = np.array([example.label for example in examples])
    return finite_or_none({**compute(task, scores, labels), "loss": float(dev_losses(scores, labels).mean())})


def dev_losses(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """float64 [N]: what training would lose, from probabilities [N, L] or numbers [N]."""
    if scores.ndim == 1:
        return (scores - labels) ** 2
    return -np.log(np.maximum(scores[np.arange(len(labels)), labels], np.finfo(np.float64).tiny))


def value_of(task: Task, figures: Figures) -> float:
    """What decides which epoch is best: the first metric, the mean of the dev splits."""
    return statistics.fmean(split[task.metrics[0]] for split in figures.values())


def write_errors(path: Path, setup: Setup, scores: dict[str, np.ndarray]) -> None:
    """The dev examples with the highest loss in the best epoch, the worst first."""
    record = task_record(setup.options, setup.task, 0, {})
    rows = []
    for split, values in scores.items():
        examples = setup.dev[split].examples
        lost = dev_losses(values, np.array([example.label for example in examples]))
        rows += [
            (float(loss), split, example, value) for loss, example, value in zip(lost, examples, values, strict=True)
        ]
    rows.sort(key=lambda row: -row[0])
    with atomic_file(path, "w") as file:
        for loss, split, example, value in rows[: setup.options.worst]:
            label = example.label if setup.numbers else setup.task.labels[example.label]
            row = {"split": split, "index": example.index, "loss": round(loss, 4), "expected": label}
            row |= {**answer(value, record), "text": example.text}
            row |= {} if example.pair is None else {"pair": example.pair}
            file.write(json_text(row, ensure_ascii=False) + "\n")
