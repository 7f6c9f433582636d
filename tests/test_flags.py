"""The command line: values, defaults, errors and help, of a small dataclass and of every job."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastbert import config
from fastbert.cli import OPTIONS, main
from fastbert.errors import UserError
from fastbert.flags import EXAMPLES, TAKES_YAML, flags_of, help_of, parse
from fastbert.named_configs import config_path
from fastbert.option_hints import NAMES, REMARKS, hint_for
from tests.small_options import Inner, Lifted, Outer, write


def test_yaml_then_flags(tmp_path) -> None:
    path = write(tmp_path, "name: y\nlayers: 3\ninner:\n  rate: 1e-3\n")
    assert parse(Outer, [], "job", config.load_yaml(Outer, path)) == Outer("y", Inner(1e-3), Lifted(3))
    flags = ["--layers", "5", "--inner.rate", "0.5", "--fast"]
    assert parse(Outer, flags, "job", config.load_yaml(Outer, path)) == Outer("y", Inner(0.5), Lifted(5, True))
    assert parse(Outer, [], "job") == Outer()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--name", "a", "--name", "b"], "--name is given twice"),
        (["--name=a", "--name", "a"], "--name is given twice"),
        (["--inner.rate", "1", "--layers", "2", "--inner.rate=1"], "--inner.rate is given twice"),
        (["--fast", "--no-fast"], "--fast with --no-fast"),
        (["--long_name", "x", "--long-name=y"], "--long-name is given twice"),
    ],
)
def test_a_flag_given_twice_is_refused(flags, message) -> None:
    with pytest.raises(UserError, match=message):
        parse(Outer, flags, "job")


def test_values_are_no_flags() -> None:
    """Nor are flags of other groups that end alike."""
    assert parse(Outer, ["--name", "name", "--layers", "-1"], "job") == Outer("name", lifted=Lifted(-1))
    flags = ["--inner.rate", "1", "--speed.rate", "1", "--name", "--name=x".removeprefix("--")]
    assert parse(Outer, flags, "job") == Outer("name=x", Inner(1.0), speed=Inner(1.0))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--nam", "x"], r"unknown option --nam; did you mean --name\? See fastbert job --help"),
        (["--rate", "1"], r"unknown option --rate; did you mean --inner.rate or --speed.rate\?"),
        (["--ln", "x"], r"unknown option --ln; did you mean --long-name\?"),
        (["--long", "x"], r"unknown option --long; did you mean --long-name\?"),
        (["--zzz", "x"], r"unknown option --zzz; see fastbert job --help"),
        (["--inner.no-rate"], "unknown option --inner.no-rate"),
        (["--name"], "--name: a value is missing"),
        (["--name", "--fast"], "--name: a value is missing"),
        (["--layers", "two"], "--layers must be a whole number, not 'two'"),
        (["--layers", "1.5"], "--layers must be a whole number, not '1.5'"),
        (["--layers", "9" * 31], "--layers must be at most 2,147,483,647, not 999"),
        (["--inner.rate", "1_0"], "--inner.rate must be a finite number, not '1_0'; write 10$"),
        (["--inner.rate", "-1,5e3"], "not '-1,5e3'$"),
        (["--inner.rate", "1.000,5"], r"not '1\.000,5'$"),
        (["--inner.rate", "1e999"], "--inner.rate must be a finite number"),
        (["--fast", "false"], "'false' belongs to no option: --fast takes no value; leave it out, or give --no-fast"),
        (["--fast=yes"], "--fast takes no value; give it alone, or --no-fast for the opposite"),
        (["--name", "two", "words"], "'words' belongs to no option: --name takes one value; put quotes around"),
        (["x.yaml"], "'x.yaml' belongs to no option; a YAML file comes first"),
        (["-x"], "'-x' belongs to no option; options begin with --"),
    ],
)
def test_a_command_line_that_does_not_fit(flags, message) -> None:
    with pytest.raises(UserError, match=message):
        parse(Outer, flags, "job")


@pytest.mark.parametrize(
    ("line", "options"),
    [
        ("runs/x 'a b' - --top 3", {"model": "runs/x", "texts": ("a b", "-"), "top": 3}),
        ("--top 3 --json runs/x a b", {"model": "runs/x", "texts": ("a", "b"), "top": 3, "json": True}),
        ("a --model runs/x --json b", {"model": "runs/x", "texts": ("a", "b"), "json": True}),
        ("runs/x --texts a b --json", {"model": "runs/x", "texts": ("a", "b"), "json": True}),
        ("--model=runs/x", {"model": "runs/x"}),
    ],
)
def test_positional_options_need_no_flag(line: str, options: dict) -> None:
    assert parse(OPTIONS["fill"], shlex.split(line), "fill") == OPTIONS["fill"](**options)


def test_too_many_positional_arguments_are_refused() -> None:
    with pytest.raises(UserError, match="'y' belongs to no option"):
        parse(OPTIONS["export"], ["runs/x", "y", "--out", "z"], "export")


def test_numbers_as_people_write_them() -> None:
    assert parse(Outer, ["--layers", "1e3", "--inner.rate", "2"], "job") == Outer(inner=Inner(2.0), lifted=Lifted(1000))
    default = Outer(lifted=Lifted(3, True))
    assert parse(Outer, ["--layers", "None", "--no-fast"], "job", default) == Outer()
    assert parse(Outer, ["--name", "None"], "job") == Outer("None")  # text, where there is no None


@given(
    st.floats(1e-30, 1e30) | st.floats(-1e30, -1e-30) | st.just(0.0),
    st.integers(-(2**31) + 1, 2**31 - 1),
    st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1, max_size=9).filter(str.strip),
)
def test_values_come_through(rate: float, layers: int, name: str) -> None:
    flags = [f"--inner.rate={rate!r}", f"--layers={layers}", f"--name={name}"]
    assert parse(Outer, flags, "job") == Outer(name, Inner(rate), Lifted(layers))


def test_names_of_other_programs_lead_to_flags_that_exist() -> None:
    flags = {flag.name for options in OPTIONS.values() for flag in flags_of(options)}
    assert all(flag in flags for names in NAMES.values() for flag in names)
    jobs = [{flag.name for flag in flags_of(options)} for options in OPTIONS.values()]
    assert all(any(hint_for(name, job) for job in jobs) for name in {*NAMES, *REMARKS})


@pytest.mark.parametrize("job", OPTIONS)
def test_the_example_of_a_job_is_a_command_line_of_it(job: str) -> None:
    arguments = shlex.split(EXAMPLES[job])
    file = job in TAKES_YAML and not arguments[0].startswith("-")
    assert not file or Path(config_path(job, arguments[0])).is_file()
    parse(OPTIONS[job], arguments[file:], job)


def test_help_shows_each_default_once(capsys) -> None:
    for default, shown in ((None, "Layers.\n"), (Outer("y", lifted=Lifted(3)), "Layers. (given: 3)\n")):
        with pytest.raises(SystemExit) as stop:
            parse(Outer, ["--help", "--unknown"], "job", default)
        assert stop.value.code == 0
        printed = capsys.readouterr().out
        assert shown in printed and "A rate. (default: 0.1)" in printed
        assert "--fast, --no-fast" in printed


@pytest.mark.parametrize("job", OPTIONS)
def test_help_of_every_job(job: str, capsys, monkeypatch) -> None:
    """It fits a terminal of 80 columns, lists every flag, names choices, and has one default for each at most."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        main([*job.split(), "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert not [line for line in printed.splitlines() if line.endswith("-")]  # a name is never split at its hyphen
    text = " ".join(printed.split())
    for flag in flags_of(OPTIONS[job]):
        assert flag.help, f"{flag.name} has no docstring"
        assert flag.is_positional == (f"given without --{flag.name}." in text), flag.name
        entry = text.partition(f" --{flag.name}")[2].partition(" --")[0]
        shown = help_of(flag, None)
        assert shown.count("(default:") + shown.count("(required)") <= 1, flag.name
        for choice in flag.field.metadata.get("choices") or ():
            assert choice in entry, f"{flag.name} does not show {choice}"


