"""What only a GPU can tell: are the results right there, how fast are the steps, does a pretraining learn.

    PYTHONPATH=.:kernels python3 scripts/on_gpu.py --parts correctness,throughput --out $OUT --commit abc1234
    PYTHONPATH=.:kernels python3 scripts/on_gpu.py --parts pretrain --out $OUT --data wiki --minutes 8

Each part writes PART.json and PART.md after every result, so that a run cut short keeps what it had, and ends within
--seconds. `--toy` rehearses it all on any machine; what the device cannot show is "not measured".
"""

import argparse
import datetime
import faulthandler
import gc
import importlib.metadata
import itertools
import math
import shlex
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from fastbert_kernels import keep_mask
from torch import Tensor, nn

from fastbert.config import from_dict, to_dict
from fastbert.data.tokenizer import SPECIAL_TOKENS, WordPiece
from fastbert.files import atomic_file, write_json
from fastbert.model.encoder import initialize
from fastbert.model.positions import POSITIONS
from fastbert.pretraining import job
from fastbert.pretraining.held_out import Held
from fastbert.pretraining.loop import Trainer
from fastbert.pretraining.options import PretrainOptions
from fastbert.randomness import permute, row_keys
from fastbert.training.checkpoints import Checkpoint, Checkpointer, flatten_optimizer
from fastbert.training.hardware import autocast, describe_machine, peak_flops, resolve_device, resolve_precision
from fastbert.training.interrupts import Interrupts
from fastbert.training.logbook import Logbook, read_metrics
from fastbert.training.optimizers import build_optimizer

LATE, NEEDS_CUDA = "not measured: time was up", "not measured: needs CUDA"
LONGEST, GRACE = 500, 30  # seconds of a part, and those behind them after which one that hangs is killed
CPU = torch.device("cpu")
COMPARED = {"layers": 2, "width": 256, "batch_size": 4}
TRAINED = {"layers": 4, "width": 256, "batch_size": 64, "machine": {"micro_batch_size": 32}}
TOY = {"layers": 1, "width": 16, "heads": 2, "length": 24, "batch_size": 4}
SHAPES = (("base", 128, (256, 1024, 64)), ("base", 512, (64, 256, 16)), ("large", 128, (128, 512, 32)))
ROUNDS, ROUND_SECONDS, COMPILE_SECONDS = 5, 1.0, 100  # no compilation begins with fewer seconds left


class TimeUp(BaseException):
    """The part's time is over. No Exception, because compilers catch those."""


def on_alarm(number: int, frame: Any) -> None:
    raise TimeUp


@dataclass
class Report:
    """The results of one part, on the disk after every one of them."""

    part: str
    out: Path
    header: dict[str, Any]
    deadline: float
    note: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def add(self, **row: Any) -> None:
        self.rows.append({k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()})
        print(self.part, *(cell(v) for v in row.values() if not isinstance(v, list | dict)), sep="  ", file=sys.stderr)
        write_json(self.out / f"{self.part}.json", {**self.header, "note": self.note, "rows": self.rows})
        header = [f"- {name}: {value}" for name, value in self.header.items()]
        with atomic_file(self.out / f"{self.part}.md", "w") as file:
            file.write("\n".join([f"# {self.part}", "", *header, "", self.note, "", table(self.rows), ""]))

    def attempt(self, check: Callable[..., Iterable[dict[str, Any]]], *arguments: Any, **what: Any) -> None:
        """Adds the rows of `check`; what it has no time for and what it raises become rows too."""
        try:
            if self.left() <= 0:
                raise TimeUp
            for row in check(*arguments):
                self.add(**what, **row)
        except TimeUp:
            self.add(**what, result=LATE)
        except Exception as error:
            self.add(**what, result=failure(error))


def failure(error: Exception) -> str:
    """For a row's result; the whole of it goes to standard error."""
    traceback.print_exception(error)
    return f"error: {type(error).__name__}: {str(error).strip().splitlines()[:1]}"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; lists and mappings are for the JSON alone."""
    names = dict.fromkeys(name for row in rows for name, value in row.items() if not isinstance(value, list | dict))
    lines = [list(names), ["---"] * len(names), *([cell(row.get(name, "")) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value).replace("\n", " ").replace("|", "/")


class RandomText(Held):
    """Tokens in memory with the interface of a prepared dataset, whose splits are all the same."""

    def split(self, name: str) -> Held:
        return self


@cache
def random_text(vocab_size: int) -> tuple[RandomText, WordPiece]:
    """Random words in documents of about 40."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(len(SPECIAL_TOKENS), vocab_size, 64 * vocab_size)
    tokens[draw.random(len(tokens)) < 1 / 40] = SPECIAL_TOKENS.index("[SEP]")
    pieces = (f"##w{i}" if i % 3 == 0 else f"w{i}" for i in range(vocab_size - len(SPECIAL_TOKENS)))
    return RandomText(tokens), WordPiece((*SPECIAL_TOKENS, *pieces))


class Rig:
    """The device, and the jobs that are built for it; `folder` takes what runs write."""

    def __init__(self, args: argparse.Namespace, device: torch.device, folder: str) -> None:
        self.args, self.device, self.cuda = args, device, device.type == "cuda"
        self.precision = resolve_precision("auto", device)[0] if self.cuda else "fp32"
        self.folders = (Path(folder) / str(number) for number in itertools.count())

    def setup(self, options: dict[str, Any], precision: str = "", device: torch.device | None = None) -> job.Setup:
        """A pretraining job on random text; a rehearsal shrinks it."""
        text, words = random_text(96 if self.args.toy else 8192 if "layers" in options else 32768)
        options = {"eval_sequences": 8, **options, **(TOY if self.args.toy else {})}
        asked = from_dict(PretrainOptions, options, "on_gpu.py")
        config = asked.encoder.resolve(len(words.tokens), asked.length)
        return job.Setup(asked, text, words, config, device or self.device, precision or self.precision)

    def trainer(self, setup: job.Setup, steps: int, log_every: int, checkpoint: Checkpoint | None = None) -> Trainer:
        """As `job.train` builds it."""
        options, folder = setup.options, next(self.folders)
        folder.mkdir()
        objective = setup.objective().train()
        asked = {"seed": options.seed, "optimizer_options": options.optimizer, "schedule": options.schedule}
        every = {"steps": steps, "eval_every": steps, "checkpoint_every": 5, "log_every": log_every}
        trainer = Trainer(
            objective=objective,
            optimizer=build_optimizer(objective.named_parameters(), options.optimizer, setup.device),
            batches=setup.batches(),
            precision=setup.precision,
            checkpointer=Checkpointer(folder / "checkpoints", 3, job.say),
            logbook=Logbook(folder, steps, start_step=checkpoint.step if checkpoint else 0, quiet=True),
            validate=lambda: setup.validate(objective),
            peak_flops=1.0,
            state={},
            **asked,
            **every,
        )
        if checkpoint:
            trainer.restore(checkpoint)
        return trainer


def correctness(rig: Rig, report: Report) -> None:
    report.note = (
        "Accuracy: relative errors of norms against float64 on the CPU over 3 batches, with the same hash dropout. The "
        "rule: hidden states, losses at the masked places and each gradient err at most twice as much as with plain "
        'PyTorch attention ("reference") on this device, plus 1e-5; `worst` lies nearest to that bound or beyond.'
    )
    report.attempt(same_bits, rig, check="random bits as on the CPU")
    for case, length in (("plain", 128), ("packed", 100), ("packed, dropout", 111)):
        for position, norm in itertools.product(POSITIONS, ("post", "pre")):
            options = {"position": position, "norm": norm, "document_mask": "packed" in case, "length": length}
            options["dropout"] = options["attention_dropout"] = 0.1 * ("dropout" in case)
            report.attempt(accuracy, rig, options, check="accuracy", case=f"{case}, {position}, {norm}")
    report.attempt(skipped_update, rig, check="skipped update")
    for position, packed, dropout in itertools.product(("absolute", "tupe-r"), (False, True), (0.0, 0.1)):
        options = {"position": position, "document_mask": packed, "mlm": {"whole_word": packed}}
        options["dropout"] = options["attention_dropout"] = dropout
        case = f"{'packed, whole words' if packed else 'plain'}, {position}, dropout {dropout}"
        report.attempt(no_waiting, rig, options, check="no step waits", case=case)
        report.attempt(repeats, rig, options, check="10 steps", case=case)


def differing(a: dict[str, Any], b: dict[str, Any]) -> str:
    """A row's result: whether both hold the same bits under the same names."""

    def same(x: Any, y: Any) -> bool:
        return torch.equal(x.cpu(), y.cpu()) if isinstance(x, Tensor) and isinstance(y, Tensor) else x == y

    found = [name for name in a | b if name not in a or name not in b or not same(a[name], b[name])]
    return f"fails: {len(found)} of {len(a)} differ: {', '.join(found[:8])}" if found else "holds"


def same_bits(rig: Rig) -> Iterator[dict[str, Any]]:
    """Everything random that a device draws."""
    found = []
    for device in (CPU, rig.device):
        keys = row_keys(7, "dropout", 123, torch.arange(256, device=device))
        order = permute(torch.arange(1009, device=device), 1009, 7, 3)
        out = {"row_keys": keys, "keep_mask": keep_mask(keys, 1000, 0.1), "permute": order}
        for name, whole_word in (("pieces", False), ("words", True)):
            setup = rig.setup({**COMPARED, "mlm": {"whole_word": whole_word}}, device=device)
            batch = setup.rows("train").read(np.arange(64), np.arange(64), device)
            drawn = setup.objective().train().draw(batch, 7, 123)
            # Unused places come in any order: compared is the label of every token, 0 where there is none.
            labels = torch.zeros_like(drawn.input_ids).scatter_add(1, drawn.places, drawn.targets.clamp(min=0))
            out |= {f"{name} shown": drawn.input_ids, f"{name} asked": labels, f"{name} keys": drawn.dropout_keys}
        found.append(out)
    yield {"case": ", ".join(found[0]), "result": differing(*found) if rig.cuda else NEEDS_CUDA}


