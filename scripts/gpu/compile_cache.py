"""Compiles the kernels that scripts/gpu/measure.py launches, on a machine without a GPU, into a file for its --cache.

    PYTHONPATH=.:kernels python3 -O scripts/gpu/compile_cache.py cache.tar.xz

A compiled kernel is found again only by the same version of Triton (the same package, for the same version of Python)
and the same source code: run this with the versions of the machine with the GPU, on the commit that is measured.
Launches are those of the measurement, on the CPU and without results, with fewer rows and layers, which change no
kernel. torch.compile's kernels depend on the GPU's driver and cannot be compiled beforehand.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from unittest import mock

import torch
import triton_cache
from measure import CASES

from fastbert.model.positions import POSITIONS

CAPABILITY = 90
Launch = Callable[[], None]


def launches(folder: Path) -> Iterator[tuple[str, Launch]]:
    """Names and calls that launch the kernels of the measurement's steps."""
    import steps
    from correctness import encoder_cases, trained_options
    from throughput import POSITIONS as TIMED
    from throughput import SHAPES
    from work import Work

    cpu, work = torch.device("cpu"), Work(False, folder)
    yield "machine", lambda: steps.base_kernels(cpu, 128, 512)
    for length, _ in SHAPES:
        for position in TIMED:
            values = {"size": "base", "layers": 2, "length": length, "batch_size": 16, "position": position}
            yield f"throughput {length} {position}", lambda v=values: train(work, {**v, "dropout": 0.1})
    for length in (512, 128, 2048):
        yield f"peers {length}", lambda n=length: attend(n)
    for position in ("absolute", "tupe-r"):
        for dropout in (0.0, 0.1):
            for packed in (False, True):
                values = trained_options(position, dropout, packed, False)
                yield f"training {position} {dropout} {packed}", lambda v=values: train(work, v)
    for position in POSITIONS:
        for case, values, _ in encoder_cases(position):
            yield f"encoders {case}", lambda v=values: compare(work, v)
    for name, groups in CASES.items():
        for group in " ".join(groups).split():
            yield f"cases {name} {group}", lambda n=name, g=group: run_cases(n, g)


def train(work, values: dict) -> None:
    """A training step in bf16, and a validation."""
    setup = work.setup(values, "cpu", "bf16")
    trainer = work.trainer(setup, 1, log_every=1)
    trainer.train_step(0)
    setup.validate(trainer.objective)


def compare(work, values: dict) -> None:
    import correctness

    with mock.patch.object(correctness, "BATCHES", 1):
        for precision in ("fp32", "bf16"):
            machine = {"kernels": "auto", "compile": "off"}
            correctness.outcome(work, values, "cpu", precision, machine, torch.float32)


def attend(length: int) -> None:
    """The launches of the attention benchmark for one length."""
    from fastbert_kernels import attention
    from fastbert_kernels.benchmarks.attention import results, tensors
    from fastbert_kernels.benchmarks.measuring import Settings

    for biased in (True, False):
        for batch in (3, 16):
            *inputs, grad = tensors(Settings(Path()), length, biased, batch)
            results(attention, inputs, grad)


def run_cases(file: str, group: str) -> None:
    """A group of the test suite's cases, without its comparisons: results are uninitialized memory."""
    import steps

    module = steps.load_cases(file)
    for name in ("check", "compare"):  # of samples
        if hasattr(module, name):
            setattr(module, name, lambda *_: None)
    eager = mock.patch.object(torch, "compile", lambda function, **_: function)  # the same launches
    with eager, mock.patch.object(torch.testing, "assert_close"), mock.patch.object(torch.library, "opcheck", call):
        getattr(module, group)()


def call(operator, arguments) -> None:
    """The forward and the backward pass of an operator, for `torch.library.opcheck`."""
    outputs = operator(*arguments)
    first = outputs[0] if isinstance(outputs, tuple) else outputs
    if first.requires_grad:
        first.backward(torch.zeros_like(first))


@contextmanager
def quiet() -> Iterator[None]:
    with open(os.devnull, "w", encoding="utf-8") as nothing, redirect_stdout(nothing):
        yield


def compile_all(found: Iterator[tuple[str, Launch]], cache: Path) -> tuple[int, list[str]]:
    """Compile the kernels of all launches into the folder `cache`.

    Returns:
        Number of kernels; names of the launches that failed, with the error.
    """
    from fastbert_kernels.compilation import compile_target

    failed = []
    with mock.patch.dict(os.environ, triton_cache.environment(cache)):
        triton_cache.count_uses()
        for name, launch in found:
            before, start = len(triton_cache.USES), time.monotonic()
            try:
                with compile_target(CAPABILITY), quiet():
                    launch()
            except Exception as error:  # of any launch: the others are compiled
                failed.append(f"{name}: {type(error).__name__}: {error}".partition("\n")[0][:200])
            new = sum(not hit for _, hit in triton_cache.USES[before:])
            print(f"{time.monotonic() - start:4.0f} s, {new} new kernels: {name}", file=sys.stderr, flush=True)
    return len(list(cache.glob(f"*/{triton_cache.GROUP}"))), failed


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the file to write, such as cache.tar.xz")
    parser.add_argument("--only", default="", help="compile only launches whose name begins with this text")
    return parser


def main() -> int:
    args = (parser := command_line()).parse_args()
    if not os.access(args.file.absolute().parent, os.W_OK):
        parser.error(f"the folder {args.file.absolute().parent} does not exist or cannot be written")
    if __debug__:
        parser.error("run it as python3 -O: the test suite's cases must not check results, which are not computed")
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "triton"
        chosen = (one for one in launches(Path(folder) / "runs") if one[0].startswith(args.only))
        count, failed = compile_all(chosen, cache)
        triton_cache.pack(cache, args.file)
    import triton

    print(f"{count} kernels for capability 9.0 by Triton {triton.__version__}: {args.file.stat().st_size / 1e6:.1f} MB")
    print("\n".join(["", "failed:", *failed]) if failed else "")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
