"""Ablations with `mode: data`: variants that differ in their data are compared on fixed validation splits. One ablation
of seconds, from the weights of a run; plans; refusals."""

import json
import re
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from fastbert.cli import main
from fastbert.data.tokenizer_folders import load_tokenizer
from fastbert.errors import UserError
from fastbert.studies.ablate.ablate import describe_ablation, measured, report_ablation
from fastbert.studies.ablate.comparability import check_measure
from fastbert.studies.ablate.fixed_splits import planned_reasons
from fastbert.studies.ablate.measures import AblationResults
from fastbert.studies.ablate.options import load_ablation
from fastbert.studies.ablate.pretrain_jobs import pretrain_job
from tests.pretraining.test_continue import NEW_WORDS, prepare_with
from tests.studies.conftest import CPU, SMALL, losses, read_rows, time_steps

VARIANTS = ("0 %", "25 %", "scratch")


@pytest.fixture(scope="module")
def new(prepared: Path, tmp_path_factory) -> Path:
    """Later addresses, with the tokenizer of `prepared`."""
    return prepare_with(load_tokenizer(prepared), tmp_path_factory.mktemp("new") / "new", 200)


@pytest.fixture(scope="module")
def grown(prepared: Path, tmp_path_factory) -> Path:
    """The same with a vocabulary that begins with that of `prepared`."""
    words = load_tokenizer(prepared)
    more = replace(words, tokens=(*words.tokens, *NEW_WORDS))
    return prepare_with(more, tmp_path_factory.mktemp("grown") / "grown", 200)


@pytest.fixture(scope="module")
def run(prepared: Path, tmp_path_factory) -> Path:
    """A run on the old data, from which variants start."""
    folder = tmp_path_factory.mktemp("run")
    options = SMALL | {"data": str(prepared), "steps": 4, "machine": CPU | {"threads": 1}}
    (folder / "run.yaml").write_text(yaml.safe_dump(options))
    assert main(["pretrain", str(folder / "run.yaml"), "--out", str(folder / "out")]) == 0
    return folder / "out"


def contents(prepared: Path, new: Path, **changes) -> dict:
    """Contents of the YAML file of an ablation on data, old and new."""
    values = {
        "mode": "data",
        "base": SMALL | {"data": str(new), "machine": CPU, "optimizer": {"learning_rate": 3e-3}},
        "validation": {"old": str(prepared), "later-years": str(new)},
        "variants": {
            "0 %": None,
            "25 %": {"replay": {"data": str(prepared), "fraction": 0.25}},
            "scratch": {"init_from": None},
        },
        "budget": {"equal": "flops", "steps": 10},
        "seeds": 2,
        "anneal": {"points": [0.5, 1.0], "fraction": 0.2},
    }
    return values | changes


def write(folder: Path, values: dict) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "data.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return str(folder / "data.yaml")


@pytest.fixture(scope="module")
def ablation(prepared: Path, new: Path, run: Path, tmp_path_factory) -> Path:
    """The YAML file of the ablation of this module; it starts from the run."""
    values = contents(prepared, new)
    values["base"]["init_from"] = str(run)
    return Path(write(tmp_path_factory.mktemp("ablation"), values))


@pytest.fixture(scope="module")
def out(ablation: Path, tmp_path_factory) -> Path:
    """Its results."""
    out = tmp_path_factory.mktemp("out") / "out"
    with pytest.MonkeyPatch.context() as patch:
        time_steps(patch, lambda *given: 0.1)
        assert main(["ablate", str(ablation), "--out", str(out)]) == 0
    return out


