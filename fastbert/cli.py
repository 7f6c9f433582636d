"""`fastbert <job>`: parses the command line and calls the job. Exit codes: 0 success, 2 user error, 1 internal error,
130 and 143 interrupted, 141 if the reader of standard output is gone. A closed standard error does not stop a job: see
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
from fastbert.downloads import with_downloads
from fastbert.errors import UserError, brief, choose, message_of
from fastbert.flags import EXAMPLES, normalized, parse
from fastbert.hub.folders import check_model_folder
from fastbert.named_configs import config_path
from fastbert.pretraining.misplaced import is_text, quoted, usage_hint
from fastbert.registry import Registry, imported
from fastbert.requirements import check_requirements, check_text, refuse_several_processes
from fastbert.streams import (
    flush_standard_output,
    give_up_standard_output,
    mute,
    prepare_streams,
    standard_output_fails,
    warn,
)
from fastbert.system_errors import reason, user_error

OPTIONS = Registry(
    {
        "prepare": "fastbert.data.prepare:PrepareOptions",
        "merge": "fastbert.data.merge:MergeOptions",
        "extend-vocab": "fastbert.data.extend:ExtendOptions",
        "pretrain": "fastbert.pretraining.options:PretrainOptions",
        "evaluate": "fastbert.pretraining.evaluate_options:EvaluateOptions",
        "fill": "fastbert.pretraining.fill_options:FillOptions",
        "finetune": "fastbert.finetuning.options:FinetuneOptions",
        "predict": "fastbert.finetuning.options:PredictOptions",
        "submit": "fastbert.finetuning.options:SubmitOptions",
        "weak-label": "fastbert.finetuning.weak.options:WeakLabelOptions",
        "affinity": "fastbert.finetuning.affinity.options:AffinityOptions",
        "audit": "fastbert.dataset_work.audit.options:AuditOptions",
        "select": "fastbert.dataset_work.selection.options:SelectOptions",
        "export": "fastbert.hub.options:ExportOptions",
        "sweep": "fastbert.studies.sweep.options:SweepOptions",
        "ablate": "fastbert.studies.ablate.options:AblateOptions",
        "active": "fastbert.studies.active.options:ActiveOptions",
        "run": "fastbert.studies.pipelines.options:RunOptions",
        "report": "fastbert.report.options:ReportOptions",
        "bench throughput": "fastbert.bench.options:BenchThroughputOptions",
        "bench data": "fastbert.bench.options:BenchDataOptions",
        "bench kernels": "fastbert.bench.options:BenchKernelsOptions",
    }
)
"""Options of each job. These modules import no torch; modules that do are imported when the options are checked."""


RUNS = Registry(
    {
        "prepare": "fastbert.data.prepare:prepare",
        "merge": "fastbert.data.merge:merge",
        "extend-vocab": "fastbert.data.extend:extend_vocabulary",
        "pretrain": "fastbert.pretraining.pretrain:pretrain",
        "pretrain --launch ray": "fastbert.pretraining.on_ray:pretrain_on_ray",
        "evaluate --source": "fastbert.pretraining.held_out:evaluate_text",
        "evaluate --pll": "fastbert.pretraining.zero_shot.evaluate:evaluate_zero_shot",
        "evaluate --pairs": "fastbert.pretraining.zero_shot.evaluate:evaluate_zero_shot",
        "fill": "fastbert.pretraining.fill:fill",
        "finetune": "fastbert.finetuning.several_tasks:finetune_tasks",
        "predict": "fastbert.finetuning.predict:predict",
        "submit": "fastbert.finetuning.submit:submit",
        "weak-label": "fastbert.finetuning.weak.weak_label:weak_label",
        "affinity": "fastbert.finetuning.affinity.affinity:affinity",
        "affinity --train": "fastbert.studies.affinity.compare:affinity_and_comparison",
        "audit": "fastbert.dataset_work.audit.audit:audit",
        "select": "fastbert.dataset_work.selection.select:select",
        "export": "fastbert.hub.export_run:export_run",
        "sweep": "fastbert.studies.sweep.sweep:sweep",
        "ablate": "fastbert.studies.ablate.ablate:ablate",
        "active": "fastbert.studies.active.active:active",
        "run": "fastbert.studies.pipelines.run:run_pipeline",
        "report": "fastbert.report.comparison:report",
        "bench throughput": "fastbert.bench.throughput:bench_throughput",
        "bench data": "fastbert.bench.data:bench_data",
        "bench kernels": "fastbert.bench.kernels:bench_kernels",
    }
)
"""Function that runs each job with its options."""


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
    elif (text := value_of("--branch", arguments)) and not {"--resume", "-h", "--help"} & set(arguments):
        from fastbert.pretraining.branch import branch_defaults

        if file is not None:
            raise UserError(f"--branch has the options of {text}; leave out {file}")
        default, name = branch_defaults(text), f"{Path(text.partition('@')[0]).name}-branch"
    elif default is not None and any(value_of(f"--{budget}", arguments) for budget in BUDGETS):
        default = replace(default, **dict.fromkeys(BUDGETS))  # a budget given by a flag overrides that of the file
    options = parse(OPTIONS["pretrain"], arguments, "pretrain", default)
    if not options.resume and options.branch is None:
        options.check_inputs()
    if idle := without_effect(options, arguments):
        have = "have" if len(idle) > 1 else "has"
        warn(f"{', '.join(idle)} {have} no effect, because {brief(options.data, str)} is already prepared")
    return RUNS["pretrain" if options.launch == "none" else "pretrain --launch ray"](with_downloads(options), name)


def without_effect(options: Any, arguments: list[str]) -> list[str]:
    """Flags in `arguments` without effect, because the data is already prepared and they apply only to a source of
    text. The same options are allowed in a YAML file, which may be used for both."""
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
    return RUNS["finetune"](with_downloads(options))


def check_and_run(job: str, arguments: list[str]) -> int:
    """Runs extend-vocab, fill, merge, predict, report, select, submit or weak-label."""
    options = parse(OPTIONS[job], arguments, job)
    options.check_inputs()
    RUNS[job](with_downloads(options))
    return 0


def audit(arguments: list[str]) -> int:
    options = parse(OPTIONS["audit"], arguments, "audit")
    options.check_inputs()
    return RUNS["audit"](with_downloads(options))


def affinity(arguments: list[str]) -> int:
    options = parse(OPTIONS["affinity"], arguments, "affinity")
    options.check_inputs()
    return RUNS["affinity --train" if options.train else "affinity"](with_downloads(options))


def evaluate(arguments: list[str]) -> int:
    options = parse(OPTIONS["evaluate"], arguments, "evaluate")
    options.check_inputs()
    RUNS[f"evaluate --{options.measurement}"](with_downloads(options))
    return 0


def export(arguments: list[str]) -> int:
    options = parse(OPTIONS["export"], arguments, "export")
    check_model_folder(options.run)
    RUNS["export"](with_downloads(options))
    return 0


def study(job: str, load: str, arguments: list[str]) -> int:
    """Runs sweep, ablate, active or run. The function at `load` reads the study and the options from the YAML file."""
    file, arguments = yaml_file(job, arguments)
    compared, default = (None, None) if file is None else imported(load)(file)
    options = parse(OPTIONS[job], arguments, job, default)
    if compared is None:
        raise UserError(f"fastbert {job} needs a YAML file as its first argument, such as {EXAMPLES[job].split()[0]}")
    compared.check_inputs(options.glue_dir)
    try:
        compared = with_downloads(compared)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return RUNS[job](compared, options)


def bench(arguments: list[str]) -> int:
    topics = {
        "throughput": "the training loop compared with transformers' BERT",
        "data": "preparing and reading text compared with the tokenizers library",
        "kernels": "the kernels compared with PyTorch's, or their resource usage",
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = "\n".join(f"  {name:<11} {what}" for name, what in topics.items())
        print(f"usage: fastbert bench <benchmark> [options]\n\nbenchmarks:\n{lines}\n")
        print("fastbert bench <benchmark> --help shows its options.")
        return 0 if arguments else 2
    topic = choose("benchmark", arguments[0], topics)
    options = parse(OPTIONS[f"bench {topic}"], arguments[1:], f"bench {topic}")
    return RUNS[f"bench {topic}"](options)


def completion(arguments: list[str]) -> int:
    from fastbert.completion import HOW
    from fastbert.completion import completion as script

    if not arguments or {"-h", "--help"} & set(arguments):
        print(HOW)
        return 0 if arguments else 2
    if len(arguments) > 1:
        raise UserError(f"fastbert completion takes one argument, the shell, not {brief(arguments[1])} too")
    print(script(arguments[0], {name: what for name, (_, what) in JOBS.items()}, dict(OPTIONS)))
    return 0


JOBS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "prepare": (prepare, "train a tokenizer and tokenize text into memory-mapped shards"),
    "merge": (partial(check_and_run, "merge"), "join the parts that prepare --part wrote on several machines"),
    "extend-vocab": (
        partial(check_and_run, "extend-vocab"),
        "append entries for the words of a new domain or language",
    ),
    "pretrain": (pretrain, "train an encoder, or resume a run"),
    "ablate": (
        partial(study, "ablate", "fastbert.studies.ablate.options:load_ablation"),
        "compare pretraining variants at equal cost",
    ),
    "evaluate": (evaluate, "measure a model on held-out text, sentences or minimal pairs, without fine-tuning"),
    "fill": (partial(check_and_run, "fill"), "predict the most likely words for each [MASK]"),
    "finetune": (finetune, "fine-tune on GLUE or custom tasks, over several seeds"),
    "affinity": (affinity, "measure which tasks help each other, and group them"),
    "sweep": (
        partial(study, "sweep", "fastbert.studies.sweep.options:load_sweep"),
        "compare checkpoints by fine-tuning on tasks, settings and seeds",
    ),
    "active": (
        partial(study, "active", "fastbert.studies.active.options:load_active"),
        "compare ways to choose texts to label and to train in rounds",
    ),
    "run": (
        partial(study, "run", "fastbert.studies.pipelines.load:load_pipeline"),
        "run a pipeline: pretrain models, fine-tune and evaluate them, compare them in one table",
    ),
    "report": (partial(check_and_run, "report"), "compare runs on one HTML page: curves, options, results, speed"),
    "predict": (partial(check_and_run, "predict"), "predict labels and probabilities with a fine-tuned model"),
    "weak-label": (partial(check_and_run, "weak-label"), "label the training texts of a task with labelling functions"),
    "audit": (audit, "find labels that are likely wrong, duplicates, and the worth of more labels"),
    "select": (partial(check_and_run, "select"), "select the texts of a pool to label next"),
    "submit": (partial(check_and_run, "submit"), "write or check the archive for GLUE's server"),
    "export": (export, "export a run as a Hugging Face folder"),
    "bench": (bench, "compare the speed of training, data or kernels with other libraries"),
    "completion": (completion, "print a script that completes commands in a shell"),
}


def usage() -> str:
    jobs = "\n".join(f"  {name:<12} {what}" for name, (_, what) in JOBS.items())
    return (
        f"fastbert {__version__}: pretraining BERT-class encoders at a fraction of the usual cost\n\n"
        f"usage: fastbert <job> [options]\n\njobs:\n{jobs}\n\nfastbert <job> --help shows a job's options.\n"
        f"example: fastbert prepare {EXAMPLES['prepare']}"
    )


def yaml_file(job: str, arguments: list[str]) -> tuple[str | None, list[str]]:
    """The YAML file that may be the first argument, by path or by name, and the other arguments.

    Raises:
        UserError: the first argument is a folder, or text to pretrain on.
    """
    if not arguments or arguments[0].startswith("-"):
        return None, arguments
    path = Path(arguments[0])
    if path.is_dir():
        raise UserError(f"configuration file {path} is a folder; {folder_hint(job, path)}")
    if job == "pretrain" and is_text(path):
        raise UserError(f"{path} is text, not a YAML file; give it as --data {quoted(path)}")
    return config_path(job, arguments[0]), arguments[1:]


def folder_hint(job: str, folder: Path) -> str:
    """Advice if a folder is given instead of the YAML file of `job`."""
    if job == "pretrain":
        return usage_hint(folder) or "give a file"
    if job == "finetune":
        return f"give a file, and a model as --model {quoted(folder)}"
    return "give a file; to continue the study in a folder, repeat the command that started it"


def value_of(flag: str, arguments: list[str]) -> str | None:
    """The value of `flag` in a command line, before it is parsed."""
    for index, argument in enumerate(arguments):
        if argument == flag and index + 1 < len(arguments) and not arguments[index + 1].startswith("--"):
            return arguments[index + 1]
        if argument.startswith(f"{flag}="):
            return argument.split("=", 1)[1]
    return None


def name_resumed_run(arguments: list[str]) -> list[str]:
    """`--resume runs/x` is short for `--out runs/x --resume`."""
    if "--resume" in arguments:
        index = arguments.index("--resume") + 1
        if index < len(arguments) and not arguments[index].startswith("-"):
            return [*arguments[:index], "--out", *arguments[index:]]
    return list(arguments)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    prepare_streams()
    try:
        try:
            return run_command(arguments)
        finally:
            flush_standard_output()
    except BrokenPipeError:  # as with `| head`: nothing more can be written, not even by the interpreter
        if not standard_output_fails():
            raise
        give_up_standard_output()
        return 141
    except OSError as error:
        if not standard_output_fails():  # for any other file it is a UserError
            raise
        give_up_standard_output()
        what, remedy = reason(error) or (error.strerror, "check its destination")
        print(f"error: {what} while writing standard output; {remedy.partition(' or ')[0]}", file=sys.stderr)
        return 2


def run_command(arguments: list[str]) -> int:
    """Runs the job in `arguments` and returns the exit code; prints user errors and raises internal ones."""
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
    if not first_of_machine() and (not arguments or {"-h", "--help"} & set(arguments)):
        return 0 if arguments else 2  # the first process prints the help
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(usage())
            return 0 if arguments else 2
        if arguments[0] == "--version":
            print(__version__)
            return 0
        check_text(arguments)
        name = choose("job", arguments[0], JOBS)
        job, _ = JOBS[name]
        if not {"-h", "--help"} & set(arguments):
            check_requirements()
            refuse_several_processes(os.environ, name)
            mute(not first_of_machine())
        return job(arguments[1:])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # `user_error` knows which are; all others are raised again
        found = None if isinstance(error, OSError) and standard_output_fails() else user_error(error)
        if found is None:
            raise
        if first_of_machine():
            print(f"error: {message_of(found)}", file=sys.stderr)
        return 2


def first_of_machine() -> bool:
    """Returns False for all but one process of torchrun on a machine. They find the same user errors in their options,
    and print the same warnings and help."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("LOCAL_RANK", "0") == "0"


def limit_spinning() -> None:
    """Shortens the time that waiting OpenMP threads spin, unless the user has set it; must be called before torch is
    imported.

    GNU's OpenMP, which torch uses on Linux, spins 300,000 rounds by default. On a core that also runs other processes,
    a thread then wastes whole time slices, and every parallel region waits for it. With 1,000 rounds training is as
    fast on an idle machine and 1.6 times as fast next to one busy process on one of two cores (docs/lab-notes.md).
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "1000"


def console_script() -> None:
    limit_spinning()
    sys.exit(main())
