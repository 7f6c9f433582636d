"""Fractions at every point of an annealed baseline and values at equal cost, against closed forms, and their tables."""

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_rel

from fastbert.report.report_page import ReportPage
from fastbert.studies.ablate.ablate import report_ablation
from fastbert.studies.ablate.ablation_tables import format_value, fraction_cell, planned_table
from fastbert.studies.ablate.analysis import SAME_COST, CostFraction, Measure, Point, compare_variants, end_at
from fastbert.studies.ablate.measures import AblationResults
from fastbert.studies.shared.evaluate_jobs import EVALUATE
from tests.studies.conftest import losses, time_steps, write_pairs

POINTS = (0.1, 0.25, 0.5, 1.0)


def lines(slope: float, jitter: float = 0.0, steps: float = 400, flops: float = 1, minutes: float = 1) -> dict:
    """Seed -> a straight line through POINTS of a training of `steps`, and the costs of a step."""
    return {
        seed: [
            Point(p, p * steps, p * steps * flops, p * steps * minutes, slope * p * steps + 2 * seed + jitter * seed**2)
            for p in POINTS
        ]
        for seed in range(3)
    }


# --- smaller budgets


@pytest.mark.parametrize("sign", [1, -1])
def test_fractions_of_straight_lines_at_every_point(sign) -> None:
    """Twice the slope reaches every target at half its cost; 0.8 of it at 1.25 times, as far as its curve goes. The
    first point of the faster one is only a bound."""
    slopes = {"base": (sign, 0), "fast": (2 * sign, 1e-6), "slow": (0.8 * sign, 1e-6)}
    measure = Measure("score", sign > 0, {name: lines(*slope) for name, slope in slopes.items()})
    assert measure.fractions == list(POINTS)
    found = {p: compare_variants(measure.until(p), False, measure) for p in POINTS}
    for p, (base, fast, slow) in found.items():
        assert (fast.verdict, slow.verdict) == ("reached", "not reached")
        assert fast.result.mean == pytest.approx(400 * p, abs=1e-4)
        for unit in ("steps", "flops", "minutes"):
            assert base.fractions[unit].values == (1.0, 1.0, 1.0)
            assert fast.fractions[unit].values == pytest.approx([1.0 if p == 0.1 else 0.5] * 3, abs=1e-6)
            assert fast.fractions[unit].at_most == (p == 0.1,) * 3
            assert slow.fractions[unit].values == pytest.approx([math.inf if p == 1 else 1.25] * 3, abs=1e-6)
    assert found[1.0] == compare_variants(measure, False)


def test_later_points_do_not_change_a_smaller_budget() -> None:
    """A variant that was better at a point and worsens later has reached the target there, as if nothing followed."""
    better = lines(2, 1e-6)
    worsened = {seed: [*curve[:3], Point(1.0, 400, 400, 400, -9.0)] for seed, curve in better.items()}
    measure = Measure("score", True, {"base": lines(1), "other": worsened})
    assert compare_variants(measure, False)[1].verdict == "not reached"
    row = compare_variants(measure.until(0.5), False, measure)[1]
    assert row.verdict == "reached" and row.fractions["steps"].values == pytest.approx([0.5] * 3, abs=1e-6)


def test_a_point_that_is_missing_is_no_target_of_its_seed() -> None:
    curves = {"base": lines(1), "other": lines(2)}
    del curves["other"][1][1]
    assert compare_variants(Measure("score", True, curves).until(0.25), False)[1].seeds == (0, 2)


# --- equal cost


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(-6, 6)), min_size=1, max_size=7, unique_by=lambda pair: pair[0]),
    st.integers(1, 50),
    st.sampled_from(["flops", "minutes"]),
)
def test_values_at_a_cost_against_numpy(pairs, cost, unit) -> None:
    costs, values = zip(*sorted(pairs), strict=True)
    curve = [
        Point(c / costs[-1], 3.0 * c, **{"flops": c**2, "minutes": c**2, unit: c}, value=v)
        for c, v in zip(costs, values, strict=True)
    ]
    ended = end_at(curve, unit, cost)
    if abs(costs[-1] - cost) <= SAME_COST * cost:
        assert ended == curve
    elif cost < costs[0] or cost > costs[-1]:
        assert ended is None
    else:
        *before, end = ended
        assert before == [point for point in curve if getattr(point, unit) <= cost]
        assert end.value == pytest.approx(np.interp(cost, costs, values)) and getattr(end, unit) == pytest.approx(cost)
        other = "minutes" if unit == "flops" else "flops"
        assert getattr(end, other) == pytest.approx(np.interp(cost, costs, np.square(costs)))
        assert end.steps == pytest.approx(3 * cost)


