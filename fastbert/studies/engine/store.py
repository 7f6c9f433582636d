"""Folder of a study: its sealed record, results.jsonl with a row for each job that has ended, and jobs/<id>/."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastbert.config import differences
from fastbert.errors import LINE, UserError
from fastbert.files import atomic_file, contents, refuse_link, remove_leftovers
from fastbert.inputs import read_input
from fastbert.records import check, finite_or_none, json_text, parse_json, read_sealed, seal_of, write_sealed
from fastbert.studies.engine.jobs import Job, title
from fastbert.studies.engine.outcomes import NOT_RUN, failure, parted
from fastbert.training.hardware import describe_machine

RESULTS, JOBS = "results.jsonl", "jobs"
LARGEST_RESULTS = 2**28  # bytes

ResultRow = dict[str, Any]
"""A line of results.jsonl without its seal."""
RowCheck = Callable[[ResultRow, str], None]
"""(Row of a finished job, its origin) -> raises a UserError if the row lacks figures of its kind."""


class ResultStore:
    """Results of a study's jobs, in its folder.

    Args:
        out: the folder; to write, the caller holds its lock. To read, it need not exist.
        what: sweep or ablation, the name of the record and of the folder in errors.
        check_done: check of the rows of finished jobs.

    Attributes:
        jobs: jobs of this call, set by `begin`.
        rows: rows by job id, including those of an earlier call.

    Raises:
        UserError: `out` holds other files, or is one.
    """

    def __init__(self, out: Path, what: str, check_done: RowCheck) -> None:
        self.out, self.what, self.check_done = out, what, check_done
        self.jobs: list[Job] = []
        self.rows: dict[str, ResultRow] = {}
        if os.path.lexists(out) and not out.is_dir():
            raise UserError(f"{out} is not a folder; choose another --out")
        if out.is_dir() and not self.record.is_file() and contents(out):
            raise UserError(f"{out} is not empty and holds no {what}; choose another --out")

    @property
    def record(self) -> Path:
        return self.out / f"{self.what}.json"

    def described(self) -> dict[str, Any]:
        """The record written by an earlier call; empty without one.

        Raises:
            UserError: it is damaged.
        """
        if not self.record.is_file():
            return {}
        shape = {"axes": dict, "jobs": [str], "seconds?": {str: [float]}}
        return read_sealed(self.record, f"the record of the {self.what}", shape, "restore it, or choose another --out")

    def read(self, jobs: list[Job]) -> None:
        """Reads the rows of an earlier call for these jobs.

        Raises:
            UserError: a row is damaged.
        """
        self.jobs, self.rows = jobs, read_result_rows(self.out / RESULTS, self.check_done)

    def begin(self, description: dict[str, Any], jobs: list[Job], may_differ: bool = False, **more: Any) -> None:
        """Writes the study's record, with `more` keys, and reads its rows. Its axes may differ from those of the last
        call, if the two have a job in common, or if `may_differ` is set.

        Raises:
            UserError: `out` holds another study, a damaged row, or a link instead of the folder of its jobs.
        """
        refuse_link(self.out / JOBS)
        before = self.described()
        self.read(jobs)
        ids = [job.id for job in jobs]
        if before and not may_differ and not set(ids) & {*before["jobs"], *self.rows}:
            changed = LINE.join(differences(before["axes"], description))
            raise UserError(
                f"{self.out} holds another {self.what}: they have no job in common. What differs:{LINE}{changed}{LINE}"
                "Give the same file to continue it, or choose another --out"
            )
        remove_leftovers(self.out)
        write_sealed(self.record, {"axes": description, "jobs": ids, **more, "machine": describe_machine()})
        for job in jobs:
            if job.id in self.rows:
                self.rows[job.id] |= self._names(job)  # names in the YAML file and --out may have changed

    def add(self, job: Job, outcome: dict[str, Any]) -> ResultRow:
        """Writes the row of a job that has ended, and returns it."""
        self.rows[job.id] = self._row(job, outcome)
        self.write()
        return self.rows[job.id]

    def skip(self, failed: Job) -> list[Job]:
        """Writes rows for the jobs that depend on `failed`, directly or through others, and returns these jobs: they
        did not run. The reason names `failed`, even where they depend on it through others."""
        lost, found = {failed.id}, []
        for job in self.jobs:  # a job comes after those that it depends on
            if lost.intersection(job.after) and job.id not in self.rows:
                lost.add(job.id)
                found.append(job)
        outcome = failure(f"{NOT_RUN}: {title(failed)} failed", "") | {"status": NOT_RUN}
        self.rows |= {job.id: self._row(job, outcome) for job in found}
        if found:
            self.write()
        return found

    def _row(self, job: Job, outcome: dict[str, Any]) -> ResultRow:
        row = {"id": job.id, "kind": job.kind, "status": outcome["status"], **self._names(job), "seed": job.seed}
        row |= job.setting
        if outcome["status"] == "done":
            metrics = {"metrics": outcome["metrics"]} if "metrics" in outcome else {}
            result = {key: value for key, value in outcome["result"].items() if key not in ("seed", "model")}
            row |= {**metrics, **result, "precision": outcome["precision"]}
        else:
            row |= {key: outcome[key] for key in ("reason", "fix", "log") if key in outcome}
        return row | {"seconds": outcome.get("seconds"), "configuration": job.identity}

    def write(self) -> None:
        """Writes all rows: first those of this call's jobs in their order, then those that only an earlier call had."""
        ids = [job.id for job in self.jobs if job.id in self.rows]
        with atomic_file(self.out / RESULTS, "w") as file:
            for key in dict.fromkeys([*ids, *self.rows]):
                row = finite_or_none(self.rows[key])
                file.write(json_text({**row, "seal": seal_of(row)}, ensure_ascii=False) + "\n")

    def is_done(self, job: Job) -> bool:
        return is_done(self.rows.get(job.id))

    @property
    def remaining(self) -> list[Job]:
        """The jobs that are not done, in their order."""
        return [job for job in self.jobs if not self.is_done(job)]

    @property
    def ended(self) -> list[ResultRow]:
        """The rows of this call's jobs that are done, failed or did not run because another one failed."""
        return [self.rows[job.id] for job in self.jobs if job.id in self.rows]

    @property
    def done_before(self) -> str:
        """Text with the numbers of jobs that an earlier call finished and that failed there."""
        failed = len(parted(self.rows[job.id] for job in self.remaining if job.id in self.rows)[0])
        done = len(self.jobs) - len(self.remaining)
        again = f"; {failed} failed before and run again" if failed else ""
        return (f"; {done} done before" if done else "") + again

    def _names(self, job: Job) -> ResultRow:
        """Values of a row that do not define a result."""
        return {"model": job.model, "task": job.task, "folder": str(self.out / JOBS / job.id)}


def is_done(row: Mapping[str, Any] | None) -> bool:
    return row is not None and row["status"] == "done"


def read_result_rows(path: Path, check_done: RowCheck) -> dict[str, ResultRow]:
    """The rows of results.jsonl by the jobs' ids; empty without a file.

    Raises:
        UserError: a line is damaged, or the path is not a file: detected before any job, not when a row is written.
    """
    rows: dict[str, ResultRow] = {}
    if not os.path.lexists(path):
        return rows
    for number, line in enumerate(read_input(path, most=LARGEST_RESULTS).split(b"\n"), 1):
        if not line:
            continue
        try:
            row = _read_row(line, f"{path}, line {number}", check_done)
        except UserError as error:
            raise UserError(f"{error}; delete the line, and its job runs again") from None
        rows[row["id"]] = row
    return rows


def _read_row(line: bytes, where: str, check_done: RowCheck) -> ResultRow:
    row = parse_json(line, where, {"id": str, "status": str})
    if row.pop("seal", None) not in (None, seal_of(row)):  # None: written by an older version
        raise UserError(f"{where} is damaged: its hash does not fit")
    if is_done(row):
        check_done(row, where)
    else:
        check(row, {"reason": str, "fix": str, "log": [str]}, where)
    return row