def accuracy(rig: Rig, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rule of the note for one encoder, in both precisions."""

    def run(device: torch.device, precision: str, attention: str, dtype: torch.dtype) -> dict[str, Tensor]:
        setup = rig.setup({**COMPARED, **options, "machine": {"attention": attention}}, precision, device)
        objective = setup.objective().train()
        initialize(objective, 0, 0.06)  # attention that is far from uniform
        return outcome(objective.to(dtype), setup)

    true = run(CPU, "fp32", "reference", torch.float64)
    for precision in ("fp32", "bf16"):
        ours, plain = (errors(run(rig.device, precision, name, torch.float32), true) for name in ("auto", "reference"))
        share = {name: error if error == math.inf else error / (2 * plain[name] + 1e-5) for name, error in ours.items()}
        worst = max(share, key=share.__getitem__)
        row = {"precision": precision, "hidden": ours["hidden"], "loss": ours["loss"], "worst": worst}
        row |= {"its error": ours[worst], "plain's": plain[worst], "of the bound": share[worst]}
        yield {**row, "result": "holds" if share[worst] <= 1 else "fails: over the bound"}


def outcome(objective: nn.Module, setup: job.Setup) -> dict[str, Tensor]:
    """Hidden states, losses at the masked places and gradients of 3 batches, strung together in float64 on the CPU."""
    found: dict[str, list[Tensor]] = {}
    outputs: list[Tensor] = []
    for module in (objective.encoder, objective.head):
        module.register_forward_hook(lambda module, arguments, out: outputs.append(out.detach().double()))
    rows = np.arange(setup.options.batch_size)
    for step in range(3):
        outputs.clear()
        drawn = objective.draw(setup.rows("train").read(rows + step * len(rows), rows, setup.device), 0, step)
        with autocast(setup.device, setup.precision):
            sums = objective(drawn)
        (sums["mlm"] / drawn.counts["mlm"]).backward()
        losses = F.cross_entropy(outputs[1], drawn.targets.flatten(), reduction="none")
        values = {"hidden": outputs[0], "loss": losses} | {name: p.grad for name, p in objective.named_parameters()}
        for name, value in values.items():
            found.setdefault(name, []).append(value.double().cpu().flatten())
        objective.zero_grad()
    return {name: torch.cat(values) for name, values in found.items()}


def errors(found: dict[str, Tensor], true: dict[str, Tensor]) -> dict[str, float]:
    """||found - true|| / ||true||; a gradient that should vanish is held against the largest one."""
    norms = {name: value.norm().item() for name, value in true.items()}
    floor = 1e-6 * max(norm for name, norm in norms.items() if name not in ("hidden", "loss"))
    out = {name: (found[name] - true[name]).norm().item() / max(norms[name], floor) for name in true}
    return {name: value if math.isfinite(value) else math.inf for name, value in out.items()}


def skipped_update(rig: Rig) -> Iterator[dict[str, Any]]:
    """The third step of four has an infinite loss; those beside it must change what it leaves alone."""
    trainer = rig.trainer(rig.setup({**TRAINED, "position": "tupe-r"}), 10, log_every=100)
    forward, states = trainer.objective.forward, []
    for step, factor in enumerate((1.0, 1.0, math.inf, 1.0)):
        trainer.objective.forward = lambda drawn, f=factor: {name: f * value for name, value in forward(drawn).items()}
        trainer._step(step)
        tensors = dict(trainer.objective.named_parameters()) | flatten_optimizer(trainer.optimizer)[0]
        states.append({name: value.detach().clone() for name, value in tensors.items()})
    idle = "holds" in (differing(*states[:2]), differing(*states[2:]))
    case = f"{type(trainer.optimizer).__name__}, {len(states[0])} tensors"
    yield {"case": case, "result": "fails: other updates change nothing either" if idle else differing(*states[1:3])}


def no_waiting(rig: Rig, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Five of the trainer's own steps under CUDA's alarm for whatever makes the host wait (events apart)."""
    trainer = rig.trainer(rig.setup({**TRAINED, **options}), 1000, log_every=1000)
    result = "holds" if rig.cuda else NEEDS_CUDA
    try:
        for step in range(8):
            if step == 3 and rig.cuda:
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
            trainer._step(step)
    except RuntimeError as error:
        frame = [f for f in traceback.extract_tb(error.__traceback__) if "fastbert" in f.filename][-1]
        result = f"fails: {Path(frame.filename).name}:{frame.lineno} {frame.line}: {failure(error)}"
    finally:
        if rig.cuda:
            torch.cuda.set_sync_debug_mode("default")
    yield {"result": result}


def repeats(rig: Rig, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Ten steps twice, and the last five once more from the first run's checkpoint: losses, weights and moments."""

    def run(checkpoint: Checkpoint | None = None) -> tuple[Checkpointer, dict[str, Any]]:
        trainer = rig.trainer(rig.setup({**TRAINED, **options}), 10, 1, checkpoint)
        with trainer.logbook:
            trainer.run(Interrupts())
        rows = read_metrics(trainer.logbook.path)
        values = {f"{k} {row['step']} {row['split']}": row[k] for row in rows for k in ("loss", "grad_norm") if k in row}
        groups = trainer.checkpointer.load_latest().tensors
        return trainer.checkpointer, values | {f"{g} {k}": v for g, group in groups.items() for k, v in group.items()}

    checkpoints, first = run()
    yield {"precision": rig.precision, "part": "repeated", "result": differing(first, run()[1])}
    late = {k: v for k, v in first.items() if isinstance(v, Tensor) or int(k.split()[1]) > 5}
    resumed = run(checkpoints.load(checkpoints.paths()[0]))[1]
    yield {"precision": rig.precision, "part": "resumed at step 5", "result": differing(late, resumed)}


def throughput(rig: Rig, report: Report) -> None:
    peak, how = peak_flops(rig.device, rig.precision)
    report.note = (
        f"Whole training steps on random text, {rig.precision}, no accumulation, contestants in turn: median of up to "
        f"{ROUNDS} rounds of about {ROUND_SECONDS:g} s. fastbert reads its rows and draws its masks in the step; "
        "transformers' BertForMaskedLM (SDPA, torch's fused AdamW, clipping) gets masked batches that lie on the device. "
        f"MFU counts the products, the head's at masked places only, of {peak / 1e12:.4g} TFLOP/s ({how}). GiB: what a "
        "contestant adds at its peak. x: its speed over that peer's."
    )
    for turn, dropout, (size, length, batches) in itertools.product(range(3), (0.1, 0.0), SHAPES):
        options = {"size": size, "length": length, "batch_size": batches[turn]}
        options["dropout"] = options["attention_dropout"] = dropout
        case = f"{size}, T {length}, batch {batches[turn]}, dropout {dropout}"
        if not rig.args.toy or (turn, dropout, size, length) == (0, 0.1, "base", 128):
            report.attempt(race, rig, report, options, turn == 0, peak, case=case)


def race(rig: Rig, report: Report, options: dict, compiled: bool, peak: float) -> Iterator[dict[str, Any]]:
    """One shape: fastbert's encoders beside their peer, eager and compiled."""
    names = ["fastbert absolute", "fastbert tupe-r", "eager", *(["compiled"] if compiled else [])]
    rows = {name: {"contestant": name, "result": LATE} for name in names}
    running: dict[str, tuple] = {}
    speeds: dict[str, list[float]] = {name: [] for name in names}
    try:
        for name in names:
            if name != "compiled" or rig.args.toy or report.left() > COMPILE_SECONDS:
                setup = rig.setup({**options, "position": "tupe-r" if "tupe-r" in name else "absolute"})
                running |= warmed(rig, setup, name, rows[name])
        for _, (name, (step, count, tokens)) in itertools.product(range(2 if rig.args.toy else ROUNDS), running.items()):
            speeds[name].append(count * tokens / seconds(rig, step, count))
    except TimeUp:
        pass
    for name, row in rows.items():
        flops_a_token = row.pop("flops a token", 0)
        if speeds[name]:
            median = statistics.median(speeds[name])
            row |= {"tokens/s": median, "least": min(speeds[name]), "most": max(speeds[name]), "rounds": speeds[name]}
            row |= {"MFU": median * flops_a_token / peak, "result": "measured"}
            row |= {f"x {peer}": median / statistics.median(v) for peer, v in speeds.items() if peer in PEERS and v}
        yield row


def warmed(rig: Rig, setup: job.Setup, name: str, row: dict[str, Any]) -> dict[str, tuple]:
    """name -> its step, how many of them make a round, and their tokens; nothing if it fails, which goes into `row`."""
    before, tokens = 0, setup.options.batch_size * setup.options.length
    gc.collect()
    if rig.cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    try:
        step, flops = peer_step(rig, setup, name == "compiled") if name in PEERS else own_step(rig, setup)
        row |= {"flops a token": flops / tokens, "warm-up s": seconds(rig, step, 3)}
        row["GiB"] = (torch.cuda.max_memory_allocated() - before) / 2**30 if rig.cuda else NEEDS_CUDA
        return {name: (step, min(50, max(1, round(2 * ROUND_SECONDS / seconds(rig, step, 2)))), tokens)}
    except Exception as error:
        row["result"] = "out of memory" if isinstance(error, torch.OutOfMemoryError) else failure(error)
    return {}


def seconds(rig: Rig, step: Callable[[], None], count: int) -> float:
    if rig.cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        step()
    if rig.cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def own_step(rig: Rig, setup: job.Setup) -> tuple[Callable[[], None], int]:
    """The trainer's step, and its FLOPs."""
    trainer, steps = rig.trainer(setup, 10**6, 10**9), itertools.count()
    flops = trainer.objective.flops(setup.options.batch_size, setup.options.length)
    return lambda: trainer._step(next(steps)), flops


def peer_step(rig: Rig, setup: job.Setup, compiled: bool) -> tuple[Callable[[], None], int]:
    """transformers' BERT of the same shape, and the FLOPs that its task needs."""
    from transformers import BertConfig, BertForMaskedLM

    config, objective = setup.config, setup.objective().train()
    drawn = [objective.draw(batch, 0, step) for step in range(4) for batch in setup.batches().at(step)]
    labels = [torch.full_like(d.input_ids, -100).scatter(1, d.places, d.targets) for d in drawn]
    given = itertools.cycle([(d.input_ids, label) for d, label in zip(drawn, labels, strict=True)])
    shape = {"hidden_size": config.width, "num_hidden_layers": config.layers, "num_attention_heads": config.heads}
    shape |= {"intermediate_size": config.ffn, "vocab_size": config.vocab_size, "attn_implementation": "sdpa"}
    drops = {"hidden_dropout_prob": config.dropout, "attention_probs_dropout_prob": config.attention_dropout}
    model = BertForMaskedLM(BertConfig(**shape, **drops)).to(rig.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    backend = "eager" if rig.args.toy else "inductor"
    torch._dynamo.reset()
    call = torch.compile(model, dynamic=False, backend=backend) if compiled else model

    def step() -> None:
        ids, label = next(given)
        with autocast(rig.device, setup.precision):
            loss = call(input_ids=ids, labels=label).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, objective.flops(setup.options.batch_size, setup.options.length)


def pretraining(rig: Rig, report: Report) -> None:
    args = rig.args
    report.note = (
        "Whole jobs of fastbert pretrain, all variants with the same options, data and number of steps, chosen so that "
        "together they take --minutes (without what comes before the first and after the last step)."
    )
    if args.data is None:
        return report.add(result="not measured: no --data")
    jobs = {}
    for variant in args.variants:
        values = nested(["size=small", "batch_size=256", *args.set, *variant.split(",")]) | (TOY if args.toy else {})
        jobs[variant] = from_dict(PretrainOptions, {"data": args.data, **values}, "--set and --variants")
    total = 0.0
    for options in jobs.values():
        probe = replace(options, steps=40, eval_every=40, checkpoint_every=40, log_every=10)
        rows = read_metrics(next(run_job(rig, probe))["metrics"])
        total += options.batch_size * options.length / [r for r in rows if r["split"] == "train"][-1]["tokens_per_second"]
    steps = max(20, int(0.8 * min(60 * args.minutes, report.left()) / total))
    for variant, options in jobs.items():
        report.attempt(run_job, rig, replace(options, steps=steps), variant=variant)


def nested(settings: list[str]) -> dict[str, Any]:
    """["mlm.mask_rate=0.2", ...] as the YAML file has it."""
    import yaml

    out: dict[str, Any] = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        *groups, last = name.split(".")
        inner = out
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[last] = yaml.safe_load(value)
    return out


def run_job(rig: Rig, options: PretrainOptions) -> Iterator[dict[str, Any]]:
    """One pretraining: its curves, whether or not it came to its end."""
    folder, result, start = next(rig.folders), "measured", time.monotonic()
    try:
        code = job.pretrain(replace(options, out=str(folder)), "on_gpu")
        result = result if code == 0 else f"stopped: exit code {code}"
    except TimeUp:
        result = "stopped: time was up"
    except ImportError as error:
        result = f"measured, but without its report: {error}"
    rows = read_metrics(folder / "metrics.jsonl")
    curve, training = ([row for row in rows if row["split"] == split] for split in ("validation", "train"))
    entropy = job.open_dataset(options.data).split("validation").unigram_entropy
    row = {"steps": rows[-1]["step"], "asked": options.steps, "tokens": rows[-1]["tokens"]}
    row |= {"seconds": time.monotonic() - start, "unigram entropy": entropy}
    row |= {f"validation {name}": curve[-1][name] for name in ("loss", "accuracy") if curve and name in curve[-1]}
    row |= {n: statistics.median(r[n] for r in training) for n in ("tokens_per_second", "mfu") if training}
    yield {**row, "curve": curve, "training": training, "options": to_dict(options), "result": result}


PARTS = {"correctness": correctness, "throughput": throughput, "pretrain": pretraining}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="of correctness,throughput,pretrain")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", help="of the code, where there is no git")
    parser.add_argument("--seconds", type=float, default=LONGEST, help="that one part may take")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, on the CPU too")
    parser.add_argument("--data", help="pretrain: a prepared folder")
    parser.add_argument("--minutes", type=float, default=8, help="pretrain: of all variants together")
    parser.add_argument("--set", nargs="*", default=[], help="pretrain: options as in the YAML, mlm.mask_rate=0.2")
    parser.add_argument("--variants", nargs="*", default=["position=tupe-r", "position=absolute"])
    args = parser.parse_args()
    device = resolve_device("auto")
    if device.type == "cpu" and not args.toy:
        parser.error("there is no GPU here; --toy rehearses on the CPU")
    machine = describe_machine()
    for package in ("triton", "safetensors"):
        ...
    header = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "command": shlex.join(sys.argv)}
    ...
