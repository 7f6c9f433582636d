"""What a report reads of a run's folder: figures, axes, and what is wrong."""

import re
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastbert.errors import UserError
from fastbert.report.curves import curve, curves_svg, thinned
from fastbert.report.runs import count_text, number, read_run
from tests.report.conftest import records_at


def test_a_finished_run(run_folder) -> None:
    run = read_run(run_folder("a"))
    assert run.name == "a" and run.finished and run.state == "finished" and not run.warnings
    assert (run.tokens, run.flops, run.minutes) == (10240, 4e10, 1.5)
    assert run.device == "a CPU" and run.objective == "mlm" and run.median("mfu") == 0.25


def test_an_unfinished_run_has_the_figures_so_far(run_folder) -> None:
    records = [record for step in range(2, 21, 2) for record in records_at(step, 0.001)]
    run = read_run(run_folder("a", records, finished=False))
    assert run.state == "unfinished: step 20 of 40" and "unfinished" in run.warnings[0]
    assert (run.tokens, run.flops) == (5120, 4e10)
    assert run.minutes == pytest.approx(256 * 20 / 512 / 60)


def test_curves_have_a_position_on_every_axis(run_folder) -> None:
    run = read_run(run_folder("a"))
    found = curve(run, "validation", "loss")
    assert found.x["steps"] == [10, 20, 30, 40] and found.x["tokens"] == [2560, 5120, 7680, 10240]
    assert found.x["flops"] == [2e10, 4e10, 6e10, 8e10]
    assert found.x["minutes"] == pytest.approx([5 / 60, 10 / 60, 15 / 60, 20 / 60], rel=1e-6)
    assert curve(run, "train", "absent") is None


def test_flops_of_older_records_follow_from_the_mean_of_a_step(run_folder) -> None:
    records = [record for step in (2, 4) for record in records_at(step, 0.001)]
    for record in records:
        del record["flops"]
    assert curve(read_run(run_folder("a", records)), "train", "loss").x["flops"] == [2e9, 4e9]


def test_damaged_and_repeated_records_are_named(run_folder) -> None:
    run = run_folder("a", [*records_at(2, 0.1), *records_at(2, 0.2), *records_at(4, 0.2)])
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[1:1] = ['{"step": 3, "spl', "[]"]
    lines += [f'{{"step": {step}, "split": "train", "loss": 1}}' for step in (10**400, -1)]
    lines[4] = lines[4].replace('"loss": ', '"loss": NaN, "was": ')
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    found = read_run(run)
    assert found.warnings[0] == "damaged lines in metrics.jsonl, left out: 2, 3"
    assert found.warnings[1] == "records with impossible steps in metrics.jsonl, left out: 2"
    assert "repeated records" in found.warnings[2] and found.done == 4
    assert [value for _, value in found.column("train", "lr")] == [0.2, 0.2]
    assert found.column("train", "loss")[-1] == (4, None)


def test_missing_records_and_a_damaged_summary_are_warnings(run_folder) -> None:
    run = run_folder("a")
    (run / "metrics.jsonl").unlink()
    (run / "report" / "summary.json").write_text('{"step": "x"}')
    (run / "config.yaml").write_text("a: [")
    found = read_run(run)
    assert not found.records and len(found.warnings) == 4
    assert "unfinished" in found.warnings[0] and "there are no curves" in found.warnings[1]
    assert "step is 'x', not a whole number" in found.warnings[2] and "config.yaml" in found.warnings[3]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("results.json", "holds the results of a fine-tuning"),
        ("results.jsonl", "is a sweep or an ablation, with the page report/report.html"),
        ("glue.md", "holds fine-tunings on several tasks"),
        ("dataset.json", "holds prepared data"),
        ("state.json", "is a checkpoint"),
        ("config.json", "is a model without the records of its training"),
    ],
)
def test_other_folders_are_refused_by_name(run_folder, name: str, message: str) -> None:
    run = run_folder("a")
    (run / name).write_text("{}")
    with pytest.raises(UserError, match=message):
        read_run(run)


