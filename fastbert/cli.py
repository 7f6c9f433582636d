"""`fastbert <job>`: parsing and calling, nothing else. Exit codes: 0 done, 2 user error, 1 internal error, 130 and 143
interrupted, 141 when the reader of standard output is gone. Lost progress and messages end nothing: see
`fastbert.streams`."""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fastbert import __version__
from fastbert.config import load_yaml
from fastbert.errors import UserError, brief, choose, message_of
from fastbert.flags import EXAMPLES, normalized, parse
from fastbert.hub.folders import check_model_folder
from fastbert.named_configs import config_path
from fastbert.registry import Registry, imported
from fastbert.requirements import check_requirements, check_text, refuse_several_processes
from fastbert.streams import (
    flush_standard_output,
    give_up_standard_output,
    prepare_streams,
    standard_output_fails,
    warn,
)
from fastbert.system_errors import reason, user_error

OPTIONS = Registry(
    {
        "prepare": "fastbert.data.prepare:PrepareOptions",
        "pretrain": "fastbert.pretraining.options:PretrainOptions",
        "evaluate": "fastbert.pretraining.options:EvaluateOptions",
        "fill": "fastbert.pretraining.fill_options:FillOptions",
        "finetune": "fastbert.finetuning.options:FinetuneOptions",
        "predict": "fastbert.finetuning.options:PredictOptions",
        "submit": "fastbert.finetuning.options:SubmitOptions",
        "export": "fastbert.hub.options:ExportOptions",
        "sweep": "fastbert.studies.sweep.options:SweepOptions",
        "ablate": "fastbert.studies.ablate.options:AblateOptions",
        "report": "fastbert.report.options:ReportOptions",
        "bench throughput": "fastbert.bench.options:BenchThroughputOptions",
        "bench data": "fastbert.bench.options:BenchDataOptions",
        "bench kernels": "fastbert.bench.options:BenchKernelsOptions",
    }
)
"""What each job takes. These modules import no torch; what does is imported when the options have been checked."""


RUNS = Registry(
    {
        "prepare": "fastbert.data.prepare:prepare",
        "pretrain": "fastbert.pretraining.pretrain:pretrain",
        "evaluate": "fastbert.pretraining.held_out:evaluate_text",
        "fill": "fastbert.pretraining.fill:fill",
        "finetune": "fastbert.finetuning.several_tasks:finetune_tasks",
        "predict": "fastbert.finetuning.predict:predict",
        "submit": "fastbert.finetuning.submit:submit",
        "export": "fastbert.hub.export_run:export_run",
        "sweep": "fastbert.studies.sweep.sweep:sweep",
        "ablate": "fastbert.studies.ablate.ablate:ablate",
        "report": "fastbert.report.comparison:report",
        "bench throughput": "fastbert.bench.throughput:bench_throughput",
        "bench data": "fastbert.bench.data:bench_data",
        "bench kernels": "fastbert.bench.kernels:bench_kernels",
    }
)
"""What does each job, given its options."""


def prepare(arguments: list[str]) -> int:
    RUNS["prepare"](parse(OPTIONS["prepare"], arguments, "prepare"))
    return 0


def pretrain(arguments: list[str]) -> int:
    from fastbert.pretraining.options import BUDGETS

    name, default = "pretrain", None
    file, arguments = yaml_file("pretrain", arguments)
    if file is not None:
        default, name = load_yaml(OPTIONS["pretrain"], file), Path(file).stem
    arguments = name_resumed_run(arguments)
    if "--resume" in arguments and default is None and not {"-h", "--help"} & set(arguments):
        from fastbert.pretraining.run import stored_options

        default = replace(stored_options(value_of("--out", arguments)), resume=True)
    elif default is not None and any(value_of(f"--{budget}", arguments) for budget in BUDGETS):
        default = replace(default, **dict.fromkeys(BUDGETS))  # a budget given by a flag replaces that of the file
    options = parse(OPTIONS["pretrain"], arguments, "pretrain", default)
    if not options.resume:
        options.check_inputs()
    if idle := without_effect(options, arguments):
        have = "have" if len(idle) > 1 else "has"
        warn(f"{', '.join(idle)} {have} no effect, as {brief(options.data, str)} is prepared already")
    return RUNS["pretrain"](options, name)


def without_effect(options: Any, arguments: list[str]) -> list[str]:
    """The flags among `arguments` that only count for a source, where the data of a pretraining is prepared. In a YAML
    file they are no mistake: it may serve for both."""
    from fastbert.pretraining.options import SOURCE_ONLY

    if not (Path(options.data) / "dataset.json").is_file():
        return []
    names = {flag for name in SOURCE_ONLY for flag in (f"--{name}".replace("_", "-"), f"--no-{name}".replace("_", "-"))}
    typed = [normalized(argument).partition("=")[0] for argument in arguments if argument.startswith("--")]
    return [flag for flag in typed if flag in names]


def finetune(arguments: list[str]) -> int:
    file, arguments = yaml_file("finetune", arguments)
    default = None if file is None else load_yaml(OPTIONS["finetune"], file)
    options = parse(OPTIONS["finetune"], arguments, "finetune", default)
    options.check_inputs()
    return RUNS["finetune"](options)


def use_model(job: str, arguments: list[str]) -> int:
    """evaluate, fill, predict or submit."""
    options = parse(OPTIONS[job], arguments, job)
    options.check_inputs()
    RUNS[job](options)
    return 0


