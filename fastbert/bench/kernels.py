"""`fastbert bench kernels`: the resources of the compiled kernels, the fastest configuration on this GPU, and their
speed compared with PyTorch's. The benchmarks are those of `fastbert_kernels.benchmarks`."""

import json
from pathlib import Path

import torch

from fastbert.bench.options import BenchKernelsOptions
from fastbert.errors import UserError
from fastbert.outputs import check_output_folder
from fastbert.records import json_text
from fastbert.streams import echo
from fastbert.training.hardware import describe_machine, setup_machine
from fastbert.training.options import MachineOptions


def bench_kernels(options: BenchKernelsOptions) -> int:
    """Runs the chosen benchmarks and prints their results; returns the exit code.

    Raises:
        UserError: Triton is missing, there is no GPU to tune for, or the folder cannot be written.
    """
    cuda = torch.cuda.is_available()
    if options.tune and not cuda:
        raise UserError("--tune times configurations on a GPU, and torch finds none; --compile-only needs none")
    try:
        import triton  # noqa: F401
    except ImportError:
        raise UserError("fastbert bench kernels needs Triton: pip install triton") from None
    from fastbert_kernels.benchmarks import attention, attention_cpu, compiled, vocabulary
    from fastbert_kernels.benchmarks.measuring import Settings
    from fastbert_kernels.benchmarks.report import report

    settings = Settings(Path(options.out), options.seconds, options.rounds)
    check_output_folder(settings.out)
    if options.compile_only:
        done = [compiled.compiled(settings)]
    elif options.tune:
        done = [attention.tune(settings, save=True)]
    elif cuda:
        done = [attention.bench(settings), vocabulary.vocabulary(settings)]
    else:
        setup_machine(MachineOptions(), torch.device("cpu"))
        done = [attention_cpu.bench(settings)]
    machine = describe_machine()
    written = report(settings.out, machine["commit"])
    if options.json:
        print(
            json_text(
                {"machine": machine, "results": [json.loads(rows.path.read_text(encoding="utf-8")) for rows in done]}
            )
        )
    else:
        for rows in done:
            print(rows.path.with_suffix(".md").read_text(encoding="utf-8"))
    echo(f"wrote {', '.join(map(str, [*(rows.path for rows in done), *written]))}")
    return 0