def test_straight_lines_at_equal_cost() -> None:
    """Twice the slope at steps of 1.6 times the minutes and 3 times the FLOPs: at equal minutes the value of 250 of the
    400 steps, at equal FLOPs that of 133. One with cheaper steps ends at 70 % of the minutes."""
    curves = {
        "base": lines(1),
        "fast": lines(2, 0.1, flops=3, minutes=1.6),
        "cheap": lines(2, minutes=0.7),
        "same": lines(0.5, 0.2, minutes=0.995),
        "costly": lines(2, minutes=11),
    }
    measure = Measure("score", True, curves)
    bases = np.array([400.0, 402.0, 404.0])
    offsets = np.array([0, 2.1, 4.4])
    for unit, steps in (("flops", 400 / 3), ("minutes", 250)):
        at_cost = measure.at_cost(unit)
        rows = {row.variant: row for row in compare_variants(at_cost, False)}
        assert list(at_cost.finals("base").values()) == list(bases)
        found = np.array(list(at_cost.finals("fast").values()))
        assert found == pytest.approx(2 * steps + offsets)
        p = ttest_rel(found, bases).pvalue
        assert rows["fast"].result.mean == pytest.approx(np.mean(found - bases)) and rows["fast"].result.p_t == (
            pytest.approx(p)
        )
        assert rows["fast"].verdict == ("reached" if unit == "minutes" else "not reached")
    assert at_cost.curves["cheap"] == {} == at_cost.curves["costly"]
    assert at_cost.curves["same"] == curves["same"]  # within SAME_COST of the baseline's minutes
    assert rows["fast"].p == pytest.approx(2 * p)  # over the two variants that have values
    base = {seed: curve for seed, curve in lines(1).items() if seed != 2}  # not finished, or failed
    assert list(Measure("score", True, {"base": base, "fast": lines(2)}).at_cost("steps").curves["fast"]) == [0, 1]


# --- the page


def test_a_difference_that_rounds_to_zero_has_no_minus_sign() -> None:
    higher, lower = (Measure("score", higher, {}) for higher in (True, False))
    assert [format_value(higher, -value, "+") for value in (1e-9, 0.006)] == ["+0.00", "-0.01"]
    assert format_value(lower, -1e-9, "+") == "+0.0000"


def test_a_range_of_fractions_has_one_unit() -> None:
    assert fraction_cell(CostFraction((0.51, 0.67, 0.58), (False,) * 3)) == "58 % (51 to 67 %)"
    assert fraction_cell(CostFraction((0.51, math.inf, 0.58), (True,) * 3)) == "≤ 58 % (51 to not reached)"
    assert fraction_cell(CostFraction((0.5, 0.5), (False,) * 2)) == "50 %"


SMALLER = "Fraction of the baseline's cost at smaller budgets"


@pytest.fixture
def reported(planned, monkeypatch, tmp_path):
    """Changes and a gap -> report.md of an ablation with known losses and minimal pairs. A step of b takes twice the
    time of a's, one of c 0.4 of it. b learns twice as fast as a; c as fast by the loss, and 0.8 times by the pairs."""

    def make(gap: float = 0.0, **changes) -> str:
        seconds = {"relative": 0.2, "tupe-r": 0.04}
        time_steps(monkeypatch, lambda setup, *given: seconds.get(setup.options.encoder.position, 0.1))
        monkeypatch.setattr(ReportPage, "plot", lambda *given: None)
        values = {"variants": {"a": None, "b": {"position": "relative"}, "c": {"position": "tupe-r"}}, "seeds": 3}
        values |= {"budget": {"steps": 400}, "anneal": {"points": [0.1, 0.25, 0.5, 1.0], "fraction": 0.2}}
        values |= {"evaluate": {"pairs": write_pairs(tmp_path / "pairs"), "machine": {"device": "cpu"}}}
        values |= changes
        ablation, study = planned(**{name: value for name, value in values.items() if value is not None})
        rows = losses(study, {"a": 4.0, "b": 2.0, "c": 4.0}, study.unigram_entropy - 5 + gap)
        steps = {(point.job, point.fraction): point.steps for points in study.points.values() for point in points}
        for job in (job for job in study.jobs if job.kind == EVALUATE):
            slope = {"a": 1e-3, "b": 2e-3, "c": 0.8e-3}[job.model] * (1 + 1e-6 * job.seed * (job.model != "a"))
            accuracy = slope * steps[job.after[0], job.setting["at"]] + 1e-6 * job.seed**2
            figures = {"accuracy": accuracy, "phenomena": {}, "ties": 0, "score": "pll", "other_scores": {}}
            rows[job.id] |= {"pairs": figures}
        report_ablation(tmp_path / "out", "known", ablation, AblationResults(study, rows))
        return (tmp_path / "out" / "report" / "report.md").read_text()

    return make


