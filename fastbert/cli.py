"""`fastbert <job>`: parsing and calling, nothing else. Exit codes: 0 done, 2 the user's mistake, 1 ours, 130 and 143
interrupted."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fastbert import __version__
from fastbert.errors import UserError, choose


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
    from fastbert.finetuning.job import finetune as run
    from fastbert.finetuning.options import FinetuneOptions

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


def export(arguments: list[str]) -> int:
    from fastbert.config import parse
    from fastbert.hub.job import ExportOptions
    from fastbert.hub.job import export as run

    arguments = list(arguments)
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--run", *arguments]
    run(parse(ExportOptions, arguments, "export"))
    return 0


JOBS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "prepare": (prepare, "raw text -> tokenizer and memory-mapped shards"),
    "pretrain": (pretrain, "train an encoder, or resume a run"),
    "evaluate": (evaluate, "masked loss, accuracy and bits per byte on held-out text"),
    "finetune": (finetune, "fine-tune on GLUE or one's own task, over several seeds"),
    "predict": (predict, "labels and probabilities of a fine-tuned model"),
    "export": (export, "a run as a Hugging Face folder"),
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


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(__version__)
        return 0
    try:
        return JOBS[choose("job", arguments[0], JOBS)][0](arguments[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def console_script() -> None:
    sys.exit(main())


if __name__ == "__main__":
    console_script()
