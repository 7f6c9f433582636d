"""The trainings that `fastbert bench throughput` compares: fastbert's loop, and transformers' BERT as its example
run_mlm.py trains it. Each runs in its own process, which makes steps on request.

The peer trains on the same rows with the same batch size, dropout, mask rate and clipping, in a plain loop, which does
less around a step than transformers' Trainer. Its data collator masks 80/10/10, and its model computes logits at every
position. Its process keeps PyTorch's defaults; `setup_machine` is called for fastbert only.
"""

import itertools
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastbert.data.shards import open_dataset
from fastbert.errors import UserError
from fastbert.hub.names import BERT_OPTIONS
from fastbert.pretraining.build import build_trainer
from fastbert.pretraining.options import PretrainOptions
from fastbert.pretraining.profiling import profile_steps
from fastbert.pretraining.run import RunFolder
from fastbert.pretraining.setup import PretrainSetup, data_folder, prepare_setup
from fastbert.processes import without_control_c
from fastbert.system_errors import MEMORY_REMEDY, user_error
from fastbert.training.hardware import autocast, peak_flops, resolve_device, resolve_precision, synchronize, use_device
from fastbert.training.memory import PeakMemory

STEPS = 10**6  # planned; the time limit ends the training earlier
WARM_UP = 3


@dataclass(frozen=True)
class Contestant:
    """One training: `fastbert`, or `transformers` of the same shape, eager or compiled."""

    name: str
    options: PretrainOptions
    """Options of the pretraining; the peer uses its shape, data and machine."""
    peer: bool = False
    compiled: bool = False


class Runner:
    """A contestant in its own process.

    Raises:
        UserError: it could not be built; the message is that of the contestant.
        RuntimeError: an internal error, or an error of the peer, with its traceback.
    """

    def __init__(self, contestant: Contestant, build: Callable[[Contestant, Path], "Built"] | None = None) -> None:
        """Start the process, and wait until it has made its first steps.

        Args:
            build: builds the training in that process, with a folder for its output (default: from prepared data).
        """
        self.contestant = contestant
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(contestant, theirs, build or _build), daemon=True)
        with without_control_c():
            self._process.start()
        theirs.close()
        self.facts: dict[str, Any] = self._answer()
        """`tokens` of a step, `precision`, `device`; for fastbert also `flops` of a step and `parameters`."""

    def seconds(self, steps: int) -> float:
        """Seconds that `steps` steps take."""
        return self._ask("steps", steps)

    def peak(self) -> tuple[float, str]:
        """FLOP/s that matrix products reach now, and how they were determined."""
        return self._ask("peak")

    def memory(self) -> int:
        """Peak growth of the process in bytes, from just before it built its networks."""
        return self._ask("memory")

    def profile(self) -> list[dict[str, Any]]:
        """The parts of a step and their times (fastbert only)."""
        return self._ask("profile")

    def close(self) -> None:
        if self._process.is_alive():
            self._pipe.close()
            self._process.join(10)
            self._process.kill()

    def _ask(self, *request: Any) -> Any:
        with suppress(BrokenPipeError):  # the process has ended: reading the answer reports that
            self._pipe.send(request)
        return self._answer()

    def _answer(self) -> Any:
        try:
            status, answer = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            code = self._process.exitcode
            if code == -signal.SIGKILL:
                raise UserError(
                    f"the process of {self.contestant.name} was killed, most likely out of memory; {MEMORY_REMEDY}"
                ) from None
            raise RuntimeError(f"{self.contestant.name} ended with exit code {code}") from None
        if status == "user error":
            raise UserError(f"{self.contestant.name}: {answer}")
        if status == "internal error":
            raise RuntimeError(f"{self.contestant.name}:\n{answer}")
        return answer


@dataclass(frozen=True)
class Built:
    """A training that is ready for its first step."""

    setup: PretrainSetup
    memory: PeakMemory
    """Created just before the networks."""
    step: Iterator[None]
    facts: dict[str, Any]
    profile: Callable[[], list[dict[str, Any]]]


def _build(contestant: Contestant, folder: Path) -> Built:
    setup = (_bare_setup if contestant.peer else prepare_setup)(contestant.options)
    memory = PeakMemory(setup.device)
    return Built(setup, memory, *(_peer if contestant.peer else _fastbert)(setup, contestant, folder))


