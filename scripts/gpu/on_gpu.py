"""Checks that need a GPU: correctness of results, speed of training steps, short pretrainings.

    PYTHONPATH=.:kernels python3 scripts/gpu/on_gpu.py --parts correctness --out $OUT --commit abc1234
    PYTHONPATH=.:kernels python3 scripts/gpu/on_gpu.py --parts throughput,composition --out $OUT --commit abc1234
    PYTHONPATH=.:kernels python3 scripts/gpu/on_gpu.py --parts pretrain --out $OUT --data data/wiki --minutes 6

Each part writes PART.json and PART.md after every result, so that an interrupted run has its results so far, and ends
within --seconds. `--toy` is a dry run on any machine; results that need the device are "not measured".
"""

import argparse
import faulthandler
import importlib.metadata
import itertools
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from fastbert_kernels import keep_mask
from on_gpu_part import NEEDS_CUDA, TOY, Part, table
from on_gpu_throughput import composition, throughput
from torch import Tensor, nn

from fastbert.config import from_dict, to_dict
from fastbert.data.shards import open_dataset
from fastbert.model.positions import POSITIONS
from fastbert.pretraining.loop import load_weights
from fastbert.pretraining.options import PretrainOptions
from fastbert.pretraining.pretrain import pretrain as pretrain_job
from fastbert.randomness import permute, row_keys
from fastbert.training.checkpoints import Checkpoint, read_checkpoint
from fastbert.training.hardware import autocast, describe_machine
from fastbert.training.interrupts import Interrupts
from fastbert.training.logbook import read_metrics
from fastbert.training.optimizer_state import flatten_optimizer

LONGEST, GRACE = 500, 30  # seconds of a part, and further seconds after which a part that hangs is killed
COMPARED = {"layers": 2, "width": 256, "batch_size": 4, "initializer_std": 0.06}  # attention far from uniform
TRAINED = {"layers": 4, "width": 256, "length": 128, "batch_size": 64, "machine": {"micro_batch_size": 32}}
VARIANTS = [{"position": "tupe-r"}, {"position": "absolute"}]


def correctness(part: Part) -> None:
    """Accuracy: relative errors of norms, compared with float64 on the CPU over 6 batches, with the same hash dropout.
    Rule: the errors of hidden states, losses at the masked positions and each gradient are at most twice those of plain
    PyTorch ("reference") on this device, plus 1e-5; `worst` is the value nearest to that bound or furthest above it."""
    part.attempt(same_bits, aspect="random bits as on the CPU")
    for case, length in (("plain", 128), ("packed", 100), ("packed, dropout", 111)):
        for position, norm in itertools.product(POSITIONS, ("post", "pre")):
            options = {"position": position, "norm": norm, "document_mask": "packed" in case, "length": length}
            options["dropout"] = 0.1 * ("dropout" in case)
            part.attempt(accuracy, options, aspect="accuracy", case=f"{case}, {position}, {norm}")
    for position in ("absolute", "tupe-r"):
        options = {"position": position, "norm": "pre", "length": 111, "dropout": 0.1}
        part.attempt(accuracy, options, True, aspect="accuracy", case=f"compiled, dropout, {position}, pre")
    for position, packed, dropout in itertools.product(("absolute", "tupe-r"), (False, True), (0.0, 0.1)):
        options = {"position": position, "document_mask": packed, "mlm": {"whole_word": packed}, "dropout": dropout}
        compiled = part.cuda and position == "tupe-r" and dropout > 0
        options["machine"] = {**TRAINED["machine"], "compile": "on" if compiled else "off"}
        case = f"{'packed, whole words' if packed else 'plain'}, {position}, dropout {dropout}, {part.precision}"
        case += ", compiled" if compiled else ""
        part.attempt(steps, options, aspect="steps", case=case)
        part.attempt(repeats, options, aspect="repeats", case=case)


def differing(a: dict[str, Any], b: dict[str, Any]) -> str:
    """Result of a row: "holds" if both have the same numbers under the same names."""
    wide = [{name: torch.as_tensor(value).cpu() for name, value in values.items()} for values in (a, b)]
    found = [name for name in a | b if not all(name in x for x in wide) or not torch.equal(*(x[name] for x in wide))]
    return f"fails: {len(found)} of {len(a)} differ: {', '.join(found[:8])}" if found else "holds"


