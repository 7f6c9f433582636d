"""Step of scripts/gpu/measure.py: training steps of BERT-Base compared with transformers' BERT, compiled."""

import itertools
import statistics
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton_cache
from fastbert_kernels.backend import TRITON
from fastbert_kernels.benchmarks.measuring import ceilings
from work import Work, emit, failure, wait_for_gpu

from fastbert.bench.contestants import STEPS, Built, Contestant, Runner, bert_steps
from fastbert.pretraining.setup import PretrainSetup
from fastbert.training.memory import PeakMemory

SHAPES = ((128, 256), (512, 64))
"""Length, batch size: 32,768 tokens in a step."""
POSITIONS = ("absolute", "tupe-r")
ROUNDS, SECONDS = 5, 1.5


def throughput(work: Work) -> None:
    """Complete training steps of BERT-Base on random text with dropout 0.1, without accumulation; contestants
    alternate, median of 5 rounds of 1.5 s. fastbert's step includes reading rows and sampling masks; transformers is
    its compiled BertForMaskedLM (SDPA, bf16 autocast, torch's fused AdamW, clipping) on batches masked before. MFU:
    closed-form products, with the head at the masked positions only, compared with a product of 8,192 x 8,192
    matrices. GiB: peak memory of the contestant's tensors. x: speed relative to transformers."""
    ready: dict[tuple[int, int], list[Runner]] = {}
    with ThreadPoolExecutor() as pool, ExitStack() as stack:  # all compile at the same time
        stack.callback(lambda: list(pool.map(Runner.close, itertools.chain(*ready.values()))))
        shapes = SHAPES[:1] if work.toy else SHAPES
        started = [(shape, pool.submit(Runner, one, build)) for shape in shapes for one in contestants(work, *shape)]
        for shape, future in started:
            try:
                ready.setdefault(shape, []).append(future.result())
            except Exception as error:  # a contestant that fails is a row; the others continue
                emit(case=f"T {shape[0]}, batch {shape[1]}", **failure(error))
        wait_for_gpu()
        peak = ceilings(work.device, work.toy)["tflops"]
        for (length, batch), runners in ready.items():
            for row in alternate(runners, peak, 0.02 if work.toy else SECONDS):
                gib = row.pop("bytes") / 2**30
                emit(case=f"T {length}, batch {batch}", **row, GiB=gib, result="measured")


def contestants(work: Work, length: int, batch: int) -> Iterator[Contestant]:
    values = {"size": "base", "length": length, "batch_size": batch, "dropout": 0.1}
    for position in POSITIONS[:1] if work.toy else POSITIONS:
        yield Contestant(f"fastbert {position}", work.options({**values, "position": position}))
    yield Contestant("transformers, compiled", work.options({**values, "position": "absolute"}), True, work.cuda)


def build(contestant: Contestant, folder: Path) -> Built:
    """The training of a contestant on random text, in its process."""
    work = Work(contestant.options.encoder.width is not None, folder)  # only dry runs have a width
    setup = work.setup(contestant.options)
    batches = itertools.cycle(masked_batches(setup)) if contestant.peer else None
    memory = PeakMemory(setup.device)
    if batches:
        return Built(setup, memory, bert_steps(setup, batches, contestant.compiled), {}, list)
    trainer = work.trainer(setup, STEPS, log_every=10**9)
    if TRITON is not None:
        triton_cache.count_uses()
    uses = {"uses": triton_cache.USES}  # filled by the first steps, before the facts are read
    facts = uses | {"flops": trainer.objective.flops(setup.options.batch_size, setup.options.length)}
    return Built(setup, memory, map(trainer.train_step, itertools.count()), facts, list)


def masked_batches(setup: PretrainSetup) -> list[dict[str, torch.Tensor]]:
    objective = replace(setup, config=replace(setup.config, layers=1)).objective().train()
    inputs = [objective.sample(batch, 0, step) for step in range(4) for batch in setup.batches().at(step)]
    labels = [torch.full_like(d.input_ids, -100).scatter(1, d.positions, d.targets) for d in inputs]
    return [{"input_ids": d.input_ids, "labels": label} for d, label in zip(inputs, labels, strict=True)]


def alternate(runners: list[Runner], peak: float, seconds: float) -> Iterator[dict[str, Any]]:
    """Rows of the contestants of one shape, after rounds in which they alternate.

    Args:
        peak: TFLOP/s of a large matrix product.
        seconds: of training in a round, at least one step.
    """
    counts = [max(1, round(2 * seconds / runner.seconds(2))) for runner in runners]
    times: list[list[float]] = [[] for _ in runners]
    for _ in range(ROUNDS):
        for runner, count, found in zip(runners, counts, times, strict=True):
            found.append(runner.seconds(count) / count)
    median = {r.contestant.name: statistics.median(found) for r, found in zip(runners, times, strict=True)}
    peers = [runner.contestant.name for runner in runners if runner.contestant.peer]
    flops = next((runner.facts["flops"] for runner in runners if "flops" in runner.facts), 0)
    for runner, found in zip(runners, times, strict=True):
        name, tokens = runner.contestant.name, runner.facts["tokens"]
        row = {"contestant": name, "tokens/s": round(tokens / median[name]), "ms": 1000 * median[name]}
        row |= {"least": round(tokens / max(found)), "most": round(tokens / min(found))}
        row |= {f"x {peer}": median[peer] / median[name] for peer in peers}
        row |= {"MFU": runner.facts.get("flops", flops) / median[name] / (1e12 * peak)}
        if uses := runner.facts.get("uses"):
            row |= {"kernels found in the cache": f"{sum(hit for _, hit in uses)} of {len(uses)}"}
        yield {**row, "precision": runner.facts["precision"], "bytes": runner.memory()}
