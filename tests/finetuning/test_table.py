"""The GLUE table: cells computed by hand, the order of papers, and a mean with its tasks."""

import pytest

from fastbert.finetuning.table import COLUMNS, Summary, glue_lines, glue_table


def figure(median: float, std: float | None = 0.01) -> dict[str, float | None]:
    return {"median": median, "mean": 0.99, "std": std, "max": 0.98}


def summary(**metrics: float) -> Summary:
    """Summary of one dev split, with the loss as in results.json."""
    return {"dev": {name: figure(value) for name, value in {**metrics, "loss": 7.0}.items()}}


def rows_of(table: str) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in cells if not row[0].startswith("-")}


def legend(table: str) -> str:
    return " ".join(line for line in table.splitlines() if line[:1] != "|")


MNLI = {"dev_matched": {"accuracy": figure(0.843)}, "dev_mismatched": {"accuracy": figure(0.831, 0.02)}}
ALL = {
    "rte": summary(accuracy=0.7),
    "mrpc": summary(accuracy=0.84, f1=0.88),
    "stsb": summary(pearson=0.9, spearman=0.88),
    "cola": summary(matthews=-0.02),
    "sst2": summary(accuracy=0.92),
    "qnli": summary(accuracy=0.91),
    "qqp": summary(accuracy=0.91, f1=0.87),
    "mnli": MNLI,
}


def test_all_tasks_in_the_order_of_papers() -> None:
    table = glue_table({"mine": ALL}, seeds=5)
    found = rows_of(table)
    assert found["Model"] == ["MNLI-m/mm", "QQP", "QNLI", "SST-2", "CoLA", "STS-B", "MRPC", "RTE", "Mean"]
    mean = (83.7 + 89 + 91 + 92 - 2 + 89 + 86 + 70) / 8
    assert found["mine"] == [
        "84.3/83.1 ± 1.0/2.0",
        "87.0/91.0 ± 1.0/1.0",
        "91.0 ± 1.0",
        "92.0 ± 1.0",
        "-2.0 ± 1.0",
        "90.0/88.0 ± 1.0/1.0",
        "88.0/84.0 ± 1.0/1.0",
        "70.0 ± 1.0",
        f"{mean:.1f}",
    ]
    printed = legend(table)
    assert "median over 5 seeds ± the standard deviation" in printed and "mean is over GLUE's 8 tasks." in printed
    assert "MRPC: F1/accuracy" in printed and "STS-B: Pearson/Spearman" in printed


def test_the_mean_is_over_what_every_row_has() -> None:
    b = {"rte": summary(accuracy=0.5), "cola": summary(matthews=0.3), "sst2": summary(accuracy=0.9)}
    table = glue_table({"a": {"rte": ALL["rte"], "cola": ALL["cola"]}, "b": b})
    found = rows_of(table)
    assert found["Model"] == ["SST-2", "CoLA", "RTE", "Mean of 2"]
    assert found["a"] == ["–", "-2.0 ± 1.0", "70.0 ± 1.0", "34.0"]
    assert found["b"] == ["90.0 ± 1.0", "30.0 ± 1.0", "50.0 ± 1.0", "40.0"]
    assert "The mean is over 2 of GLUE's 8 tasks: CoLA, RTE, since not every model has the others." in legend(table)
    apart = glue_table({"a": {"rte": ALL["rte"]}, "b": {"cola": ALL["cola"]}})
    assert [row[-1] for row in rows_of(apart).values()] == ["Mean", "–", "–"]
    assert "There is no mean" in legend(apart)


def test_other_tasks_come_after_the_mean_and_do_not_count() -> None:
    other = {"snli": summary(accuracy=0.8, macro_f1=0.7), "wnli": summary(accuracy=0.56), "rte": ALL["rte"]}
    table = glue_table({"a": other})
    assert rows_of(table)["Model"] == ["RTE", "Mean of 1", "snli (accuracy/macro_f1)", "WNLI (accuracy)"]
    assert rows_of(table)["a"] == ["70.0 ± 1.0", "70.0", "80.0/70.0 ± 1.0/1.0", "56.0 ± 1.0"]
    assert "after the mean do not count" in legend(table)
    assert rows_of(glue_table({"a": {"snli": other["snli"]}}))["Model"] == ["snli (accuracy/macro_f1)"]


def test_a_custom_task_with_the_name_of_one_of_glue_is_not_that_task() -> None:
    table = glue_table({"a": {"mrpc": summary(accuracy=0.8), "stsb": summary(spearman=0.5), "rte": ALL["rte"]}})
    assert rows_of(table)["Model"] == ["RTE", "Mean of 1", "mrpc (accuracy)", "stsb (spearman)"]
    assert rows_of(table)["a"] == ["70.0 ± 1.0", "70.0", "80.0 ± 1.0", "50.0 ± 1.0"]


def test_one_seed_has_no_spread() -> None:
    table = glue_table({"a": {"rte": {"dev": {"accuracy": figure(0.7, None)}}}}, seeds=1)
    assert rows_of(table)["a"] == ["70.0", "70.0"] and "±" not in table and "All tasks: accuracy." in table


@pytest.mark.parametrize("name", ["runs/a|b", "x" * 70])
def test_it_is_markdown_and_lines_up(name: str) -> None:
    lines = [line for line in glue_table({name: ALL, "b": {}}).splitlines() if line[:1] == "|"]
    assert len({len(line) for line in lines}) == 1 and set(lines[1]) == set("|-: ")
    assert {line.replace("\\|", "").count("|") for line in lines} == {len(COLUMNS) + 3}


def test_a_terminal_has_a_line_for_each_task() -> None:
    text = glue_lines({"mine": ALL, "runs/a|b": {"rte": ALL["rte"]}}, seeds=5)
    lines = text.split("\n\n")[0].splitlines()[1:]
    assert [line.split()[0] for line in lines if "--" not in line] == ["Model", *COLUMNS.values(), "Mean"]
    assert {len(line) for line in lines} == {len(lines[0])} and len(lines[0]) < 80
    assert lines[0].split() == ["Model", "mine", "runs/a|b"]
    assert lines[2].split() == ["MNLI-m/mm", "84.3/83.1", "±", "1.0/2.0", "–"]
    assert text.endswith(legend(glue_table({"mine": ALL, "b": {"rte": ALL["rte"]}}, seeds=5)).split(". ")[-1])
