"""The page that a finished run leaves behind."""

from pathlib import Path

import pytest

from fastbert.pretraining.options import PretrainOptions
from fastbert.report.run_page import result_rows, sessions_table, write_run_page
from fastbert.report.runs import read_run
from tests.flags import main
from tests.report.test_page import HOSTILE_NAME, Texts


@pytest.fixture
def page(run_folder) -> str:
    run = run_folder(HOSTILE_NAME)
    options = PretrainOptions(steps=40, batch_size=8, seed=3, data=HOSTILE_NAME)
    write_run_page(read_run(run), options, {"folder": HOSTILE_NAME})
    return (run / "report" / "index.html").read_text()


def test_a_page_of_results_examples_cost_and_machine(page: str) -> None:
    found = Texts(page)
    for text in (
        "masked loss (nats)",
        "0.500 below the unigram entropy",
        "word 50 %, text 20 %",
        "51.2k",
        "4.00e+10",
        "1.5",
    ):
        assert text in found.text
    for text in ("a CPU, 2 cores", "fp32", "2026-01-01T00:00:00+00:00", "0123456789ab", "2.13.0"):
        assert text in found.text
    assert found.tags.count("svg") == 1 and "script" not in found.tags and len(page) < 300_000


def test_options_that_differ_come_first_and_all_in_a_fold(page: str) -> None:
    before, fold = page.split("<details>")
    assert all(f"<td>{flag}</td>" in before for flag in ("--seed", "--batch-size", "--steps", "--data"))
    assert "--layers" not in before and "<td>--layers</td>" in fold and "<td>--seed</td>" in fold
    active, idle = fold.split("without effect")
    assert "--electra.loss-weight" in idle and "--mlm.mask-rate" not in idle
    assert "--electra.loss-weight" not in active and "--mlm.mask-rate" in active


def test_a_loss_above_the_entropy_and_one_that_is_not_finite(run_folder) -> None:
    run = read_run(run_folder("a"))
    run.summary["figures"][:] = [
        {"label": "masked loss", "value": 6.25, "unit": "nats", "words": True, "chance": None},
        {"label": "masked accuracy", "value": 0.125, "unit": "%"},
        {"label": "generator loss", "value": None, "unit": "nats", "words": True},
        {"label": "rtd loss", "value": 0.25, "unit": "nats", "words": False, "chance": 0.5},
    ]
    assert result_rows(run) == [
        ["masked loss (nats)", "6.2500", "0.250 above the unigram entropy"],
        ["masked accuracy", "12.5 %", ""],
        ["generator loss (nats)", "not finite", ""],
        ["rtd loss (nats)", "0.2500", "chance: 0.5000"],
        ["unigram entropy (nats)", "6.0000", ""],
    ]


def test_each_session_is_a_column(run_folder) -> None:
    run = read_run(run_folder("a"))
    assert sessions_table(run).head == ["property", "value"]
    run.manifest["sessions"].append({"started": "later", "from_step": 20, "machine": {"gpus": ["H200"]}})
    table = sessions_table(run)
    assert table.head == ["property", "session 1", "session 2"]
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["from step"] == ["0", "20"] and rows["GPUs"] == ["none", "H200"] and rows["torch"] == ["2.13.0", "–"]


def test_a_trained_run_has_its_page_and_can_be_compared(flags, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    flags = [*flags, "--objective", "electra", "--steps", "4", "--log-every", "2", "--eval-every", "4"]
    assert main(["pretrain", *flags, "--out", str(run)]) == 0
    assert f"Report  {run / 'report' / 'index.html'}" in capsys.readouterr().out
    found = Texts((run / "report" / "index.html").read_text())
    assert "Objective electra" in found.text and "tokens held out" in found.text and "svg" in found.tags
    summary = read_run(run).summary
    last = read_run(run).column("train", "flops")[-1]
    assert last == (4, summary["flops"]) and summary["parameters"] > 0 and summary["loss_in_nats"] is False
    assert main(["report", "--out", str(tmp_path / "page"), str(run)]) == 0
    assert (tmp_path / "page.html").stat().st_size > 4_000_000
