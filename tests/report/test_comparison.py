"""`fastbert report`: what the page of several runs states, and which files it replaces."""

import json
import re
from pathlib import Path

import pytest

from fastbert.errors import UserError
from fastbert.report.comparison import differences, examples, page_path, read_once, warnings_of, with_unique_names
from fastbert.report.curves import curves_svg
from fastbert.report.interactive import baseline, curve_data
from fastbert.report.runs import read_run
from tests.flags import main
from tests.report.test_page import HOSTILE_NAME, Texts


def test_the_options_that_differ_experiment_and_machine_apart(run_folder) -> None:
    a, b = run_folder("a"), run_folder("b", **{"optimizer.learning_rate": 0.01, "notes.gamma": None})
    config = (b / "config.yaml").read_text().replace("threads: 1", "threads: 2")
    (b / "config.yaml").write_text(config)
    experiment, machine = "".join(differences([read_run(a), read_run(b)])).split("Machine and versions")
    differing, same = experiment.split("<details>")
    rows = re.findall(r"<tr><td>(.*?)</tr>", differing)
    assert [re.sub("<[^>]*>", " ", row).split() for row in rows] == [["--optimizer.learning-rate", "0.001", "0.01"]]
    assert "--seed" in same and "--machine" not in experiment
    assert "--machine.threads" in machine and "--machine.kernels" not in machine and "commit" not in machine


def test_many_runs_are_rows_of_the_options(run_folder) -> None:
    runs = [read_run(run_folder(f"seed-{seed}", seed=seed)) for seed in range(5)]
    table = "".join(differences(runs)).split("<details>")[0]
    assert table.count("<tr>") == 6 and table.count("--seed") == 1
    assert "No difference." in "".join(differences(runs[:1] * 2))


def test_why_runs_cannot_be_compared(run_folder) -> None:
    a = read_run(run_folder("a"))
    assert not warnings_of([a, read_run(run_folder("b", seed=1))])
    texts = " ".join(warnings_of([a, read_run(run_folder("c", objective="electra", data="0000", length=64))]))
    assert "different objectives (electra, mlm)" in texts and "different data" in texts and "sequence lengths" in texts
    d = run_folder("d", finished=False)
    (d / "config.yaml").write_text("eval_sequences: 16\n")
    texts = " ".join(warnings_of([a, read_run(d)]))
    assert "d: unfinished: step 40 of 40" in texts and "different numbers of sequences" in texts


def test_names_are_distinct_and_a_folder_counts_once(run_folder) -> None:
    a, b, c = run_folder("one/x"), run_folder("two/x"), run_folder("y")
    runs = with_unique_names(read_once([str(a), f"{a}/", str(b), str(c), str(a.parent / ".." / "y")]))
    assert [run.name for run in runs] == [str(a), str(b), "y"]


def test_examples_stand_next_to_each_other(run_folder) -> None:
    runs = [read_run(run_folder(name)) for name in ("a", "b", "c")]
    runs[1].summary["examples"][:] = ["a held-out [sentence].\n      -> other 90 %"]
    runs[2].summary["examples"][:] = ["another [sentence].\n      -> third 1 %"]
    table = examples(runs)[1]
    rows = [re.findall("<td.*?>(.*?)</td>", row) for row in table.split("<tr>")[2:]]
    assert rows[0] == ["a held-out [sentence].", "word 50 %, text 20 %, line 5 %", "other 90 %", "–"]
    assert rows[1] == ["another [sentence].", "–", "–", "third 1 %"]
    assert not examples([read_run(run_folder("d", finished=False))])


def test_the_entropy_is_a_line_only_where_all_losses_can_be_compared_with_it(run_folder) -> None:
    a, b = read_run(run_folder("a")), read_run(run_folder("b"))
    assert baseline([a, b]) == 6.0
    b.summary["unigram_entropy"] = 7.0
    assert baseline([a, b]) is None
    b.summary.update(unigram_entropy=6.0, loss_in_nats=False)
    assert baseline([a, b]) is None and baseline([read_run(run_folder("c", finished=False))]) is None


