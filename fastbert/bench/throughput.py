"""`fastbert bench throughput`: tokens/s of fastbert's training loop and of transformers' BERT on the same text,
alternating, and the time of each part of a step of fastbert."""

import statistics
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from fastbert.bench.contestants import STEPS, Contestant, Runner
from fastbert.bench.options import BenchThroughputOptions
from fastbert.bench.rounds import counted_rounds, measured_on, publish
from fastbert.data.shards import open_dataset
from fastbert.errors import UserError
from fastbert.model.options import EncoderOptions
from fastbert.outputs import check_output_folder
from fastbert.pretraining.options import PretrainMachineOptions, PretrainOptions
from fastbert.pretraining.setup import check_networks, data_folder
from fastbert.streams import echo
from fastbert.training.hardware import resolve_device


def bench_throughput(options: BenchThroughputOptions) -> int:
    """Runs the benchmark, prints and writes its results; returns the exit code.

    Raises:
        UserError: the data cannot be used, the folder cannot be written, or a contestant fails.
    """
    check_output_folder(Path(options.out))
    job = job_options(options)
    check_networks(job, resolve_device(job.machine.device))
    folder = data_folder(job, None)
    have = open_dataset(folder).vocab_size
    if str(folder) != options.data and have < options.vocab_size:
        raise UserError(
            f"{options.data} has too few distinct words for a vocabulary of {options.vocab_size}: {have} were found; "
            "lower --vocab-size, or give --data more text"
        )
    rows, parts, peak = race(options, contestants(options, replace(job, data=str(folder))))
    found = {
        "threads": options.machine.threads or torch.get_num_threads(),
        "vocabulary": have,
        "peak_flops": peak[0],
        "peak_from": peak[1],
        "tokens_per_second": rows[0]["tokens_per_second"],
        "rows": rows,
        "step": parts,
    }
    publish("throughput", options, found, document)
    return 0


def job_options(options: BenchThroughputOptions) -> PretrainOptions:
    """The pretraining that both sides run."""
    machine = PretrainMachineOptions(**{name: getattr(options.machine, name) for name in asdict(options.machine)})
    return PretrainOptions(
        data=options.data,
        column=options.column,
        vocab_size=options.vocab_size,
        encoder=EncoderOptions(layers=options.layers, width=options.width, position=options.schemes[0]),
        length=options.length,
        batch_size=options.batch_size,
        steps=STEPS,
        eval_every=STEPS,
        checkpoint_every=STEPS,
        machine=machine,
    )


def contestants(options: BenchThroughputOptions, job: PretrainOptions) -> list[Contestant]:
    """The contestants: fastbert with each position scheme, then the peers."""
    ours = [
        Contestant(f"fastbert {position}", replace(job, encoder=replace(job.encoder, position=position)))
        for position in options.schemes
    ]
    bert = replace(job, encoder=replace(job.encoder, position="absolute"))
    peers, chosen = [], options.chosen_peers
    if chosen is None:
        chosen = ["bf16", "compiled"] if resolve_device(job.machine.device).type == "cuda" else ["fp32", "bf16"]
    for peer in chosen:
        machine = replace(job.machine, precision="fp32" if peer == "fp32" else "bf16", micro_batch_size=None)
        name = f"transformers {'bf16, compiled' if peer == 'compiled' else peer}"
        peers.append(Contestant(name, replace(bert, machine=machine), True, peer == "compiled"))
    return ours + peers


def race(
    options: BenchThroughputOptions, entrants: list[Contestant]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], tuple[float, str]]:
    """Times all contestants in alternating rounds.

    Returns:
        The rows of the table, the parts of a step of the first contestant, and the peak FLOP/s for MFU.
    """
    with ExitStack() as stack:
        runners = []
        for contestant in entrants:
            echo(f"building {contestant.name}")
            runners.append(Runner(contestant))
            stack.callback(runners[-1].close)
        counts = [max(1, round(options.seconds / runner.seconds(1))) for runner in runners]
        peaks: list[tuple[float, str]] = []
        speeds: list[list[float]] = [[] for _ in runners]
        for _ in counted_rounds(options.rounds):
            peaks.append(runners[0].peak())
            for runner, count, found in zip(runners, counts, speeds, strict=True):
                found.append(count * runner.facts["tokens"] / runner.seconds(count))
        memories = [runner.memory() for runner in runners]
        parts = runners[0].profile()
    peak, how = max(peaks)
    references = [index for index, runner in enumerate(runners) if index == 0 or runner.contestant.peer]
    rows = []
    for runner, found, memory in zip(runners, speeds, memories, strict=True):
        row = {
            "contestant": runner.contestant.name,
            "precision": runner.facts["precision"],
            "tokens_per_second": round(statistics.median(found)),
            "least": round(min(found)),
            "most": round(max(found)),
            "step_ms": round(1000 * runner.facts["tokens"] / statistics.median(found), 2),
            "peak_memory": memory,
            "over": {
                runners[index].contestant.name: ratio(found, speeds[index])
                for index in references
                if runners[index] is not runner
            },
        }
        if "flops" in runner.facts:
            rate = runner.facts["flops"] / runner.facts["tokens"] * statistics.median(found)
            row |= {"flops": runner.facts["flops"], "mfu": round(rate / peak, 4)}
        rows.append(row)
    return rows, parts, (peak, how)


def ratio(ours: list[float], theirs: list[float]) -> list[float]:
    """Median, minimum and maximum of the rounds' ratios."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return [round(value, 3) for value in (statistics.median(ratios), min(ratios), max(ratios))]


def document(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    options = found["options"]
    references = list(dict.fromkeys(name for row in found["rows"] for name in row["over"]))
    lines = [
        "# Throughput",
        "",
        *measured_on(found, f"{found['threads']} threads"),
        f"- encoder: {options['layers']} layers of {options['width']}, {found['vocabulary']:,} words; steps of "
        f"{options['batch_size']} x {options['length']} tokens; dropout 0.1, 15 % masks, clipping",
        f"- {options['rounds']} rounds of {options['seconds']:g} s, alternating; medians of tokens/s with minimum "
        "and maximum, and medians of the rounds' ratios; memory: peak growth since before the networks were built",
        f"- MFU: closed-form FLOP/s as a fraction of {found['peak_flops'] / 1e9:.4g} GFLOP/s "
        f"({found['peak_from']}, the best of all rounds)",
        "",
        f"| | tokens/s | min to max | ms per step | MFU | MiB | {' | '.join(f'x {name}' for name in references)} |",
        "|---|--:|--:|--:|--:|--:|" + "--:|" * len(references),
    ]
    for row in found["rows"]:
        mfu = f"{100 * row['mfu']:.1f} %" if "mfu" in row else ""
        ratios = [f"{row['over'][name][0]:.2f}" if name in row["over"] else "" for name in references]
        cells = [
            f"{row['contestant']}, {row['precision']}"
            if row["contestant"].startswith("fastbert")
            else row["contestant"],
            f"{row['tokens_per_second']:,}",
            f"{row['least']:,} to {row['most']:,}",
            f"{row['step_ms']:g}",
            mfu,
            f"{row['peak_memory'] / 2**20:,.0f}",
            *ratios,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"A step of {found['rows'][0]['contestant']}:", "", "| part | ms | fraction |", "|---|--:|--:|"]
    total = sum(part["ms"] for part in found["step"])
    lines += [f"| {part['part']} | {part['ms']:g} | {100 * part['ms'] / total:.1f} % |" for part in found["step"]]
    return "\n".join([*lines, ""])