def tables(report: str, head: str) -> list[list[list[str]]]:
    """The rows of each table of a section, without head and rule."""
    section = report.partition(f"## {head}\n")[2].partition("\n## ")[0]
    blocks = [block.splitlines()[2:] for block in section.split("\n\n") if block.startswith("|")]
    return [[[cell.strip() for cell in line.strip("| ").split("|")] for line in lines] for lines in blocks]


def test_tables_of_smaller_budgets_and_equal_cost(reported) -> None:
    report = reported()
    pairs, loss = tables(report, SMALLER)
    # Straight lines; the baseline has learned from 25 % of the budget on.
    flops = f"{125 + 1.25 * float(re.search(r'^. c .*?[+]([0-9.]+) %', report, re.MULTILINE)[1]):.0f} %"
    assert [row[:4] + row[5:] for row in pairs if row[0] == "b"] == [
        ["b", "25 %", "12.00", "+12.00", "reached", "3", "50 %", "50 %", "100 %"],
        ["b", "50 %", "24.00", "+24.00", "reached", "3", "50 %", "50 %", "100 %"],
        ["b", "100 %", "48.00", "+48.00", "reached", "3", "50 %", "50 %", "100 %"],
    ]
    assert [row[1:2] + row[3:4] + row[5:] for row in pairs if row[0] == "c"] == [
        ["25 %", "-2.40", "not reached", "3", "125 %", flops, "50 %"],
        ["50 %", "-4.80", "not reached", "3", "125 %", flops, "50 %"],
        ["100 %", "-9.60", "not reached", "3", "–", "–", "–"],
    ]
    assert {*map(tuple, (row[5:] for row in loss if row[0] == "c"))} == {
        ("undecided: within the spread", "3", "–", "–", "–")
    }
    # The points of b at 120 and 240 steps have the losses of a at 240 and 480. Between 48 and 120, the chord.
    assert [row[7:] for row in loss if row[0] == "b"][1:] == [["50 %", "50 %", "100 %"]] * 2
    chord = 48 + 72 * (math.exp(-48 / 80) - math.exp(-60 / 80)) / (math.exp(-48 / 80) - math.exp(-120 / 80))
    assert loss[0][7] == f"{100 * chord / 120:.0f} %" == "54 %"
    assert "no targets: 10 % of the budget" in report

    pairs, loss = tables(report, "At equal cost")
    assert [row[:4] for row in pairs][:2] == [["all", "a", "3", "48.00"], ["steps", "b", "3", "96.00"]]
    minutes = {row[1]: row[2:] for row in pairs if row[0] == "minutes"}
    assert minutes["b"][:2] == ["3", "48.00"] and minutes["b"][-1] == "undecided: within the spread"
    assert minutes["c"][:2] == ["0", "–"] and minutes["c"][-1] == "no value: ends at 40 % of this cost"
    rows = {row[0]: row for row in loss if row[1] == "b"}
    base = next(row for row in loss if row[1] == "a")
    assert rows["minutes"][3] == base[3] and float(rows["steps"][6]) == pytest.approx(
        4 * (math.exp(-3) - math.exp(-6)), abs=5e-5
    )


def test_points_at_which_the_baseline_has_hardly_learned_are_no_targets(reported) -> None:
    """The whole section is then one sentence, also if the end of the budget is the only target."""
    report = reported(gap=2.0)
    assert tables(report, SMALLER) == [] and "no targets: 10, 25, 50 % of the budget" in report
    report = reported(gap=3.0)
    assert tables(report, SMALLER) == [] and "no targets: 10, 25, 50, 100 % of the budget" in report
    assert {row[-1] for row in tables(report, "At equal cost")[1]} >= {"undecided: the baseline has hardly learned"}


def test_points_along_one_schedule_are_no_budgets(reported) -> None:
    """Before the end its learning rate is still high."""
    report = reported(anneal=None, checkpoints=[0.1, 0.25, 0.5, 1.0])
    assert SMALLER not in report and "At equal cost" not in report
    assert len(tables(report, "Fraction of the baseline's cost to reach its final quality")) == 2


def test_a_step_is_priced_relative_to_the_baseline(planned, monkeypatch) -> None:
    rounds = iter([0.1, 0.2, 0.11, 0.21] * 3)
    time_steps(monkeypatch, lambda *given: next(rounds))
    ablation, study = planned(variants={"a": None, "b": {"ffn": 256}})
    first, wide = planned_table(study, ablation).rows
    flops = [objective.flops(8, 16) for objective in (variant.setup.objective() for variant in study.variants)]
    assert wide[2] == f"{flops[1]:.3g} ({100 * (flops[1] / flops[0] - 1):+.1f} %)" and first[2] == f"{flops[0]:.3g}"
    assert (first[3], wide[3]) == ("100", "200 (+100.0 %)")
    assert (first[4], wide[4]) == ("10 %", "5 %")
