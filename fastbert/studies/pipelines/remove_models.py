"""Removal of fine-tuned models that are not retained, once all jobs of a pipeline are done."""

from pathlib import Path

from fastbert.errors import plural
from fastbert.files import remove
from fastbert.streams import echo
from fastbert.studies.engine.jobs import Job
from fastbert.studies.engine.outcomes import RUN
from fastbert.studies.engine.store import JOBS, ResultRow, ResultStore
from fastbert.studies.pipelines.graph import Graph
from fastbert.studies.pipelines.tunings import TOGETHER
from fastbert.studies.shared.comparison import mean_of_splits, score
from fastbert.studies.shared.finetune_jobs import FINETUNE


def remove_models(graph: Graph, store: ResultStore, keep: str) -> None:
    """Removes the fine-tuned models that `keep` (best, all or none) does not name: best is, for each model and task,
    the one with the highest score on dev over all seeds and settings, which may be negative."""
    if keep == "all":
        return
    folders = models_by_task(graph, store)
    best = set() if keep == "none" else {max(found, key=found.__getitem__) for found in folders.values() if found}
    gone = [path for found in folders.values() for path in found if path not in best]
    for path in gone:
        remove(path)
    if gone:
        echo(f"keep: {keep}: removed {plural(len(gone), 'fine-tuned model')}")


def models_by_task(graph: Graph, store: ResultStore) -> dict[tuple[str, str], dict[Path, float]]:
    """(Model, task) -> folder of each fine-tuned model that exists -> its score on dev."""
    found: dict[tuple[str, str], dict[Path, float]] = {}
    for job in graph.jobs:
        run = store.out / JOBS / job.id / RUN
        row = store.rows.get(job.id)
        if row is None or job.kind not in (FINETUNE, TOGETHER):
            continue
        scores = {job.task: (run, score(row))} if job.kind == FINETUNE else _together(job, row, run)
        for task, (folder, value) in scores.items():
            for path in folder.glob("**/seed-*/model"):
                found.setdefault((job.model, task), {})[path] = value
    return found


def _together(job: Job, row: ResultRow, run: Path) -> dict[str, tuple[Path, float]]:
    return {
        column: (run / name, mean_of_splits(row["tasks"][column]["best"]["dev"], row["tasks"][column]["metrics"][0]))
        for column, name in job.options["columns"].items()
    }