def metrics(run: Path) -> dict[tuple[str, int], float]:
    """(Split, step) -> loss in the records of a run."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {(record["split"], record["step"]): record["loss"] for record in records}


def test_rows_hold_the_losses_on_the_splits(out, run) -> None:
    """As in the records of each training; it starts from the loss with which the run ended."""
    rows = read_rows(out)
    assert [row["kind"] for row in rows] == ["pretrain", "branch"] * 6
    for row in rows:
        found = metrics(out / "jobs" / row["id"] / "run")
        for validation in row["validations"]:
            for name in ("old", "later-years"):
                key = f"validation/study-{name}", validation["step"]
                assert validation["splits"][name]["loss"] == found[key]
        assert [validation["step"] for validation in row["validations"]][0] == 0
        ended = metrics(run)["validation", 4]
        assert (row["validations"][0]["splits"]["old"]["loss"] == ended) == (row["model"] != "scratch")


def test_fractions_differ_only_in_replay(out, new) -> None:
    rows = [row for row in read_rows(out) if row["kind"] == "pretrain" and row["seed"] == 1]
    runs = {row["model"]: out / "jobs" / row["id"] / "run" for row in rows}
    plain, replayed, scratch = (yaml.safe_load((runs[name] / "config.yaml").read_text()) for name in VARIANTS)
    assert {key for key in plain if plain[key] != replayed[key]} == {"replay", "out"}
    assert replayed["replay"]["fraction"] == 0.25 and replayed["replay"]["seed"] == 0  # of the run
    assert {key for key in plain if plain[key] != scratch[key]} >= {"init_from", "out"}
    assert scratch["init_from"] is None and scratch["data"] == plain["data"] == str(new.resolve())
    assert metrics(runs["0 %"])["validation", 0] == metrics(runs["25 %"])["validation", 0]
    assert ("validation/old", 0) in metrics(runs["25 %"]) and ("validation/old", 0) not in metrics(runs["0 %"])


def cells_of(report: str, heading: str) -> dict[str, list[str]]:
    """Rows of the first table below a heading by their first cell."""
    table = report.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in rows}


def test_the_report_shows_what_was_learned_and_forgotten(out, prepared, new) -> None:
    report = (out / "report" / "report.md").read_text()
    assert "same data" not in report and f"held-out documents: old ({prepared}) and later-years ({new})" in report
    assert "## Learned and forgotten" in report and "text differ" in report.replace("texts", "text")
    losses = ["loss on old", "loss on later-years", "mean loss"]
    assert re.findall("^## By (.*)$", report, re.MULTILINE) == losses
    table = cells_of(report, "Learned and forgotten")
    head = [f"{name}: {when}" for name in ("old", "later-years") for when in ("start", "end", "change")]
    assert table["variant"] == ["seeds", *head, "mean: end"]
    for name in VARIANTS:
        trunks = [row for row in read_rows(out) if row["model"] == name and row["kind"] == "pretrain"]
        found = [metrics(out / "jobs" / row["id"] / "run") for row in trunks]
        expected, means = ["2"], [0.0, 0.0]
        for split in ("validation/study-old", "validation/study-later-years"):
            starts, ends = ([records[split, step] for records in found] for step in (0, 12))
            means = [mean + end / 2 for mean, end in zip(means, ends, strict=True)]
            changes = [end - start for start, end in zip(starts, ends, strict=True)]
            expected += ["–" if name == "scratch" else f"{starts[0]:.4f}", shown(ends)]
            expected.append("–" if name == "scratch" else shown(changes, "+"))
        assert table[name] == [*expected, shown(means)]
    data = cells_of(report.replace("# Ablation data", "## Ablation data"), "Ablation data")
    assert data["25 %"][1].startswith(f"25 % of {prepared} (") and data["scratch"][-1] == "random"
    plot = (out / "report" / "learned.svg").read_text()
    assert plot.count("start: ") == 1 and all(name in plot for name in (*VARIANTS, "loss on old"))


def shown(values: list[float], sign: str = "") -> str:
    median, least, most = (f"{value:{sign}.4f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{median} ({least} to {most})"


def test_the_same_command_continues(ablation, out, capsys, tmp_path, prepared, new) -> None:
    before = (out / "report" / "report.md").read_bytes()
    assert main(["ablate", str(ablation), "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert "12 jobs: 6 pretrainings, 6 annealings; 12 done before" in captured.err
    assert "6 trainings: 3 variants with 2 seeds each, all validated on old (" in captured.err
    assert captured.out.startswith("Learned and forgotten\n") and (out / "report" / "report.md").read_bytes() == before
    values = yaml.safe_load(ablation.read_text()) | {"validation": {"old": str(prepared)}}
    assert main(["ablate", write(tmp_path / "other", values), "--out", str(out)]) == 2
    assert "holds another ablation" in capsys.readouterr().err


def test_changed_inputs_are_noticed(ablation, run, tmp_path, monkeypatch) -> None:
    """Splits and initial weights are identified by their content."""
    time_steps(monkeypatch, lambda *given: 0.1)
    from fastbert.studies.ablate.ablation_plan import plan_ablation

    job = plan_ablation(load_ablation(ablation)[0], None, tmp_path, {}).jobs[0].to_dict()
    assert set(job["identity"]["validation"]) == {"old", "later-years"} and "initial" in job["identity"]
    other = job | {"identity": job["identity"] | {"initial": "00000000"}}
    assert pretrain_job(other, tmp_path / "a")["reason"].startswith(f"the weights of {run} changed")
    other = job | {"identity": job["identity"] | {"validation": {"old": "00000000"}}, "kind": "pretrain"}
    other["options"] = job["options"] | {"steps": 1, "milestones": None, "schedule": {"warmup": 0}}
    assert pretrain_job(other, tmp_path / "b")["reason"].startswith("the data changed")
