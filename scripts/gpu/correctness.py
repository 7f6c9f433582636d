"""Steps of scripts/gpu/measure.py that check results: the device's random bits, errors compared with float64 on the
CPU, and training steps that repeat to the bit and never wait for the device."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastbert_kernels import keep_mask
from torch import Tensor, nn
from work import NEEDS_CUDA, Work

from fastbert.pretraining.loop import load_weights
from fastbert.randomness import row_keys
from fastbert.training.checkpoints import Checkpoint, read_checkpoint
from fastbert.training.hardware import autocast
from fastbert.training.interrupts import Interrupts
from fastbert.training.logbook import read_metrics
from fastbert.training.optimizer_state import flatten_optimizer

COMPARED = {"layers": 2, "width": 256, "batch_size": 4, "initializer_std": 0.06}  # attention far from uniform
TRAINED = {"layers": 4, "width": 256, "length": 128, "batch_size": 64, "machine": {"micro_batch_size": 32}}
BATCHES = 6


def bits(work: Work) -> None:
    """Random numbers of the device, compared with those of the CPU."""
    work.attempt(same_bits, aspect="random bits as on the CPU")


def encoders(work: Work, position: str) -> None:
    """Relative errors of norms, compared with float64 on the CPU, with the same hash dropout. Rule: the errors of
    hidden states, losses at the masked positions and each gradient are at most twice those of plain PyTorch
    ("reference") on this device, plus 1e-5; `worst` is the value nearest to that bound or furthest above it."""
    for case, options, compiled in encoder_cases(position):
        work.attempt(accuracy, options, compiled, aspect="accuracy", case=case)


def encoder_cases(position: str) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Name, options, and whether the blocks are compiled (on a GPU)."""
    for case, length in (("plain", 128), ("packed", 100), ("packed, dropout", 111)):
        for norm in ("post", "pre"):
            options = {"position": position, "norm": norm, "document_mask": "packed" in case, "length": length}
            yield f"{case}, {position}, {norm}", {**options, "dropout": 0.1 * ("dropout" in case)}, False
    if position in ("absolute", "tupe-r"):
        options = {"position": position, "norm": "pre", "length": 111, "dropout": 0.1}
        yield f"compiled, dropout, {position}, pre", options, True


def training(work: Work, position: str, dropout: str) -> None:
    """Training steps: a skipped update, no waiting for the device, and repetition to the bit."""
    for packed in (True,) if work.toy else (False, True):
        options = trained_options(position, float(dropout), packed, work.cuda)
        compiled = ", compiled" if options["machine"]["compile"] == "on" else ""
        case = f"{'packed, whole words' if packed else 'plain'}, {position}, dropout {dropout}, {work.precision}"
        work.attempt(steps, options, aspect="steps", case=case + compiled)
        work.attempt(repeats, options, aspect="repeats", case=case + compiled)


def trained_options(position: str, dropout: float, packed: bool, cuda: bool) -> dict[str, Any]:
    compiled = "on" if cuda and position == "tupe-r" and dropout > 0 else "off"
    options = {"position": position, "document_mask": packed, "mlm": {"whole_word": packed}, "dropout": dropout}
    return TRAINED | options | {"machine": {**TRAINED["machine"], "compile": compiled}}


def differing(a: dict[str, Any], b: dict[str, Any]) -> str:
    """Result of a row: "holds" if both have the same numbers under the same names."""
    wide = [{name: torch.as_tensor(value).cpu() for name, value in values.items()} for values in (a, b)]
    found = [name for name in a | b if not all(name in x for x in wide) or not torch.equal(*(x[name] for x in wide))]
    return f"fails: {len(found)} of {len(a)} differ: {', '.join(found[:8])}" if found else "holds"


def same_bits(work: Work) -> Iterator[dict[str, Any]]:
    """Random numbers of the device, compared with those of the CPU."""
    found = []
    for device in ("cpu", str(work.device)):
        keys = row_keys(7, "dropout", 123, torch.arange(256, device=device))
        out = {"row_keys": keys, "keep_mask": keep_mask(keys, 1000, 0.1)}
        for name, whole_word in (("pieces", False), ("words", True)):
            setup = work.setup({**COMPARED, "mlm": {"whole_word": whole_word}}, device)
            batch = setup.rows("train").read(np.arange(64), np.arange(64), setup.device)
            inputs = setup.objective().train().sample(batch, 7, 123)
            # The order of unused positions is undefined: labels of all tokens are compared, 0 for tokens without one.
            labels = torch.zeros_like(inputs.input_ids).scatter_add(1, inputs.positions, inputs.targets.clamp(min=0))
            out |= {f"{name} shown": inputs.input_ids, f"{name} labels": labels, f"{name} keys": inputs.dropout_keys}
        found.append(out)
    yield {"case": ", ".join(found[0]), "result": differing(*found) if work.cuda else NEEDS_CUDA}