def same_bits(part: Part) -> Iterator[dict[str, Any]]:
    """Random numbers of the device, compared with those of the CPU."""
    found = []
    for device in ("cpu", str(part.device)):
        keys = row_keys(7, "dropout", 123, torch.arange(256, device=device))
        order = permute(torch.arange(1009, device=device), 1009, 7, 3)
        out = {"row_keys": keys, "keep_mask": keep_mask(keys, 1000, 0.1), "permute": order}
        for name, whole_word in (("pieces", False), ("words", True)):
            setup = part.setup({**COMPARED, "mlm": {"whole_word": whole_word}}, device)
            batch = setup.rows("train").read(np.arange(64), np.arange(64), setup.device)
            inputs = setup.objective().train().sample(batch, 7, 123)
            # The order of unused positions is undefined: labels of all tokens are compared, 0 for tokens without one.
            labels = torch.zeros_like(inputs.input_ids).scatter_add(1, inputs.positions, inputs.targets.clamp(min=0))
            out |= {f"{name} shown": inputs.input_ids, f"{name} labels": labels, f"{name} keys": inputs.dropout_keys}
        found.append(out)
    yield {"case": ", ".join(found[0]), "result": differing(*found) if part.cuda else NEEDS_CUDA}


def accuracy(part: Part, options: dict[str, Any], compiled: bool = False) -> Iterator[dict[str, Any]]:
    """Checks the rule for one encoder, in both precisions; with `compiled`, on a GPU, only fastbert's side is
    compiled."""
    plain = {"kernels": "reference", "compile": "off"}
    ours = {"kernels": "auto", "compile": "on" if compiled and part.cuda else "off"}
    true = outcome(part, options, "cpu", "fp32", plain, torch.float64)
    for precision in ("fp32", "bf16"):
        here = (part, options, str(part.device), precision)
        found = [outcome(*here, machine, torch.float32) for machine in (ours, plain)]
        mine, other = ({name: float((x[name] - t).norm() / t.norm()) for name, t in true.items()} for x in found)
        ratio = {name: float(np.nan_to_num(mine[name] / (2 * other[name] + 1e-5), nan=np.inf)) for name in true}
        worst = max(ratio, key=ratio.__getitem__)
        row = {"precision": precision, "hidden": mine["hidden"], "losses": mine["losses"], "worst": worst}
        row |= {"its error": mine[worst], "plain's": other[worst], "of the bound": ratio[worst]}
        yield {**row, "result": "holds" if ratio[worst] <= 1 else "fails: over the bound"}


def outcome(part: Part, options: dict, device: str, precision: str, machine: dict, dtype: torch.dtype) -> dict:
    """Hidden states, losses and gradients of 6 batches, concatenated, in float64 on the CPU."""
    setup = part.setup({**COMPARED, **options, "machine": machine}, device, precision)
    objective, rows, found, values = setup.objective().train(), np.arange(setup.options.batch_size), {}, {}
    objective.to(dtype).encoder.register_forward_hook(lambda module, given, out: values.update(hidden=out))
    for step in range(2 if part.toy else 6):
        inputs = objective.sample(setup.rows("train").read(rows + step * len(rows), rows, setup.device), 0, step)
        with autocast(setup.device, precision):
            logits, loss = objective.logits(inputs), objective(inputs)["mlm"] / inputs.counts["mlm"]
        loss.backward()
        values["losses"] = nn.functional.cross_entropy(logits.double(), inputs.targets.flatten(), reduction="none")
        for name, value in (values | {name: p.grad for name, p in objective.named_parameters()}).items():
            found.setdefault(name, []).append(value.detach().double().cpu().flatten())
        objective.zero_grad()
    return {name: torch.cat(values) for name, values in found.items()}


