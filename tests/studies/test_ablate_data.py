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
from fastbert.studies.ablate import pretrain_jobs
from fastbert.studies.ablate.ablate import describe_ablation, measured, report_ablation
from fastbert.studies.ablate.ablation_plan import plan_ablation
from fastbert.studies.ablate.comparability import check_measure
from fastbert.studies.ablate.fixed_splits import planned_reasons
from fastbert.studies.ablate.measures import AblationResults
from fastbert.studies.ablate.options import load_ablation
from fastbert.studies.ablate.pretrain_jobs import pretrain_job
from tests.new_data import prepare_with
from tests.studies.conftest import CPU, SMALL, losses, read_rows, time_steps

VARIANTS = ("0 %", "25 %")


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
        },
        "budget": {"equal": "flops", "steps": 10},
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
    assert [row["kind"] for row in rows] == ["pretrain", "branch"] * 2
    for row in rows:
        found = metrics(out / "jobs" / row["id"] / "run")
        for validation in row["validations"]:
            for name in ("old", "later-years"):
                key = f"validation/study-{name}", validation["step"]
                assert validation["splits"][name]["loss"] == found[key]
        assert row["validations"][0]["step"] == 0
        ended = metrics(run)["validation", 4]
        assert row["validations"][0]["splits"]["old"]["loss"] == ended


def test_fractions_differ_only_in_replay(out, new) -> None:
    rows = [row for row in read_rows(out) if row["kind"] == "pretrain"]
    runs = {row["model"]: out / "jobs" / row["id"] / "run" for row in rows}
    plain, replayed = (yaml.safe_load((runs[name] / "config.yaml").read_text()) for name in VARIANTS)
    assert {key for key in plain if plain[key] != replayed[key]} == {"replay", "out"}
    assert replayed["replay"]["fraction"] == 0.25 and replayed["replay"]["seed"] == 0  # of the run
    assert plain["data"] == replayed["data"] == str(new.resolve())
    assert metrics(runs["0 %"])["validation", 0] == metrics(runs["25 %"])["validation", 0]
    assert ("validation/old", 0) in metrics(runs["25 %"]) and ("validation/old", 0) not in metrics(runs["0 %"])


def table_of(report: str, column: str) -> dict[str, list[str]]:
    """Rows of the table with this column, by their first cell."""
    tables: list[list[list[str]]] = [[]]
    for line in report.splitlines():
        if line[:1] == "|":
            tables[-1].append([cell.strip() for cell in line.strip("| ").split("|")])
        elif tables[-1]:
            tables.append([])
    (found,) = [table for table in tables if table and column in table[0]]
    return {row[0]: row[1:] for row in found}


def test_the_report_shows_what_was_learned_and_forgotten(out, run, prepared, new) -> None:
    report = (out / "report" / "report.md").read_text()
    assert "same data" not in report and f"held-out documents: old ({prepared}) and later-years ({new})" in report
    assert "These texts differ between variants with different data: their losses are not compared." in report
    measures = ["loss on old", "loss on later-years", "mean loss"]
    assert re.findall("^## By (.*)$", report, re.MULTILINE) == measures
    table = table_of(report, "old: start")
    head = [f"{name}: {when}" for name in ("old", "later-years") for when in ("start", "end", "change")]
    assert table["variant"] == ["seeds", *head, "mean: end"]
    for name in VARIANTS:
        (trunk,) = [row for row in read_rows(out) if row["model"] == name and row["kind"] == "pretrain"]
        found, expected, ends = metrics(out / "jobs" / trunk["id"] / "run"), ["1"], []
        for split in ("validation/study-old", "validation/study-later-years"):
            start, end = found[split, 0], found[split, 12]
            expected += [f"{start:.4f}", f"{end:.4f}", f"{end - start:+.4f}"]
            ends.append(end)
        assert table[name] == [*expected, f"{statistics.fmean(ends):.4f}"]
    assert f"\n- `25 %`: replay.data {prepared}, replay.fraction 0.25\n" in report
    data = table_of(report, "initial weights")
    assert data["25 %"][1].startswith(f"25 % of {prepared} (") and data["0 %"][1] == "–"
    assert data["0 %"][-1] == str(run) and data["0 %"][0].startswith(f"{new} (")
    plot = (out / "report" / "learned.svg").read_text()
    assert plot.count("start: ") == 1 and all(name in plot for name in (*VARIANTS, "loss on old"))


