"""Fine-tunings as jobs: an attempt that was killed is continued, unless it was on another model or other data."""

import pytest

from fastbert.finetuning.loop import Tuner
from fastbert.studies.shared.finetune_jobs import finetune_job
from fastbert.studies.sweep.options import load_sweep
from fastbert.studies.sweep.sweep_plan import plan_sweep
from tests.finetuning.test_resume import Killed, killed
from tests.studies.conftest import read_rows, write_sweep

STEPS = 4  # of each of the two epochs


def test_a_killed_job_is_continued(axes, finished, tmp_path, monkeypatch) -> None:
    grid, options = load_sweep(write_sweep(tmp_path, axes))
    job = plan_sweep(grid, options).jobs[0].to_dict()
    row = next(row for row in read_rows(finished) if row["id"] == job["id"])

    def stop_in_second_epoch(out) -> None:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killed(patch, Tuner, "train_step", STEPS + 1)
            finetune_job(job, out)

    stop_in_second_epoch(tmp_path / "run")
    with monkeypatch.context() as patch:
        steps = killed(patch, Tuner, "train_step", -1)
        outcome = finetune_job(job, tmp_path / "run")
    assert len(steps) == STEPS
    assert (outcome["result"]["best"], outcome["result"]["last"]) == (row["best"], row["last"])
    # Planned on other data, or stopped before it was written what it is: all over again.
    stop_in_second_epoch(tmp_path / "other")
    other = job | {"identity": job["identity"] | {"data": "01234567"}}
    with monkeypatch.context() as patch:
        steps = killed(patch, Tuner, "train_step", -1)
        assert finetune_job(other, tmp_path / "other")["reason"] == "the data changed after the study had started"
        assert len(steps) == 2 * STEPS
        (tmp_path / "run" / "manifest.json").unlink()
        assert finetune_job(job, tmp_path / "run")["status"] == "done"
        assert len(steps) == 4 * STEPS
