"""Any value for any option of any job: exit code 0, or 2 with the reason in the last line and nothing left behind.

The options are found through the jobs. FASTBERT_FUZZ=5000 tries this many command lines instead of the few of the
suite, and others every time.
"""

import contextlib
import dataclasses
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert import cli, config
from fastbert import flags as command_line
from fastbert.errors import UserError
from fastbert.ranges import hints_of, plain
from fastbert.studies.ablate.options import load_ablation
from fastbert.studies.sweep.options import load_sweep
from tests.refusals.test_refusals import tree

LONG = int(os.environ.get("FASTBERT_FUZZ", "0"))

WHOLE = [-(2**64), -(2**31), -1, 0, 1, 2, 3, 7, 8, 100, 2**16, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**30]
REAL = [-1e308, -1.0, -0.0, 0.0, 5e-324, 1e-30, 0.5, 1.0, 1.5, 3.0, 1e30, 1e308, *map(float, ("inf", "-inf", "nan"))]
TEXT = ["", " ", "a\nb", "\0", "größe", "\udcff", "x" * 300, "x" * 5000]
TEXT += ["none", "None", "nan", "-1", "0", "0.3,nan", "1,1", ",", "1e400", "~", ".", "..", "/sys/none", "/dev/null"]
TEXT += ["folder", "file.txt", "pipe", "loop"]
TEXT += ["file.txt/x", "missing", "a/b", "hf:", "*", "[", "%s", "{}", "auto"]
KINDS = {int: WHOLE, float: REAL, str: TEXT, bool: [True, False]}


JOBS = dict(cli.OPTIONS)

# What each job needs to come as far as it can without real work.
GIVEN = {
    "prepare": {"source": "file.txt", "out": "out", "workers": 1, "vocab_size": 256},
    "merge": {"parts": ("missing",), "out": "out", "workers": 1},
    "extend-vocab": {"tokenizer": "missing", "source": "file.txt", "words": 10, "out": "out"},
    "pretrain": {"data": "prepared", "steps": 3, "dry_run": True, "layers": 1, "width": 8, "heads": 2, "length": 16}
    | {"batch_size": 2, "eval_sequences": 2, "out": "run", "machine": {"threads": 1}},
    "evaluate": {"model": "missing", "source": "file.txt"},
    "fill": {"model": "missing", "texts": ("[MASK]",)},
    "finetune": {"model": "missing", "task": "task.yaml", "out": "out"},
    "affinity": {"model": "missing", "tasks": "task.yaml,task.yaml", "out": "out"},
    "audit": {"model": "missing", "task": "task.yaml", "out": "out"},
    "predict": {"model": "missing", "source": "file.txt", "out": "out.jsonl"},
    "weak-label": {"task": "task.yaml", "functions": "missing", "out": "out"},
    "select": {"task": "task.yaml", "pool": "file.txt", "model": "missing", "count": 1, "out": "out.jsonl"},
    "submit": {"results": "missing", "out": "out.zip"},
    "export": {"run": "missing", "out": "out"},
    "sweep": {"out": "out"},
    "ablate": {"out": "out"},
    "active": {"out": "out"},
    "run": {"out": "out"},
    "report": {"runs": ("missing",), "out": "page.html"},
    "bench throughput": {"data": "missing"},
    "bench data": {"data": "missing"},
    "bench kernels": {"tune": True},
}


# What makes an option of fastbert pretrain count.
ACTIVE = {
    ("electra",): {"objective": "electra"},
    ("multiple_choice",): {"objective": "multiple-choice"},
    ("notes",): {"notes": {"enabled": True, "min_count": 50, "max_count": 500}},
    ("rope_base",): {"position": "rope"},
    ("schedule", "decay"): {"schedule": {"name": "wsd"}},
    ("optimizer", "momentum"): {"optimizer": {"name": "muon"}},
    ("first_fraction",): {"first_length": 8},
    ("first_offset",): {"first_length": 8},
    ("batch_warmup",): {"initial_batch_size": 1},
    ("tokens",): {"steps": None},
    ("minutes",): {"steps": None},
}


