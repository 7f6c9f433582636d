"""Parts of scripts/gpu/on_gpu.py: training steps compared with transformers' BERT in speed, and their parts."""

import gc
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from on_gpu_part import NEEDS_CUDA, Part, failure

from fastbert.bench.contestants import bert_steps
from fastbert.pretraining.profiling import profile_steps
from fastbert.pretraining.setup import PretrainSetup
from fastbert.training.hardware import peak_flops

SHAPES = (
    ("base", 128, (256, 1024, 64)),
    ("base", 512, (64, 256, 16)),
    ("large", 128, (128, 512, 32)),
    ("large", 512, (32, 128, 8)),
)
"""Preset, length, batch sizes: all shapes are measured with their first batch size, then with the second, ..."""
CONTESTANTS = ("fastbert absolute", "fastbert tupe-r", "eager", "compiled")
ROUNDS, RACE_SECONDS, COMPILE_SECONDS = 5, 40, 150  # no race or compilation begins with less time left


def throughput(part: Part) -> None:
    """Complete training steps on random text, without accumulation; contestants alternate, median of 5 rounds of a
    second. fastbert's step includes reading rows and sampling masks; eager and compiled are transformers'
    BertForMaskedLM (SDPA, torch's fused AdamW, clipping) on batches that are masked before. GiB: peak memory of the
    contestant. x: ratio of speed to that peer."""
    peak, how = peak_flops(part.device, part.precision)
    part.header["MFU"] = (
        f"products (the head's at masked positions) of {peak / 1e12:.4g} TFLOP/s {part.precision} ({how})"
    )
    for number, dropout, (size, length, batches) in itertools.product(range(3), (0.1, 0.0), SHAPES):
        options = {"size": size, "length": length, "batch_size": batches[number], "dropout": dropout}
        case = "toy" if part.toy else f"{size}, T {length}, batch {batches[number]}, dropout {dropout}"
        if not (part.toy and part.rows):
            part.attempt(race, options, CONTESTANTS[: 4 - (number > 0)], peak, case=case)


def race(part: Part, options: dict[str, Any], names: tuple[str, ...], peak: float) -> Iterator[dict[str, Any]]:
    """Measures one shape: fastbert's encoders and their peer, eager and compiled."""
    if time.monotonic() + (COMPILE_SECONDS if "compiled" in names else RACE_SECONDS) > part.deadline:
        raise KeyboardInterrupt
    ready, gib, flops, speeds = {}, {}, {}, {name: [] for name in names}
    for name in names:
        step = trainer = None  # frees the memory of a contestant that failed
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        setup = part.setup({**options, "position": "tupe-r" if "tupe-r" in name else "absolute"})
        size = setup.options.batch_size, setup.options.length
        try:
            if name.startswith("fastbert"):
                trainer = part.trainer(setup, 10**6, log_every=10**9)
                flops |= {name: trainer.objective.flops(*size)}
                step = map(trainer.train_step, itertools.count()).__next__
            else:
                step = peer_step(part, setup, name == "compiled")
            if part.cuda:
                torch.cuda.reset_peak_memory_stats()
            part.seconds(step, 3)
            gib[name] = (torch.cuda.max_memory_allocated() - before) / 2**30 if part.cuda else NEEDS_CUDA
            ready[name] = step, min(50, max(1, round((0.05 if part.toy else 1.0) / part.seconds(step, 1))))
        except Exception as error:  # a contestant that fails (such as out of memory) is a row; the others continue
            yield {"contestant": name, **failure(error)}
    for _, (name, (step, count)) in itertools.product(range(ROUNDS), ready.items()):
        speeds[name].append(round(count * size[0] * size[1] / part.seconds(step, count)))
    median = {name: int(np.median(speeds[name])) for name in ready}
    for name, speed in median.items():
        row = {"contestant": name, "tokens/s": speed, "least": min(speeds[name]), "most": max(speeds[name])}
        row |= {f"x {peer}": speed / median[peer] for peer in ("eager", "compiled") if peer in median}
        mfu = speed / (size[0] * size[1]) * flops.get(name, flops[CONTESTANTS[0]]) / peak
        yield {**row, "MFU": mfu, "GiB": gib[name], "rounds": speeds[name], "result": "measured"}


def peer_step(part: Part, setup: PretrainSetup, compiled: bool) -> Callable[[], None]:
    """A training step of transformers' BERT of the same shape, on a few batches masked before."""
    objective = replace(setup, config=replace(setup.config, layers=1)).objective().train()
    inputs = [objective.sample(batch, 0, step) for step in range(4) for batch in setup.batches().at(step)]
    labels = [torch.full_like(d.input_ids, -100).scatter(1, d.positions, d.targets) for d in inputs]
    batches = [{"input_ids": d.input_ids, "labels": label} for d, label in zip(inputs, labels, strict=True)]
    torch._dynamo.reset()
    backend = "eager" if part.toy else "inductor"
    return bert_steps(setup, itertools.cycle(batches), compiled, backend).__next__


def composition(part: Part) -> None:
    """Time of a step by its parts and largest operators: the device's time (on a CPU the host's) under the profiler.
    The GPU waits for the host where the host is slower."""
    for (size, length, batches), position in itertools.product(SHAPES, ("tupe-r", "absolute")):
        options = {"size": size, "length": length, "batch_size": batches[0], "position": position}
        case = f"{position}, toy" if part.toy else f"{position}, {size}, T {length}, batch {batches[0]}"
        if not (part.toy and len(part.rows) > 1):
            part.attempt(composed, options, case=case)


def composed(part: Part, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One row: milliseconds of each part; the JSON also has the operators."""
    found = profile_steps(part.trainer(part.setup(options), 10**6, log_every=10**9))
    yield {
        "step": 1000 * found.seconds,
        **{row["part"]: row["ms"] for row in found.parts},
        "operators": found.operators[:30],
        "result": "measured",
    }