def test_the_same_command_continues(ablation, out, capsys, tmp_path, prepared, new) -> None:
    before = without_origin(out)
    assert main(["ablate", str(ablation), "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert "4 jobs: 2 pretrainings, 2 annealings; 4 done before" in captured.err
    assert "2 trainings: 2 variants with 1 seed each, all validated on old (" in captured.err
    assert captured.out.startswith("Learned and forgotten\n") and without_origin(out) == before
    values = yaml.safe_load(ablation.read_text()) | {"validation": {"old": str(prepared)}}
    assert main(["ablate", write(tmp_path / "other", values), "--out", str(out)]) == 2
    assert "holds another ablation" in capsys.readouterr().err


def without_origin(out: Path) -> str:
    """The report without its last section, which has the commit."""
    return (out / "report" / "report.md").read_text().partition("## How it was made")[0]


def test_changed_inputs_are_noticed(ablation, out, run, tmp_path, monkeypatch) -> None:
    """Splits and initial weights are identified by their content."""
    time_steps(monkeypatch, lambda *given: 0.1)
    monkeypatch.setattr(pretrain_jobs, "pretrain", lambda options, name: 0)  # the run has finished
    job = plan_ablation(load_ablation(ablation)[0], None, tmp_path, {}).jobs[0].to_dict()
    identity, finished = job["identity"], out / "jobs" / job["id"] / "run"
    assert set(identity["validation"]) == {"old", "later-years"}
    assert pretrain_job(job, finished)["status"] == "done"
    other = job | {"identity": identity | {"initial": "00000000"}}
    assert pretrain_job(other, tmp_path / "a")["reason"].startswith(f"the weights of {run} changed")
    other = job | {"identity": identity | {"validation": identity["validation"] | {"old": "00000000"}}}
    assert pretrain_job(other, finished)["reason"].startswith("the data changed")


# --- plans, without trainings


@pytest.fixture
def study(planned, prepared, new, tmp_path):
    """Changes of the YAML file -> its ablation and plan, from random weights."""

    def make(**changes):
        values = contents(prepared, new)
        variants = {"plain": None, "replayed": values["variants"]["25 %"]}
        values |= {"variants": variants, "checkpoints": [0.5, 1.0]} | changes
        del values["anneal"]
        return planned(**values)

    return make


def with_splits(rows: dict[str, dict], ends: dict[tuple[str, int], tuple[float, float]]) -> dict[str, dict]:
    """Rows of `losses` with losses on the splits: those of (variant, seed), twice as high at points before the end."""
    for row in rows.values():
        for validation in row["validations"]:
            factor = 1 if validation is row["validations"][-1] else 2
            of = ends[row["model"], row["seed"]]
            validation["splits"] = {
                name: {"loss": factor * loss, "accuracy": 0.5}
                for name, loss in zip(("old", "later-years"), of, strict=True)
            }
    return rows


def test_measures_and_spread_over_seeds(study, tmp_path, capsys) -> None:
    """Verdicts on each split and on their mean: replay forgets less, learns less, and is better by the mean."""
    ablation, plan = study(seeds=3)
    assert len(plan.seconds) == 1  # other data costs the same, so it is timed once
    own = [job.options["replay"]["seed"] for job in plan.jobs if job.model == "replayed"]
    assert own == [0, 1, 2]  # without a run to start from, the old data has the order of the training's seed
    ends = {("plain", seed): (3 + seed / 100, 1.0 + seed / 1000) for seed in range(3)}
    ends |= {("replayed", seed): (2 + seed / 90, 1.1 + seed / 900) for seed in range(3)}
    results = AblationResults(plan, with_splits(losses(plan, {"plain": 0.1, "replayed": 0.1}), ends))
    assert [measure.name for measure in results.measures] == ["loss on old", "loss on later-years", "mean loss"]
    assert results.measures[2].finals("replayed")[1] == pytest.approx((2 + 1 / 90 + 1.1 + 1 / 900) / 2)
    entropies = [split.unigram_entropy for split in plan.splits]
    assert list(results.losses.values()) == [*entropies, None] and entropies[0] != entropies[1]
    assert report_ablation(tmp_path / "out", "x", ablation, results) == 0
    printed = capsys.readouterr().out
    assert "3.0100 (3.0000 to 3.0200)" in printed and "2.0111 (2.0000 to 2.0222)" in printed
    report = (tmp_path / "out" / "report" / "report.md").read_text()
    end = "3.0100 (3.0000 to 3.0200)"
    assert table_of(report, "old: start")["plain"][:4] == ["3", "–", end, "–"]  # random weights have no start
    assert table_of(report, "initial weights")["plain"][-1] == "random"
    verdicts = re.findall(r"^replayed +(reached|not reached) ", printed, re.MULTILINE)
    assert verdicts == ["reached", "not reached", "reached"]
    row = next(iter(results.rows.values()))
    name, value = measured(row)
    assert name == "mean loss" and value == pytest.approx((3 + 1) / 2)


def test_a_split_is_part_of_the_experiment(study, prepared) -> None:
    """Another split is another ablation, and other jobs; its losses would else be missing in results."""
    (ablation, plan), (other_ablation, other) = study(), study(validation={"old": str(prepared)})
    described = [describe_ablation(*pair) for pair in ((ablation, plan), (other_ablation, other))]
    assert {key for key in described[0] if described[0][key] != described[1].get(key)} == {"validation later-years"}
    assert not {job.id for job in plan.jobs} & {job.id for job in other.jobs}
    assert plan.jobs[0].options["eval_data"].startswith("study-old=")


def test_new_words_are_compared_in_bits_per_byte(study, grown, new, prepared, tmp_path, capsys) -> None:
    """A vocabulary that begins with that of the splits is left out of their losses, with the reason."""
    (tmp_path / "text.txt").write_text("The people of the States are free. We shall have peace.")
    variants = {"plain": None, "dropout": {"dropout": 0.2}, "words": {"data": str(grown)}}
    pll = {"pll": str(tmp_path / "text.txt"), "machine": CPU}
    ablation, plan = study(variants=variants, evaluate=pll, evaluate_at=[1.0])
    reason = "its vocabulary has 2 words more than the 600 with which the split was prepared"
    assert plan.incomparable_on == {name: {"words": reason} for name in ("old", "later-years")}
    rows = with_splits(losses(plan, dict.fromkeys(variants, 1.0)), {(name, 0): (2.0, 1.0) for name in variants})
    for job in plan.jobs:
        if job.kind == "evaluate":
            rows[job.id] |= {"pll": {"bits_per_byte": 1.5, "nats_per_token": 9.0}, **job.setting}
    results = AblationResults(plan, rows)
    names = [measure.name for measure in results.measures]
    assert names == ["pseudo-log-likelihood, bits per byte", "loss on old", "loss on later-years", "mean loss"]
    assert results.measures[0].finals("words") == {0: 1.5} and "words" not in results.measures[3].curves
    assert report_ablation(tmp_path / "out", "x", ablation, results) == 0
    report = (tmp_path / "out" / "report" / "report.md").read_text()
    assert f"- words is not compared by the loss on old and later-years: {reason}" in report
    assert table_of(report, "old: start")["words"] == ["1", *["–"] * 7]
    assert table_of(report, "initial weights")["words"][2] == "602"
    results = AblationResults(study(evaluate=pll)[1], {})
    assert results.all_measures[0].name == "pseudo-log-likelihood, nats per token"
    check_measure(ablation, plan.incomparable)
    check_measure(ablation, planned_reasons(ablation))
    ablation = replace(ablation, grid=replace(ablation.grid, evaluate={}))
    for reasons in (plan.incomparable, planned_reasons(ablation)):
        with pytest.raises(UserError, match="nothing compares these with the baseline") as caught:
            check_measure(ablation, reasons)
        assert f"words: {reason}" in str(caught.value)
    _, plan = study(variants={"words": {"data": str(grown)}, "plain": None}, evaluate=pll)
    assert plan.incomparable == {"plain": f"words, the baseline: {reason}"}
    line = f"no variant is compared by the loss on old and later-years, because of the baseline, words: {reason}"
    assert line in AblationResults(plan, {}).left_out


def test_objectives_and_masks_are_compared_as_without_the_mode(study) -> None:
    variants = {"plain": None, "electra": {"objective": "electra"}}
    with_pairs = study(variants=variants)[1]
    assert with_pairs.incomparable == {"electra": "objective: electra instead of mlm"}


def test_a_dry_run_names_the_data(ablation, tmp_path, capsys, monkeypatch, prepared) -> None:
    time_steps(monkeypatch, lambda *given: 0.1)
    assert main(["ablate", str(ablation), "--dry-run", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "2 trainings: 2 variants with 1 seed each, all validated on old (" in printed
    assert re.search(rf"^ *25 % .* 25 % of {prepared} \(", printed, re.MULTILINE)
    assert printed.splitlines()[-1] == "4 jobs: 2 pretrainings, 2 annealings"


# --- refusals


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mode": "date"}, "mode must be data (variants differ in their data"),
        ({"mode": None}, "mode must be data"),
        ({"mode": "absent"}, "validation is for mode: data; give that mode"),
        ({"validation": "absent"}, "name their prepared folders, such as validation: {old: data/wiki, new: data/de}"),
        ({"validation": {}}, "name their prepared folders"),
        ({"validation": {"Old": "x"}}, "validation: Old: the name of a split has at most 26 small letters"),
        ({"validation": {"a" * 27: "x"}}, "the name of a split has at most 26 small letters"),
        ({"validation": {"mean": "x"}}, "mean is the mean of the splits; choose another name"),
        ({"validation": {"old": 3}}, "validation: old must be a prepared folder"),
        ({"validation": {"old": "a,b"}}, "has a comma; rename the folder"),
        ({"base": {"eval_data": "a=b"}}, "base: eval_data cannot be given here; the validation splits of mode: data"),
        ({"variants": {"a": None, "b": {"eval-data": "a=b"}}}, "b: eval_data cannot be given here: the validation"),
        ({"variants": {"a": None, "b": {"length": 64}}}, "b: length cannot be given here"),
        ({"variants": {"a": None, "b": {"batch_size": 64}}}, "b: batch_size cannot be given here"),
        ({"variants": {"a": None, "b": {"eval_sequences": 64}}}, "b: eval_sequences cannot be given here"),
    ],
)
def test_bad_files(tmp_path, changes, reason) -> None:
    (tmp_path / "x").mkdir()
    values = {"mode": "data", "validation": {"old": "x"}, "variants": {"a": None}, "budget": {"steps": 3}} | changes
    path = write(tmp_path, {key: value for key, value in values.items() if value != "absent"})
    with pytest.raises(UserError) as caught:
        load_ablation(path)
    assert path in str(caught.value) and reason in str(caught.value)


def test_other_data_without_the_mode_is_refused_with_the_way_out(tmp_path) -> None:
    for change in ({"data": "x"}, {"replay": {"data": "x"}}):
        path = write(tmp_path, {"variants": {"a": None, "b": change}, "budget": {"steps": 3}})
        with pytest.raises(UserError, match="or compare data with mode: data and fixed validation splits"):
            load_ablation(path)


def test_bad_splits(study, prepared, new, tmp_path, capsys) -> None:
    """Before data is prepared and before the output folder exists."""
    cased = prepare_with(replace(load_tokenizer(prepared), lowercase=False), tmp_path / "cased", 0)
    for validation, reason in (
        ({"old": str(cased)}, "the vocabulary of .* is not the one with which the validation split old was prepared"),
        ({"old": str(tmp_path)}, "validation: old: .* is not a prepared folder; write it with fastbert prepare"),
        ({"old": str(new), "again": str(new)}, "validation: again: .* is the same data as the split old"),
    ):
        path = write(tmp_path / "file", contents(prepared, new, validation=validation, variants={"a": None}))
        assert main(["ablate", path, "--out", str(tmp_path / "results")]) == 2
        assert re.search(reason, capsys.readouterr().err) and not (tmp_path / "results").exists()
    with pytest.raises(UserError, match="do_lower_case is False in"):
        study(validation={"old": str(cased)})
    same = {"plain": None, "none": {"replay": {"data": str(prepared), "fraction": 0.0}}}
    with pytest.raises(UserError, match="plain and none are the same training"):
        study(variants=same)