def test_panels_of_curves(run_folder, tmp_path) -> None:
    lost = [{"step": 2, "split": "train", "loss": float("nan")}, {"step": 4, "split": "train", "loss": 1.0}]
    data = curve_data([read_run(run_folder("a")), read_run(run_folder("b", lost)), read_run(run_folder("c", []))])
    assert [(panel["title"], [one["run"] for one in panel["curves"]]) for panel in data["panels"]] == [
        *(("training loss", [0, 1]), ("validation loss", [0]), ("validation accuracy", [0])),
    ]
    assert data["panels"][0]["curves"][1]["y"] == [None, 1.0]
    odd = [{"step": 2, "split": "validation", "loss": 1.0, "<b>$\\frac$": 0.5, "\u202ex": 1}]
    titles = [panel["title"] for panel in curve_data([read_run(run_folder("d", odd))])["panels"]]
    assert titles[1:] == ["validation &lt;b&gt;$\\frac$", "validation \\u202ex"]
    assert "&lt;b&gt;$\\frac$" in curves_svg(read_run(tmp_path / "d"), None)
    assert [panel["percent"] for panel in data["panels"]] == [False, False, True]


def report(*arguments: object) -> int:
    return main(["report", *map(str, arguments)])


def test_the_page_is_one_file(run_folder, tmp_path, capsys) -> None:
    a, b = run_folder("a"), run_folder(HOSTILE_NAME, finished=False)
    assert report(a, "--out", tmp_path / "page", b) == 0
    page = (tmp_path / "page.html").read_text()
    assert f"Report on 2 runs: {tmp_path / 'page.html'}" in capsys.readouterr().out
    assert page.count("<script>") == 3 == page.count("</script>") and "plotly.js v" in page
    data = re.search("const fastbertCurves = (.*);</script>", page)[1]
    assert json.loads(data)["runs"][0] == "a" and "<" not in data
    assert not re.search(r"""<(script|img|link|iframe)[^>]*(src|href)=["']?(?!data:)""", page)
    body = Texts(re.sub("<script>.*?</script>", "", page, flags=re.DOTALL))
    assert "<script>alert(1)<script>" in body.text and "script" not in body.tags


def test_a_page_replaces_an_older_page_and_nothing_else(run_folder, tmp_path, capsys) -> None:
    a, page = run_folder("a"), tmp_path / "page.html"
    page.write_text("")
    for _ in range(2):
        assert report(a, "--out", page) == 0
    page.write_text("<html>mine</html>")
    assert report(a, "--out", page) == 2 and page.read_text() == "<html>mine</html>"
    assert "is a file that fastbert report did not write; choose another --out" in capsys.readouterr().err
    assert report(a, "--out", a) == 2 and "is a folder; give --out a file in it" in capsys.readouterr().err
    assert not Path(f"{a}.html").exists()


@pytest.mark.parametrize("out", ["-", "/dev/stdout"])
def test_the_page_on_standard_output(run_folder, capfd, out: str) -> None:
    """Also appended to a file that holds something else."""
    print("earlier output", flush=True)
    assert report(run_folder("a"), "--out", out) == 0
    text = capfd.readouterr().out.removeprefix("earlier output\n")
    assert text.startswith("<!doctype html>") and text.endswith("</html>\n")


def test_page_names(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    names = ("page", "page.html", "page.HTM", "a.b", "there", "/dev/null")
    assert [str(page_path(name)) for name in names] == [
        *("page.html", "page.html", "page.HTM", "a.b.html", "there", "/dev/null"),
    ]


def test_no_runs_and_too_many(capsys, tmp_path) -> None:
    assert report() == 2 and "give the folders of one or more runs" in capsys.readouterr().err
    assert report(*["x"] * 51) == 2 and "51 runs are too many for one page" in capsys.readouterr().err
    assert report("--runs", tmp_path / "absent") == 2 and "there is no folder" in capsys.readouterr().err
    with pytest.raises(UserError, match="is not a run"):
        read_run(tmp_path)


def test_without_plotly(run_folder, tmp_path, monkeypatch, capsys) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert report(run_folder("a"), "--out", tmp_path / "page") == 2
    assert "plotly" in capsys.readouterr().err and not (tmp_path / "page.html").exists()
