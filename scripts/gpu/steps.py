"""A step of scripts/gpu/measure.py, in its own process: python steps.py [--toy] STEP ARGUMENT ...

Rows of the results are lines of standard output; everything else that is printed goes to the log.
"""

import argparse
import importlib.util
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import triton_cache
from correctness import bits, encoders, training
from fastbert_kernels import attention, linear_cross_entropy
from fastbert_kernels.backend import TRITON
from fastbert_kernels.benchmarks.measuring import Settings, ceilings
from throughput import throughput
from work import NEEDS_CUDA, STARTED, TOY, Work, emit, failure, wait_for_gpu

from fastbert.config import from_dict
from fastbert.data.shards import open_dataset
from fastbert.pretraining.options import PretrainOptions
from fastbert.pretraining.pretrain import pretrain as pretrain_job
from fastbert.records import parse_json
from fastbert.training.hardware import describe_machine
from fastbert.training.logbook import read_metrics

CASES = Path(__file__).resolve().parents[2] / "tests" / "kernels"
PRETRAINED = {
    **{"size": "base", "position": "tupe-r", "length": 128, "batch_size": 256, "log_every": 50},
    **{"machine": {"micro_batch_size": 256}, "optimizer": {"learning_rate": 5e-4}, "schedule": {"warmup": 0.1}},
    "checkpoint_every": 10**6,  # at the end only: each takes seconds
}
"""BERT-Base with TUPE-R on sequences of 128 tokens, without accumulation."""
CLOSING, REPORTING = 45.0, 8.0
"""Seconds of a pretraining's step for its start, last validation, checkpoint and export; and for its rows."""


def machine(work: Work) -> None:
    """Kernels of BERT-Base, launched once: how many were in Triton's cache. Then versions, and TFLOP/s of a product of
    random 8,192 x 8,192 matrices in bf16 and TB/s of a copy, counting both directions."""
    base_kernels(work.device, *((24,) if work.toy else (128, 512)))
    result = f"measured, {time.monotonic() - STARTED:.0f} s after the start" if work.cuda else NEEDS_CUDA
    emit(part="Triton's cache", **triton_cache.uses(), result=result)
    about = describe_machine()
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    device = ", ".join(about["gpus"]) or about["cpu"]
    emit(part="machine", device=device, versions=versions, cores=about["cores"], cuda=about["cuda"], result="measured")
    emit(part="ceilings", **ceilings(work.device, work.toy), result="measured" if work.cuda else NEEDS_CUDA)
    if work.cuda:
        free, total = torch.cuda.mem_get_info()
        emit(part="memory", free_gib=free / 2**30, total_gib=total / 2**30, result="measured")


def base_kernels(device: torch.device, *lengths: int) -> None:
    """Launch the kernels of a training step of BERT-Base, for 16 rows."""
    for length in lengths:
        shape, options = (16, length, 3, 12, 64), {"device": device, "dtype": torch.bfloat16}
        q, k, v = torch.zeros(shape, **options).requires_grad_().permute(2, 0, 3, 1, 4)
        bias = torch.zeros(1, 12, length, length, device=device, requires_grad=True)
        keys = torch.zeros(16, dtype=torch.int32, device=device)
        out = attention(q, k, v, bias, dropout_p=0.1, keys=keys)
        out.backward(torch.zeros_like(out))
    hidden, embedding = (torch.zeros(n, 64, **options).requires_grad_() for n in (16, 32768))
    target = torch.zeros(16, dtype=torch.int64, device=device)
    linear_cross_entropy(hidden, embedding, torch.zeros(32768, **options).requires_grad_(), target).backward()