def accuracy(work: Work, options: dict[str, Any], compiled: bool = False) -> Iterator[dict[str, Any]]:
    """Checks the rule for one encoder, in both precisions; with `compiled`, on a GPU, only fastbert's side is
    compiled."""
    plain = {"kernels": "reference", "compile": "off"}
    ours = {"kernels": "auto", "compile": "on" if compiled and work.cuda else "off"}
    true = outcome(work, options, "cpu", "fp32", plain, torch.float64)
    for precision in ("fp32", "bf16"):
        here = (work, options, str(work.device), precision)
        found = [outcome(*here, machine, torch.float32) for machine in (ours, plain)]
        mine, other = ({name: float((x[name] - t).norm() / t.norm()) for name, t in true.items()} for x in found)
        ratio = {name: float(np.nan_to_num(mine[name] / (2 * other[name] + 1e-5), nan=np.inf)) for name in true}
        worst = max(ratio, key=ratio.__getitem__)
        row = {"precision": precision, "hidden": mine["hidden"], "losses": mine["losses"], "worst": worst}
        row |= {"its error": mine[worst], "plain's": other[worst], "of the bound": ratio[worst]}
        yield {**row, "result": "holds" if ratio[worst] <= 1 else "fails: over the bound"}


def outcome(work: Work, options: dict, device: str, precision: str, machine: dict, dtype: torch.dtype) -> dict:
    """Hidden states, losses and gradients of 6 batches, concatenated, in float64 on the CPU."""
    setup = work.setup({**COMPARED, **options, "machine": machine}, device, precision)
    objective, rows, found, values = setup.objective().train(), np.arange(setup.options.batch_size), {}, {}
    objective.to(dtype).encoder.register_forward_hook(lambda module, given, out: values.update(hidden=out))
    for step in range(2 if work.toy else BATCHES):
        inputs = objective.sample(setup.rows("train").read(rows + step * len(rows), rows, setup.device), 0, step)
        with autocast(setup.device, precision):
            logits, loss = objective.logits(inputs), objective(inputs)["mlm"] / inputs.counts["mlm"]
        loss.backward()
        values["losses"] = nn.functional.cross_entropy(logits.double(), inputs.targets.flatten(), reduction="none")
        for name, value in (values | {name: p.grad for name, p in objective.named_parameters()}).items():
            found.setdefault(name, []).append(value.detach().double().cpu().flatten())
        objective.zero_grad()
    return {name: torch.cat(values) for name, values in found.items()}


def steps(work: Work, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Steps of the trainer: the third of four has an infinite loss; five more run in CUDA's debug mode that raises an
    error if the host synchronizes."""
    trainer = work.trainer(work.setup(options), 1000, log_every=1000)
    forward, states = trainer.objective.forward, []
    for step, factor in enumerate((1.0, 1.0, np.inf, 1.0)):
        trainer.objective.forward = lambda inputs, f=factor: {
            name: f * value for name, value in forward(inputs).items()
        }
        trainer.train_step(step)
        tensors = dict(trainer.objective.named_parameters()) | flatten_optimizer(trainer.optimizer)[0]
        states.append({name: value.detach().clone() for name, value in tensors.items()})
    others = "holds" not in (differing(*states[:2]), differing(*states[2:]))
    yield {"part": "skipped update", "result": differing(*states[1:3]) if others else "fails: no update does anything"}
    alarm = torch.cuda.set_sync_debug_mode if work.cuda else str
    try:
        alarm("error")
        for step in range(4, 9):
            trainer.train_step(step)
    finally:
        alarm("default")
    yield {"part": "no step waits", "result": "holds" if work.cuda else NEEDS_CUDA}


def repeats(work: Work, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Repeats one step (without clipping, which would spread a difference), ten steps, and five steps from a
    checkpoint."""

    def run(steps: int, options: dict[str, Any], checkpoint: Checkpoint | None = None) -> tuple[Path, dict[str, Any]]:
        trainer = work.trainer(work.setup(options), steps, log_every=1)
        if checkpoint:
            load_weights(trainer.objective, checkpoint)
            trainer.restore(checkpoint)
        with trainer.logbook:
            trainer.run(Interrupts())
        found = {f"{g} {k}": v for g, x in trainer.checkpointer.load_latest().tensors.items() for k, v in x.items()}
        rows = [row for row in read_metrics(trainer.logbook.path) if row["split"] == "train"]
        found |= {f"{k} {row['step']}": np.float64(row[k]) for row in rows for k in ("loss", "grad_norm")}
        return trainer.checkpointer.paths()[0], found

    bare = options | {"optimizer": {"clip_norm": 0.0}}
    yield {"part": "one step", "result": differing(run(1, bare)[1], run(1, bare)[1])}
    halfway, first = run(10, options)
    yield {"part": "ten steps", "result": differing(first, run(10, options)[1])}
    late = {k: v for k, v in first.items() if isinstance(v, Tensor) or int(k.split()[1]) > 5}
    yield {"part": "resumed at 5", "result": differing(late, run(10, options, read_checkpoint(halfway))[1])}