def values_of(job: str, name: tuple[str, ...], value: Any) -> dict[str, Any]:
    """The options of a command line that gives `name` a value, so that it counts."""
    values = dict(GIVEN[job])
    if job == "pretrain":
        for key, more in ACTIVE.items():
            values |= more if name[: len(key)] == key else {}
    return {key: one for key, one in with_value(values, name, value).items() if one is not None}


def plain_options(cls: type, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(groups and name, type) of each option as a file has it."""
    for field in dataclasses.fields(cls):
        kind = plain(hints_of(cls)[field.name])
        if dataclasses.is_dataclass(kind):
            yield from plain_options(kind, prefix if field.metadata.get("flat") else (*prefix, field.name))
        else:
            yield (*prefix, field.name), kind


def with_value(values: dict[str, Any], name: tuple[str, ...], value: Any) -> dict[str, Any]:
    """Nested mappings with another value."""
    if len(name) == 1:
        return values | {name[0]: value}
    return values | {name[0]: with_value(values.get(name[0], {}), name[1:], value)}


def flags(values: dict[str, Any], switches: set[str], prefix: str = "") -> list[str]:
    """The command line that gives these options; `switches` are the flags that stand without a value."""
    out: list[str] = []
    for key, value in values.items():
        name = key.replace("_", "-")
        if isinstance(value, dict):
            out += flags(value, switches, f"{prefix}{name}.")
        elif f"{prefix}{name}" in switches:
            out.append(f"--{prefix}{name}" if value else f"--{prefix}no-{name}")
        else:
            out.append(f"--{prefix}{name}={value}")
    return out


def values_for(kind: Any) -> list[Any]:
    return KINDS.get(kind, TEXT)


def works(job: str, name: tuple[str, ...], value: Any) -> bool:
    """Whether an accepted value would begin real work, which takes long."""
    if job == "prepare":
        return name == ("workers",) and value not in (1, -1)
    return (job, name) in {("bench kernels", ("tune",)), ("bench data", ("data",)), ("pretrain", ("dry_run",))}


EVERY = [
    (job, name, value)
    for job, cls in JOBS.items()
    for name, kind in plain_options(cls)
    for value in values_for(kind)
    if not works(job, name, value)
]


def outcome(give: Callable[[], Any]) -> str:
    try:
        return repr(give())
    except UserError:
        return "refused"


def test_every_value_of_every_option_is_accepted_or_refused_alike() -> None:
    """As a flag and in a file, each option alone."""
    tried = 0
    for job, cls in JOBS.items():
        for flag in command_line.flags_of(cls):
            read, convert = command_line._reader(flag), partial(config._convert, hint=flag.hint, where="x.yaml")
            for value in [] if flag.is_switch or flag.repeats else values_for(flag.kind):
                if value != "None":  # which on a command line is not text
                    found = outcome(partial(read, str(value))), outcome(partial(convert, value))
                    assert found[0] == found[1], (job, flag.name, value)
                    tried += 1
    assert tried > 3000
    assert GIVEN.keys() == JOBS.keys()


# A dry run that is accepted times few steps, and neither the machine nor the export.
FAST = {
    "fastbert.pretraining.dry_run.SECONDS": 0.0,
    "fastbert.pretraining.dry_run.finish": lambda *_: None,
    "fastbert.pretraining.build.peak_flops": lambda *_: (1e12, "the test"),
    "fastbert.pretraining.budget.MOST": 0.05,
}


@pytest.fixture(scope="module")
def folder(prepared: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "prepared").symlink_to(prepared)
    (folder / "folder").mkdir()
    (folder / "file.txt").write_text("one small text\n\nanother text\n\nand a third one\n")
    (folder / "task.yaml").write_text("train: train.tsv\ndev: train.tsv\n")
    (folder / "train.tsv").write_text("text\tlabel\na\t0\nb\t1\n")
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    return folder


def clean(folder: Path, before: set[tuple[str, int]]) -> None:
    """Removes what an accepted command line has written."""
    for path, _ in sorted(tree(folder) - before, reverse=True):
        with contextlib.suppress(OSError):
            os.rmdir(path) if Path(path).is_dir() and not Path(path).is_symlink() else os.unlink(path)


def test_any_command_line_ends_with_0_or_2(folder: Path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(folder)
    for attribute, fast in FAST.items():
        monkeypatch.setattr(attribute, fast)
    before, codes = tree(folder), Counter()

    @settings(max_examples=LONG or 40, derandomize=not LONG)
    @given(case=st.sampled_from(EVERY), as_file=st.booleans())
    def run(case, as_file: bool) -> None:
        job, name, value = case
        values = values_of(job, name, value)
        arguments = job.split()
        if as_file and job in ("pretrain", "finetune"):
            (folder.parent / "fuzz.yaml").write_text(yaml.safe_dump(values))
            arguments.append(str(folder.parent / "fuzz.yaml"))
        else:
            arguments += flags(values, {flag.name for flag in command_line.flags_of(JOBS[job]) if flag.is_switch})
        capfd.readouterr()
        try:
            code = cli.main(arguments)
        except SystemExit as stop:
            code = stop.code
        printed = capfd.readouterr()
        codes[code] += 1
        assert code in (0, 2), (arguments, printed)
        if code == 2:
            assert "Traceback" not in printed.err, (arguments, printed)
            assert printed.err.rstrip("\n").splitlines()[-1].startswith("error: "), (arguments, printed)
            assert "unknown option" not in printed.err, (arguments, printed)  # every option is one
            # Prepared text stays, and may be too short only then.
            left = {path for path, _ in tree(folder) - before if not path.startswith(str(folder / "data"))}
            assert not left and before <= tree(folder), (arguments, printed)
        clean(folder, before)

    run()
    assert codes[0] > 1 and codes[2] > 20


EVALUATE = {"pairs": "blimp", "pll": "text.txt"}
SWEEP = {"models": ["m"], "tasks": ["task.yaml"], "evaluate": EVALUATE}
ABLATION = {"base": {"steps": 9}, "variants": {"a": {}}, "tasks": ["task.yaml"], "evaluate": EVALUATE}
LISTS = [
    *[(load_sweep, SWEEP, (key,)) for key in ("models", "tasks", "seeds", "threads", "workers", "out")],
    *[(load_sweep, SWEEP, (key,)) for key in ("learning_rates", "batch_sizes", "epochs", "finetune")],
    *[(load_sweep, SWEEP, ("finetune", key)) for key in ("train_fraction", "dropout", "machine", "save_model")],
    *[(load_sweep, SWEEP, ("evaluate", key)) for key in (*EVALUATE, "pll_form", "sentences", "column", "machine")],
    *[(load_ablation, ABLATION, (key,)) for key in ("evaluate", "evaluate_at", "tasks_at")],
    *[(load_ablation, ABLATION, (key,)) for key in ("base", "variants", "baseline", "seeds", "checkpoints", "trials")],
    *[(load_ablation, ABLATION, ("anneal", key)) for key in ("fraction", "points")],
    *[(load_ablation, ABLATION, ("budget", key)) for key in ("equal", "steps", "tokens", "flops", "minutes")],
    *[(load_ablation, ABLATION, ("variants", "a", key)) for key in ("optimizer", "layers", "dropout")],
]


@settings(max_examples=LONG or 150, derandomize=not LONG)
@given(
    case=st.sampled_from(LISTS),
    values=st.lists(st.sampled_from([*WHOLE, *REAL, *TEXT, None, True, {}, {"a": 1}, [], [1]]), min_size=1, max_size=2),
    alone=st.booleans(),
)
def test_any_entry_of_a_sweep_or_an_ablation_is_read_or_refused(case, values: list, alone: bool) -> None:
    load, given_values, name = case
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.yaml")
        path.write_text(yaml.safe_dump(with_value(given_values, name, values[0] if alone else values)))
        try:
            load(path)
        except UserError as error:
            assert "\n" not in str(error)