WITHOUT_TORCH = """
pretrain --help
pretrain --data nowhere.txt --steps 5
merge nowhere --out x
pretrain --objective mln
pretrain --init-from nowhere --steps 5
evaluate --model nowhere --source nowhere.txt
fill nowhere [MASK]
finetune --model nowhere --task cola --out x
affinity --model nowhere --tasks cola,rte --out x
audit --model nowhere --task cola --out x
predict --model nowhere --source nowhere.csv --out x
submit --check nowhere.zip
export nowhere --out x
sweep nowhere.yaml
ablate nowhere.yaml
active --help
active nowhere.yaml
run --help
run nowhere.yaml
bench throughput --rounds 0
"""


def test_help_and_refusals_import_no_torch(tmp_path) -> None:
    script = """
import sys
from fastbert.cli import main
for line in sys.stdin:
    try:
        code = main(line.split())
    except SystemExit as stop:
        code = stop.code
    heavy = {"torch", "transformers", "datasets", "sklearn", "scipy"} & sys.modules.keys()
    print("RESULT", code, heavy or "", line, end="")
"""
    lines = WITHOUT_TORCH.strip().splitlines()
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, cwd=tmp_path, check=True)
    results = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert results == [f"{0 if '--help' in line else 2}  {line}" for line in lines], done.stderr