def export(arguments: list[str]) -> int:
    options = parse(OPTIONS["export"], arguments, "export")
    check_model_folder(options.run)
    RUNS["export"](options)
    return 0


def study(job: str, load: str, arguments: list[str]) -> int:
    """sweep or ablate, whose YAML file the function at `load` reads: what is compared, and the options."""
    file, arguments = yaml_file(job, arguments)
    compared, default = (None, None) if file is None else imported(load)(file)
    options = parse(OPTIONS[job], arguments, job, default)
    if compared is None:
        raise UserError(f"fastbert {job} needs a YAML file first, such as {EXAMPLES[job].split()[0]}")
    compared.check_inputs(options.glue_dir)
    return RUNS[job](compared, options)


def report(arguments: list[str]) -> int:
    """Runs may stand anywhere without a flag: `fastbert report runs/a runs/b --out page`."""
    if "--runs" not in arguments:
        values = {index + 1 for index, argument in enumerate(arguments) if argument == "--out"}
        bare = [one for index, one in enumerate(arguments) if not one.startswith("-") and index not in values]
        flags = [one for index, one in enumerate(arguments) if one.startswith("-") or index in values]
        arguments = ["--runs", *bare, *flags] if bare else flags
    options = parse(OPTIONS["report"], arguments, "report")
    options.check_inputs()
    return RUNS["report"](options)


def bench(arguments: list[str]) -> int:
    topics = {
        "throughput": "the training loop compared with transformers' BERT",
        "data": "preparing and reading text compared with the tokenizers library",
        "kernels": "the kernels compared with PyTorch's, or what they need when compiled",
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = "\n".join(f"  {name:<11} {what}" for name, what in topics.items())
        print(f"usage: fastbert bench <benchmark> [options]\n\nbenchmarks:\n{lines}\n")
        print("fastbert bench <benchmark> --help shows its options.")
        return 0 if arguments else 2
    topic = choose("benchmark", arguments[0], topics)
    options = parse(OPTIONS[f"bench {topic}"], arguments[1:], f"bench {topic}")
    return RUNS[f"bench {topic}"](options)


JOBS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "prepare": (prepare, "raw text -> tokenizer and memory-mapped shards"),
    "pretrain": (pretrain, "train an encoder, or resume a run"),
    "ablate": (
        partial(study, "ablate", "fastbert.studies.ablate.options:load_ablation"),
        "a baseline and its variants compared at equal cost",
    ),
    "evaluate": (partial(use_model, "evaluate"), "masked loss, accuracy and bits per byte on held-out text"),
    "fill": (partial(use_model, "fill"), "the likeliest words for each [MASK] in a text"),
    "finetune": (finetune, "fine-tune on GLUE or custom tasks, over several seeds"),
    "sweep": (
        partial(study, "sweep", "fastbert.studies.sweep.options:load_sweep"),
        "fine-tune checkpoints on tasks, settings and seeds; compare",
    ),
    "report": (report, "runs compared on one HTML page: curves, options, results, speed"),
    "predict": (partial(use_model, "predict"), "labels and probabilities of a fine-tuned model"),
    "submit": (partial(use_model, "submit"), "the archive GLUE's server takes, or a check of one"),
    "export": (export, "a run as a Hugging Face folder"),
    "bench": (bench, "throughput, data or kernels compared with their peers"),
}


def usage() -> str:
    jobs = "\n".join(f"  {name:<10} {what}" for name, (_, what) in JOBS.items())
    return (
        f"fastbert {__version__}: pretraining BERT-class encoders at a fraction of the usual cost\n\n"
        f"usage: fastbert <job> [options]\n\njobs:\n{jobs}\n\nfastbert <job> --help shows a job's options.\n"
        f"example: fastbert prepare {EXAMPLES['prepare']}"
    )


def yaml_file(job: str, arguments: list[str]) -> tuple[str | None, list[str]]:
    """The YAML file that may be the first argument, by path or by name, and the other arguments."""
    if arguments and not arguments[0].startswith("-"):
        return config_path(job, arguments[0]), arguments[1:]
    return None, arguments


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


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    prepare_streams()
    try:
        try:
            return run_command(arguments)
        finally:
            flush_standard_output()
    except BrokenPipeError:  # such as `| head`: nothing more can be said there, not by the interpreter's end either
        if not standard_output_fails():
            raise
        give_up_standard_output()
        return 141
    except OSError as error:
        if not standard_output_fails():  # of any other file it would be a UserError
            raise
        give_up_standard_output()
        what, remedy = reason(error) or (error.strerror, "check where it leads to")
        print(f"error: {what}, writing standard output; {remedy.partition(' or ')[0]}", file=sys.stderr)
        return 2


def run_command(arguments: list[str]) -> int:
    """Runs the job that `arguments` name; user errors are printed, internal ones raised. Returns the exit code."""
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(usage())
            return 0 if arguments else 2
        if arguments[0] == "--version":
            print(__version__)
            return 0
        check_text(arguments)
        job, _ = JOBS[choose("job", arguments[0], JOBS)]
        if not {"-h", "--help"} & set(arguments):
            check_requirements()
            refuse_several_processes(os.environ)
        return job(arguments[1:])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (UserError, OSError, ImportError, MemoryError, RuntimeError) as error:
        found = None if isinstance(error, OSError) and standard_output_fails() else user_error(error)
        if found is None:
            raise
        print(f"error: {message_of(found)}", file=sys.stderr)
        return 2


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