def load_cases(name: str) -> ModuleType:
    """A file of the test suite's cases, such as "attention"; their import selects the device."""
    spec = importlib.util.spec_from_file_location(f"{name}_cases", CASES / name / f"{name}_cases.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cases(work: Work, name: str, *groups: str) -> None:
    """Cases of the test suite on this device, compared with float64 or, for samples, with the definition. Rules:
    errors are at most twice those of plain PyTorch in the same precision plus 1e-5; at most a tenth of the rows have
    other samples."""
    module = load_cases(name)
    module.print = lambda text, **_: emit(**judged(parse_json(text, name)))
    for group in groups:
        try:
            getattr(module, group)()
            emit(case=f"{name}, {group}", result="holds")
        except Exception as error:  # of any case: the other groups continue
            emit(case=f"{name}, {group}", **failure(error))


def judged(row: dict[str, Any]) -> dict[str, Any]:
    """The row of a case with its result; errors are reported relative to the bound."""
    if "errors" not in row:
        good = row["other"] <= 0.1 and row["error"] <= 2e-6  # NaN is not good either
        return {**row, "result": "holds" if good else "fails: other samples"}
    errors = row["errors"].values() if isinstance(row["errors"], dict) else row["errors"]
    worst = max(ours / (2 * plain + 1e-5) for ours, plain in errors)
    return {"case": row["case"], "of the bound": worst, "result": "holds" if worst <= 1 else "fails: over the bound"}


def peers(work: Work, length: str) -> None:
    """Attention with a learned bias, 65,536 tokens, 12 heads of 64, bf16: each contestant is compared with float64,
    then timed (median of 20 rounds with a cold L2 cache, with minimum and maximum)."""
    from fastbert_kernels.benchmarks.attention import bench

    def add(row: dict[str, Any]) -> None:
        times = {f"{key}, ms": row[key]["ms"] for key in ("forward", "backward", "both") if key in row}
        times |= {"TFLOP/s": row["both"]["tflops"]} if "tflops" in row.get("both", {}) else {}
        failed = row.get("failed", row.get("wrong"))
        result = "measured" if failed is None else f"not measured: {failed}"
        if failed is not None and row["contestant"].startswith("fastbert"):
            result = f"fails: {failed}"
        emit(contestant=row["contestant"], T=row["length"], **times, MiB=row.get("peak_mib"), result=result, row=row)

    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(Path(folder), rounds=2 if work.toy else 20, toy=work.toy, added=add)
        bench(settings, lengths=(32 if work.toy else int(length),), others=False, ready=wait_for_gpu)


def pretrain(work: Work, data: str, deadline: str) -> None:
    """A pretraining of BERT-Base with TUPE-R by minutes, with its validation losses."""
    if not data:
        emit(result="not measured: no --data")
        return
    folder, start = next(work.folders), time.monotonic()
    left = float(deadline) - time.time()
    minutes = max(0.02, (left - CLOSING) / 60) if not work.toy else 0.05
    values = {"data": data, "minutes": minutes, "out": str(folder), **PRETRAINED, **(TOY if work.toy else {})}
    values |= {"machine": {"micro_batch_size": 4}} if work.toy else {}
    options = from_dict(PretrainOptions, values, "scripts/gpu")
    result = "measured"
    signal.signal(signal.SIGALRM, signal.default_int_handler)  # no Exception: compilers would catch it
    signal.setitimer(signal.ITIMER_REAL, max(1.0, left - REPORTING))
    try:
        pretrain_job(options, "measure")
    except KeyboardInterrupt:
        result = "stopped: time was up"
    except ImportError as error:  # at the end of a run, for the plot of the curves
        result = f"measured, but without a report: {error}"
    signal.setitimer(signal.ITIMER_REAL, 0)
    rows = read_metrics(folder / "metrics.jsonl")
    curve, logged = ([row for row in rows if row["split"] == split] for split in ("validation", "train"))
    for row in curve:
        emit(step=row["step"], **{f"validation {name}": row.get(name) for name in ("loss", "accuracy")}, result=result)
    row = {"steps": rows[-1]["step"] if rows else 0, "seconds": time.monotonic() - start}
    row["unigram entropy"] = open_dataset(options.data).split("validation").unigram_entropy
    row |= {name: float(np.median([r[name] for r in logged])) for name in ("tokens_per_second", "mfu") if logged}
    emit(**row, curve=curve, training=logged, result=result)


STEPS: dict[str, Callable[..., None]] = {
    step.__name__: step for step in (machine, bits, cases, encoders, training, throughput, peers, pretrain)
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("arguments", nargs="*")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, on a CPU too")
    args = parser.parse_args()
    if not args.toy and not torch.cuda.is_available():
        parser.error("there is no GPU; --toy is a dry run on the CPU")
    if TRITON is not None:
        triton_cache.count_uses()
    step = STEPS[args.step]
    print(f"{args.step}: {platform.node()}, {step.__doc__}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        try:
            step(Work(args.toy, Path(folder)), *args.arguments)
        except Exception as error:  # the step's rows so far are results
            emit(**failure(error))
        finally:
            if triton_cache.USES:
                emit(part="kernels of this step", **triton_cache.uses(), result="measured")
    return 0


if __name__ == "__main__":
    sys.exit(main())