def test_what_is_no_run_is_refused(run_folder, tmp_path) -> None:
    run = run_folder("runs/a")
    with pytest.raises(UserError, match=r"is not a run, but holds runs, such as .*runs/a"):
        read_run(run.parent)
    (run / "result.json").write_text("{}")
    with pytest.raises(UserError, match="is not a run; give"):
        read_run(run.parent)
    (run / "result.json").unlink()
    with pytest.raises(UserError, match=r"there is no folder .*runs/b"):
        read_run(run.parent / "b")
    with pytest.raises(UserError, match="is a file; give a folder"):
        read_run(run / "metrics.jsonl")
    (run / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"the run's manifest .* is damaged: science is missing"):
        read_run(run)
    shutil.rmtree(run / "report")
    (run / "manifest.json").unlink()
    with pytest.raises(UserError, match="is not a run; give the folder of a run of fastbert pretrain"):
        read_run(run)


@given(st.lists(st.none() | st.floats(-100, 100), min_size=2, max_size=300), st.integers(8, 60))
def test_thinned_series_keep_their_ends_and_extremes(values: list, most: int) -> None:
    keep, means = thinned(values, most)
    assert keep == sorted(set(keep)) and keep[0] == 0 and keep[-1] == len(values) - 1 and len(keep) <= most
    selected = [values[index] for index in keep]
    finite = [value for value in values if value is not None]
    if finite:
        assert min(finite) == min(v for v in selected if v is not None)
        assert max(finite) == max(v for v in selected if v is not None)
    assert (None in selected) == (None in values)
    if means is not None:
        assert len(means) == len(keep) and len(values) > most
        assert all((mean is None) == (value is None) for mean, value in zip(means, selected, strict=True))


def test_means_are_those_of_the_sections() -> None:
    values = [float(index % 10) for index in range(1000)]
    keep, means = thinned(values, 32)
    assert len(keep) == 22 and means[1] == means[2] == pytest.approx(
        sum(values[1 : keep[3] - 8]) / len(values[1:92]), abs=1
    )
    assert all(abs(mean - 4.5) < 0.2 for mean in means[1:-1])


def test_the_plot_of_a_run_is_the_same_bytes_and_loads_nothing(run_folder) -> None:
    pytest.importorskip("matplotlib")
    records = [{"step": n, "split": "train", "loss": 9 - n / 1e4, "lr": 0.1, "tokens": n} for n in range(1, 20_001)]
    run = read_run(run_folder("a", records))
    svg = curves_svg(run, 6.0)
    assert svg == curves_svg(run, 6.0) and "<svg role=" in svg and len(svg) < 200_000
    assert "unigram entropy 6.00" in svg and "var(--text)" in svg and "#010203" not in svg
    assert "unigram" not in curves_svg(run, None)
    for word in ("<script", "<image", "@import", 'href="http'):
        assert word not in svg
    assert curves_svg(read_run(run_folder("b", [])), None) is None


def test_the_plot_of_a_run_has_every_part_of_its_loss(run_folder) -> None:
    pytest.importorskip("matplotlib")
    parts = {"mlm_loss": 5.0, "replaced": 0.1, "detection_loss": 0.2, "choosing_loss": 1.0, "entropy": 5.0}
    run = read_run(run_folder("a", [{"step": n, "split": "validation", "loss": 9.0, **parts} for n in (1, 2)]))
    titles = re.findall(r">(\w+ loss|replaced|entropy)</text>", curves_svg(run, None))
    assert titles == ["mlm loss", "detection loss", "choosing loss"]


def test_numbers_of_records() -> None:
    assert [number(value) for value in (1, 2.5, True, None, "3", float("nan"), 10**400)] == [1, 2.5, *[None] * 5]
    assert [count_text(value) for value in (None, 12, 1234, 61_440_000, 999_999, 2.5e11)] == [
        *("–", "12", "1.23k", "61.4M", "1,000k", "250G"),
    ]
    assert count_text(1.594e14, "flops") == "1.59e+14"
