"""Table of docs/results/many-tasks.md from the folders that run.sh writes: each way to train a task compared with the
task alone, over the same seeds, at the last epoch; the ways with a partner also with the task alone at equal steps.
p is that of the paired t-test, adjusted by Holm's method over the column.

    python scripts/many_tasks/compare.py OUT
"""

import statistics
import sys
from pathlib import Path

from fastbert.finetuning.results import read_results
from fastbert.finetuning.table import NOTHING
from fastbert.report.page import Table
from fastbert.studies.shared.comparison import adjusted
from fastbert.studies.shared.report import difference, interval, p_value
from fastbert.studies.shared.statistics import paired

TASKS = {"mrpc": "accuracy", "stsb": "spearman", "snli": "accuracy", "rte": "accuracy"}
WAYS = {
    "equal steps": "long-{task}",
    "SNLI, then the task": "stages-{task}/2-{task}",
    "with SNLI": "pair-{task}/{task}",
    "the four small tasks": "small/{task}",
    "all five tasks": "all/{task}",
}


EQUAL, PARTNERS = "equal steps", ("SNLI, then the task", "with SNLI")


def scores(folder: Path, metric: str) -> list[float]:
    """The metric of each seed at its last epoch."""
    (fraction,) = read_results(folder)["fractions"]
    return [seed["last"]["dev"]["dev"][metric] for seed in fraction["seeds"]]


def ensemble(folder: Path, metric: str) -> str:
    (fraction,) = read_results(folder)["fractions"]
    return f"{100 * fraction['ensemble']['dev'][metric]:.1f}"


def main(out: Path) -> None:
    found = {}
    for task, metric in TASKS.items():
        alone = out / f"single-{task}"
        if not (alone / "results.json").is_file():
            continue
        found[task, "alone"] = (scores(alone, metric), alone, None)
        for way, name in WAYS.items():
            folder = out / name.format(task=task)
            if (folder / "results.json").is_file():
                values = scores(folder, metric)
                found[task, way] = (values, folder, paired(found[task, "alone"][0], values))
    p = adjusted({" ".join(key): result for key, (_, _, result) in found.items() if result is not None})
    longer = {
        key: paired(found[key[0], EQUAL][0], values)
        for key, (values, _, _) in found.items()
        if key[1] in PARTNERS and (key[0], EQUAL) in found
    }
    p_longer = adjusted({" ".join(key): result for key, result in longer.items()})
    rows = []
    for (task, way), (values, folder, result) in found.items():
        spread = f"{100 * min(values):.1f} to {100 * max(values):.1f}"
        row = [task, way, f"{100 * statistics.median(values):.1f}", spread, ensemble(folder, TASKS[task])]
        for test, adjustment in ((result, p), (longer.get((task, way)), p_longer)):
            if test is None:
                row += [NOTHING] * 3
            else:
                row += [difference(test), interval(test), p_value(adjustment[f"{task} {way}"][0])]
        rows.append(row)
    head = ["task", "trained", "median", "seeds", "ensemble"]
    head += ["minus alone", "95 % interval", "p", "minus equal steps", "95 % interval", "p"]
    print(Table(head, rows).markdown())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