def steps(part: Part, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Steps of the trainer: the third of four has an infinite loss; five more run in CUDA's debug mode that raises an
    error if the host synchronizes."""
    trainer = part.trainer(part.setup(TRAINED | options), 1000, log_every=1000)
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
    alarm = torch.cuda.set_sync_debug_mode if part.cuda else str
    try:
        alarm("error")
        for step in range(4, 9):
            trainer.train_step(step)
    finally:
        alarm("default")
    yield {"part": "no step waits", "result": "holds" if part.cuda else NEEDS_CUDA}


def repeats(part: Part, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Repeats one step (without clipping, which would spread a difference), ten steps, and five steps from a
    checkpoint."""

    def run(steps: int, options: dict[str, Any], checkpoint: Checkpoint | None = None) -> tuple[Path, dict[str, Any]]:
        trainer = part.trainer(part.setup(TRAINED | options), steps, log_every=1)
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


def pretrain(part: Part) -> None:
    """Pretrainings on the same data, each with the same fraction of --minutes; held-out losses."""
    args = part.args
    for variant in args.variants if args.data else ():
        values = {"data": args.data, "minutes": args.minutes / len(args.variants), **args.options, **variant}
        options = from_dict(PretrainOptions, values | (TOY if part.toy else {}), "--options, --variants")
        part.attempt(run_job, options, variant=str(variant))
    if not args.data:
        part.add(result="not measured: no --data")


def run_job(part: Part, options: PretrainOptions) -> Iterator[dict[str, Any]]:
    """One pretraining with its curves, also if it is interrupted."""
    folder, result, start = next(part.folders), "measured", time.monotonic()
    try:
        pretrain_job(replace(options, out=str(folder)), "on_gpu")
    except KeyboardInterrupt:
        result = "stopped: time was up"
    except ImportError as error:  # at the end of a run, for the plot of the curves
        result = f"measured, but without a report: {error}"
    rows = read_metrics(folder / "metrics.jsonl")
    curve, training = ([row for row in rows if row["split"] == split] for split in ("validation", "train"))
    row = {"steps": rows[-1]["step"] if rows else 0, "seconds": time.monotonic() - start}
    row |= {f"validation {name}": curve[-1][name] for name in ("loss", "accuracy") if curve}
    row["unigram entropy"] = open_dataset(options.data).split("validation").unigram_entropy
    row |= {name: float(np.median([r[name] for r in training])) for name in ("tokens_per_second", "mfu") if training}
    yield {**row, "curve": curve, "training": training, "options": to_dict(options), "result": result}


def main() -> int:
    works = {work.__name__: work for work in (correctness, throughput, composition, pretrain)}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", type=lambda names: [works[name] for name in names.split(",")], required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", help="commit of the code, where there is no git")
    parser.add_argument(
        "--seconds", type=lambda x: min(float(x), LONGEST), default=LONGEST, help="time limit of a part in seconds"
    )
    parser.add_argument("--toy", action="store_true", help="tiny sizes, on a CPU too")
    parser.add_argument("--data", help="pretrain: a prepared folder")
    parser.add_argument("--minutes", type=float, default=6.0, help="pretrain: minutes for all variants together")
    parser.add_argument("--options", type=yaml.safe_load, default={"size": "small"}, help="pretrain: as in its YAML")
    parser.add_argument("--variants", type=yaml.safe_load, nargs="+", default=VARIANTS, help="as --options")
    args = parser.parse_args()
    if not args.toy and not torch.cuda.is_available():
        parser.error("there is no GPU; --toy is a dry run on the CPU")
    parts, machine = [], describe_machine()
    machine["versions"] |= {d.name: d.version for d in importlib.metadata.distributions() if d.name == "triton"}
    header = {"date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "command": shlex.join(sys.argv)}
    header |= {"commit": args.commit or machine["commit"], "toy": args.toy, "machine": machine}
    signal.signal(signal.SIGALRM, signal.default_int_handler)  # no Exception: compilers would catch it
    with tempfile.TemporaryDirectory() as folder:
        for work in args.parts:
            parts.append(part := Part(work, args, header, Path(folder)))
            faulthandler.dump_traceback_later(args.seconds + GRACE, exit=True)
            signal.setitimer(signal.ITIMER_REAL, args.seconds)
            part.attempt(work)
            signal.setitimer(signal.ITIMER_REAL, 0)
    for part in parts:
        others = [row for row in part.rows if row["result"] != "holds"]
        print(f"\n{part.name}: {len(part.rows) - len(others)} of {len(part.rows)} hold; the others:\n\n{table(others)}")
    return int(any(row["result"].startswith(("fails", "error")) for part in parts for row in part.rows))


if __name__ == "__main__":
    sys.exit(main())