def _serve(contestant: Contestant, pipe: Connection, build: Callable[[Contestant, Path], Built]) -> None:
    """Answers requests until the other end of the pipe is closed. Messages of the contestant are discarded."""
    sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (until the process ends; errors go through the pipe)
    try:
        with tempfile.TemporaryDirectory(prefix="fastbert-bench-") as folder:
            built = build(contestant, Path(folder))
            setup = built.setup

            def steps(count: int) -> float:
                synchronize(setup.device)
                start = time.perf_counter()
                for _ in range(count):
                    next(built.step)
                synchronize(setup.device)
                return time.perf_counter() - start

            steps(WARM_UP)
            answers: dict[str, Callable[..., Any]] = {
                "steps": steps,
                "memory": built.memory.growth,
                "profile": built.profile,
                "peak": lambda: peak_flops(setup.device, setup.precision, again=True),
            }
            options = setup.options
            shape = {"tokens": options.batch_size * options.length, "device": str(setup.device)}
            pipe.send(("answer", {**shape, "precision": setup.precision, **built.facts}))
            while True:
                request, *arguments = pipe.recv()
                pipe.send(("answer", answers[request](*arguments)))
    except EOFError:
        return
    except Exception as error:  # any error is raised in the other process, an internal one with this traceback
        known = user_error(error)
        pipe.send(("internal error", traceback.format_exc()) if known is None else ("user error", str(known)))


def _bare_setup(options: PretrainOptions) -> PretrainSetup:
    """The setup without fastbert's process-wide settings, such as those of the memory allocator."""
    device = resolve_device(options.machine.device)
    use_device(device)
    if options.machine.threads:
        torch.set_num_threads(options.machine.threads)
    dataset = open_dataset(data_folder(options, options.tokenizer))
    config = options.encoder.resolve(dataset.vocab_size, options.length)
    precision, _ = resolve_precision(options.machine.precision, device)
    return PretrainSetup(options, dataset, dataset.wordpiece, config, device, precision)


def _fastbert(
    setup: PretrainSetup, contestant: Contestant, folder: Path
) -> tuple[Iterator[None], dict[str, Any], Callable]:
    """Training steps, facts and profile of the trainer that `fastbert pretrain` builds, with its data, masks, loss,
    clipping, update and logging."""
    run = RunFolder(folder / "run")
    trainer = build_trainer(setup, run, {"science": {}, "sessions": []}, resumed=False, quiet=True)
    trainer.objective.train()
    size = setup.options.batch_size, setup.options.length
    facts = {"flops": trainer.objective.flops(*size), "parameters": trainer.objective.parameter_count()}
    return map(trainer.train_step, itertools.count()), facts, lambda: profile_steps(trainer).parts


class _Sequences(torch.utils.data.Dataset):
    """The rows of the training split as a map-style dataset, as in run_mlm.py."""

    def __init__(self, setup: PretrainSetup) -> None:
        self.rows = setup.rows("train")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        batch = self.rows.read(np.array([index]), np.array([0]), torch.device("cpu"))
        return {"input_ids": batch.input_ids[0].tolist()}


def _peer(
    setup: PretrainSetup, contestant: Contestant, folder: Path
) -> tuple[Iterator[None], dict[str, Any], Callable]:
    """`bert_steps` on batches from transformers' data collator."""
    from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

    names = {f"{name}_token": f"[{name.upper()}]" for name in ("cls", "sep", "pad", "mask", "unk")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(setup.dataset.tokenizer / "tokenizer.json"), **names)
    loader = torch.utils.data.DataLoader(
        _Sequences(setup),
        batch_size=setup.options.batch_size,
        shuffle=True,
        collate_fn=DataCollatorForLanguageModeling(tokenizer, mlm_probability=setup.options.mlm.mask_rate),
        drop_last=True,
        pin_memory=setup.device.type == "cuda",
    )
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    return bert_steps(setup, batches, contestant.compiled), {}, list


def bert_steps(setup: PretrainSetup, batches: Iterable[Mapping[str, torch.Tensor]], compiled: bool) -> Iterator[None]:
    """Training steps of transformers' BERT of the same shape, one for each of `batches` (`input_ids`, `labels`): SDPA,
    torch's fused AdamW, clipping, and a linear schedule."""
    from transformers import BertConfig, BertForMaskedLM, get_linear_schedule_with_warmup

    options, device = setup.options.optimizer, setup.device
    shape = {theirs: getattr(setup.config, ours) for ours, theirs in BERT_OPTIONS.items()}
    model = BertForMaskedLM(BertConfig(**shape, attn_implementation="sdpa")).to(device).train()
    call = torch.compile(model, dynamic=False) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, 100, STEPS)
    for batch in batches:
        inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        with autocast(device, setup.precision):
            loss = call(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield
