"""`fastbert <job>`: parsing and calling, nothing else. Exit codes: 0 done, 2 the user's mistake, 1 ours, 130 and 143
interrupted, 141 when whoever read standard output went away."""

import errno
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fastbert import __version__
from fastbert.errors import UserError, choose, message_of


def prepare(arguments: list[str]) -> int:
    from fastbert.config import parse
    from fastbert.data.prepare import PrepareOptions
    from fastbert.data.prepare import prepare as run

    run(parse(PrepareOptions, arguments, "prepare"))
    return 0


def pretrain(arguments: list[str]) -> int:
    from fastbert.config import load_yaml, parse
    from fastbert.pretraining.job import pretrain as run
    from fastbert.pretraining.options import BUDGETS, PretrainOptions
    from fastbert.pretraining.run import stored_options

    name, default = "pretrain", None
    if arguments and not arguments[0].startswith("-"):
        default, name = load_yaml(PretrainOptions, arguments[0]), Path(arguments[0]).stem
        arguments = arguments[1:]
    arguments = name_resumed_run(arguments)
    if "--resume" in arguments and default is None and not {"-h", "--help"} & set(arguments):
        default = replace(stored_options(value_of("--out", arguments)), resume=True)
    elif default is not None and any(value_of(f"--{budget}", arguments) for budget in BUDGETS):
        default = replace(default, **dict.fromkeys(BUDGETS))  # a budget given by a flag replaces that of the file
    return run(parse(PretrainOptions, arguments, "pretrain", default), name)


def evaluate(arguments: list[str]) -> int:
    from fastbert.config import parse
    from fastbert.pretraining.held_out import EvaluateOptions
    from fastbert.pretraining.held_out import evaluate_text as run

    run(parse(EvaluateOptions, arguments, "evaluate"))
    return 0


def finetune(arguments: list[str]) -> int:
    from fastbert.config import load_yaml, parse
    from fastbert.finetuning.options import FinetuneOptions
    from fastbert.finetuning.several import finetune as run

    default = None
    if arguments and not arguments[0].startswith("-"):
        default, arguments = load_yaml(FinetuneOptions, arguments[0]), arguments[1:]
    return run(parse(FinetuneOptions, arguments, "finetune", default))


def predict(arguments: list[str]) -> int:
    from fastbert.config import parse
    from fastbert.finetuning.predict import PredictOptions
    from fastbert.finetuning.predict import predict as run

    run(parse(PredictOptions, arguments, "predict"))
    return 0


def submit(arguments: list[str]) -> int:
    from fastbert.config import parse
    from fastbert.finetuning.submit import SubmitOptions
    from fastbert.finetuning.submit import submit as run

    run(parse(SubmitOptions, arguments, "submit"))
    return 0


def export(arguments: list[str]) -> int:
    from fastbert.config import parse
    from fastbert.hub.job import ExportOptions
    from fastbert.hub.job import export as run

    arguments = list(arguments)
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--run", *arguments]
    run(parse(ExportOptions, arguments, "export"))
    return 0


def sweep(arguments: list[str]) -> int:
    from fastbert.config import parse
    from fastbert.experiments.options import SweepOptions, load_sweep

    file = arguments[0] if arguments and not arguments[0].startswith("-") else None
    axes, default = (None, None) if file is None else load_sweep(file)
    options = parse(SweepOptions, arguments if file is None else arguments[1:], "sweep", default)
    if axes is None:
        raise UserError("fastbert sweep needs a YAML file first, such as configs/sweep/glue.yaml")
    from fastbert.experiments.sweep import sweep as run

    return run(axes, options)


def ablate(arguments: list[str]) -> int:
    from fastbert.config import parse
    from fastbert.experiments.ablate_options import AblateOptions, load_ablation

    file = arguments[0] if arguments and not arguments[0].startswith("-") else None
    ablation, default = (None, None) if file is None else load_ablation(file)
    options = parse(AblateOptions, arguments if file is None else arguments[1:], "ablate", default)
    if ablation is None:
        raise UserError("fastbert ablate needs a YAML file first, such as configs/ablate/tiny.yaml")
    from fastbert.experiments.ablate import ablate as run

    return run(ablation, options)


def bench(arguments: list[str]) -> int:
    from fastbert.config import parse
    from fastbert.experiments.bench import BenchKernelsOptions, bench_kernels
    from fastbert.experiments.bench_data import BenchDataOptions, bench_data
    from fastbert.experiments.bench_throughput import BenchThroughputOptions, bench_throughput

    topics = {
        "throughput": (BenchThroughputOptions, bench_throughput, "the training loop beside transformers' BERT"),
        "data": (BenchDataOptions, bench_data, "preparing and drawing text beside the tokenizers library"),
        "kernels": (
            BenchKernelsOptions,
            bench_kernels,
            "the kernels beside PyTorch's, or what they take when compiled",
        ),
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = "\n".join(f"  {name:<11} {what}" for name, (*_, what) in topics.items())
        print(f"usage: fastbert bench <benchmark> [options]\n\nbenchmarks:\n{lines}\n")
        print("fastbert bench <benchmark> --help shows its options.")
        return 0 if arguments else 2
    options, run, _ = topics[choose("benchmark", arguments[0], topics)]
    return run(parse(options, arguments[1:], f"bench {arguments[0]}"))


JOBS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "prepare": (prepare, "raw text -> tokenizer and memory-mapped shards"),
    "pretrain": (pretrain, "train an encoder, or resume a run"),
    "ablate": (ablate, "a baseline and its variants at equal cost, and what share of it each needs"),
    "evaluate": (evaluate, "masked loss, accuracy and bits per byte on held-out text"),
    "finetune": (finetune, "fine-tune on GLUE or one's own tasks, over several seeds"),
    "sweep": (sweep, "fine-tune checkpoints on tasks over settings and seeds, and compare them"),
    "predict": (predict, "labels and probabilities of a fine-tuned model"),
    "submit": (submit, "the archive GLUE's server takes, or a check of one"),
    "export": (export, "a run as a Hugging Face folder"),
    "bench": (bench, "throughput, data or kernels beside their peers"),
}


def usage() -> str:
    jobs = "\n".join(f"  {name:<10} {what}" for name, (_, what) in JOBS.items())
    return (
        f"fastbert {__version__}: pretraining BERT-class encoders at a fraction of the usual cost\n\n"
        f"usage: fastbert <job> [options]\n\njobs:\n{jobs}\n\nfastbert <job> --help shows a job's options."
    )


def value_of(flag: str, arguments: list[str]) -> str | None:
    """The value of `flag` in a command line, before it is parsed."""
    for index, argument in enumerate(arguments):
        if argument == flag and index + 1 < len(arguments):
            return arguments[index + 1]
        if argument.startswith(f"{flag}="):
            return argument.split("=", 1)[1]
    return None


def name_resumed_run(arguments: list[str]) -> list[str]:
    """`--resume runs/x` is short for `--out runs/x --resume`."""
    if "--resume" in arguments:
        place = arguments.index("--resume") + 1
        if place < len(arguments) and not arguments[place].startswith("-"):
            return [*arguments[:place], "--out", *arguments[place:]]
    return list(arguments)


def _give_up_standard_output() -> None:
    """What is left to be written there is dropped, so that the interpreter's end does not try again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(__version__)
        return 0
    try:
        code = JOBS[choose("job", arguments[0], JOBS)][0](arguments[1:])
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # such as `| head`: nothing more can be said there, not by the interpreter's end either
        _give_up_standard_output()
        return 141
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _give_up_standard_output()  # of any other file it would be a UserError
        print("error: the disk is full, writing standard output; free some space", file=sys.stderr)
        return 2
    except UserError as error:
        print(f"error: {message_of(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def limit_spinning() -> None:
    """Shortens how long OpenMP threads spin while they wait, unless the user has set it; call before torch is imported.

    GNU's OpenMP, which torch uses on Linux, spins 300,000 rounds by default. A thread that has to share its core then
    burns whole time slices, and every parallel region waits for it. With 1,000 rounds training is as fast on an idle
    machine and 1.6 times as fast next to one busy process on one of two cores (docs/lab-notes.md).
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "1000"


def console_script() -> None:
    limit_spinning()
    sys.exit(main())


if __name__ == "__main__":
    console_script()
