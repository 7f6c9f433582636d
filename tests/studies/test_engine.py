"""The engine with jobs of its own kind: dependencies, GPUs of local workers, and what Ray is asked for."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastbert.errors import UserError
from fastbert.studies.engine import backends
from fastbert.studies.engine.backends import may_use_gpus, start, visible_gpus
from fastbert.studies.engine.events import run_events, startable
from fastbert.studies.engine.live_status import LiveStatus
from fastbert.studies.engine.options import EngineOptions
from fastbert.studies.engine.outcomes import print_failures
from fastbert.studies.engine.ray_backend import run_ray, run_remotely
from fastbert.studies.engine.store import ResultStore
from tests.gpus import report_gpus
from tests.studies.conftest import toy_job, write_toy_runner
from tests.test_progress import Terminal


def opened(out: Path, jobs: list) -> ResultStore:
    out.mkdir(exist_ok=True)
    store = ResultStore(out, "toy", lambda row, where: None)
    store.begin({}, jobs)
    return store


def test_a_graph_of_jobs_of_a_new_kind(tmp_path, monkeypatch, capsys) -> None:
    """Jobs name their runner; each starts once all that it depends on are done. The worker that replaces that of a
    failed job has its GPU, while the other one is at work on its own."""
    write_toy_runner(tmp_path, monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, GPU-7, -1, 3")
    jobs = [toy_job("a", task="u", options={"fails": True}), toy_job("b", options={"with": "c"}), toy_job("c")]
    jobs += [toy_job("d", after=("c", "a")), toy_job("e", after=("b", "c")), toy_job("f", after=("e", "d"))]
    store = opened(tmp_path / "out", jobs)
    live = LiveStatus(jobs, store.rows, lambda row: ("gpu", 0.0))
    assert run_events(start(EngineOptions(workers=2), store.remaining, store, 3), store, live) == 0
    error = capsys.readouterr().err
    assert "2 jobs did not run: u, m, seed 0 failed\n" in error
    assert "3 of 6 done, 0 running, 1 failed, 2 not run, 0 left" in error
    store = opened(tmp_path / "out", jobs)
    rows = store.rows
    assert {name: rows[name]["status"] for name in "abcdef"} == {
        **{"a": "failed", "d": "not run", "f": "not run"},
        **dict.fromkeys("bce", "done"),
    }
    assert rows["a"]["reason"] == "as asked" and rows["b"]["kind"] == "toy"
    skipped = {"reason": "not run: u, m, seed 0 failed", "fix": "", "log": [], "seconds": None}
    assert rows["d"] | skipped == rows["d"] and rows["f"] | skipped == rows["f"]
    assert [job.id for job in store.remaining] == ["a", "d", "f"] and "; 1 failed before" in store.done_before
    assert rows["e"]["before"] == ["a", "b", "c", "e"]
    assert [rows[name]["CUDA_VISIBLE_DEVICES"] for name in "bc"] == ["GPU-7", "5"]
    assert rows["b"]["OMP_NUM_THREADS"] == "3"
    process = {name: (tmp_path / "out" / "jobs" / name / "run" / "process").read_text() for name in "abce"}
    assert process["a"] not in {process[name] for name in "bce"}
    jobs[0] = toy_job("a", task="u")  # the next call tries again
    store = opened(tmp_path / "out", jobs)
    for job in (remaining := store.remaining):
        del store.rows[job.id]
    events = start(EngineOptions(workers=2), remaining, store, 3)
    assert run_events(events, store, LiveStatus(jobs, store.rows, lambda row: ("gpu", 0.0))) == 0
    assert all(store.is_done(job) for job in jobs)
    with pytest.raises(ValueError, match="t, m, seed 0 depends on b"):
        start(EngineOptions(), [toy_job("a", after=("b",)), toy_job("b")], opened(tmp_path / "other", jobs), 1)


def test_a_job_waits_for_all_that_it_depends_on() -> None:
    rows: dict[str, dict] = {}
    jobs = [toy_job("a"), toy_job("b"), toy_job("c", after=("a", "b")), toy_job("d", after=("c",))]
    queue = startable(jobs, rows)
    assert [next(queue), next(queue), next(queue)] == [*jobs[:2], None]
    rows["a"] = {"status": "done"}
    assert next(queue) is None
    rows["b"] = {"status": "done"}
    assert [next(queue), next(queue)] == [jobs[2], None]
    rows["c"] = {"status": "failed"}
    assert next(queue, "the end") == "the end"


def test_failures_and_what_they_prevented_are_printed(capsys) -> None:
    """One by one up to three jobs for each failure, counted beyond."""
    failed = {"task": "t", "model": "m", "status": "failed", "reason": "as asked", "fix": "", "log": []}
    rows = [failed | {"seed": 0}, failed | {"seed": 1}]
    for count, cause in ((3, "t, m, seed 0"), (4, "t, m, seed 1")):
        lost = {"status": "not run", "reason": f"not run: {cause} failed"}
        rows += [failed | lost | {"task": f"u{number}", "seed": cause[-1]} for number in range(count)]
    assert print_failures(rows, 12, lambda row: f"seed {row['seed']}") == 1
    error = capsys.readouterr().err
    assert error.count("FAILED") == 2 and "2 of 12 jobs failed, 7 did not run; the same command" in error
    listed = [line for line in error.splitlines() if line.startswith("NOT RUN")]
    assert listed == [f"NOT RUN u{number}, m, seed 0: t, m, seed 0 failed" for number in range(3)]
    assert "\n4 jobs did not run: t, m, seed 1 failed\n" in error
    assert print_failures([], 12, str) == 0


def test_gpus_take_turns(tmp_path, monkeypatch) -> None:
    """Three workers, two GPUs; the jobs are there before the first ends."""
    write_toy_runner(tmp_path, monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7")
    jobs = [toy_job(name, device=device) for name, device in (("a", "auto"), ("b", "cuda"), ("c", "cpu"))]
    events = start(EngineOptions(workers=3), jobs, opened(tmp_path / "out", jobs), 1)
    ended = {job.id: outcome for job, outcome in filter(None, events) if outcome}
    gpus = {name: outcome["result"]["CUDA_VISIBLE_DEVICES"] for name, outcome in ended.items()}
    assert gpus == {"a": "5", "b": "GPU-7", "c": "5"}


def test_the_time_left_goes_by_the_cost_of_jobs(monkeypatch) -> None:
    now, jobs = [0.0], [toy_job("a", cost=3.0), toy_job("b"), toy_job("c", cost=2.0)]
    monkeypatch.setattr("fastbert.studies.engine.live_status.time.monotonic", lambda: now[0])
    live = LiveStatus(jobs, {}, lambda row: ("", 0.0))
    live.begun(jobs[0])
    now[0] = 30.0
    live.ended(jobs[0], {"status": "done", "seconds": 30.0})
    assert live.status() == "1 of 3 done, 0 running, 0 failed, 2 left, 2 jobs/min, 0:30 left"


def test_the_table_leaves_the_cursor_visible_and_needs_a_terminal_that_redraws(monkeypatch) -> None:
    """A study that is killed cannot show the cursor again."""
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    for kind in ("xterm", "dumb"):
        monkeypatch.setenv("TERM", kind)
        with LiveStatus([toy_job("a")], {}, lambda row: ("", 0.0)) as live:
            assert terminal.getvalue().rfind("\x1b[?25h") >= terminal.getvalue().rfind("\x1b[?25l")
            assert ("0 of 1 done" in terminal.getvalue()) is (kind == "xterm")
            live.ended(toy_job("a"), {"status": "done", "seconds": 1.0})
        text = terminal.getvalue()
        terminal.seek(0)
        terminal.truncate()
    assert "\x1b" not in text and "0.0000, 1 s\n" in text  # a line for each job


def test_which_gpus_are_shared(monkeypatch) -> None:
    assert may_use_gpus([toy_job("a", device="cpu"), toy_job("b")])
    assert not may_use_gpus([toy_job("a", device="cpu")])
    assert not may_use_gpus([toy_job("a", device="cuda:1"), toy_job("b")])  # whoever names one knows which they are
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    report_gpus(monkeypatch, count=2)
    assert visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []


class ToyRay:
    """Runs `run` when a remote function is called; records what it is asked for."""

    exceptions = SimpleNamespace(RayError=KeyError)

    def __init__(self, gpus: int, run: Callable[[dict, str | None], dict]) -> None:
        self.gpus, self.run, self.asked, self.alive = gpus, run, [], True

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 4.0, **({"GPU": float(self.gpus)} if self.gpus else {})}

    def remote(self, **resources):
        def decorate(function):
            assert function is run_remotely

            def options(**more):
                def call(*given):
                    self.asked.append(resources | more | {"job": given[0]["id"], "folder": given[1]})
                    return (self.run(*given),)

                return SimpleNamespace(remote=call)

            return SimpleNamespace(options=options)

        return decorate

    def wait(self, references, timeout):
        assert references  # Ray refuses none
        return references[:1], references[1:]

    def get(self, reference):
        return reference[0]

    def shutdown(self) -> None:
        self.alive = False


@pytest.mark.parametrize(("gpus", "expected"), [(0, [0, 0, 1, 1]), (2, [1, 0, 1, 1])])
def test_ray_jobs_ask_for_a_gpu(gpus: int, expected: list[int], tmp_path, monkeypatch) -> None:
    """Where the cluster has any, also with device: auto; the CPU's never."""
    ray = ToyRay(gpus, lambda job, folder: Outcome(status="done", folder=folder))
    devices = ("auto", "cpu", "cuda", "cuda:1")
    jobs = [toy_job(name, device=device) for name, device in zip("abcd", devices, strict=True)]
    ended = [outcome for _, outcome in filter(None, run_ray(ray, jobs, 2, 3, tmp_path, in_place=False)) if outcome]
    assert [asked["num_gpus"] for asked in ray.asked] == expected
    assert all(asked["num_cpus"] == 3 and asked["max_retries"] == 0 for asked in ray.asked)
    assert [asked["folder"] for asked in ray.asked] == [None] * 4 == [outcome["folder"] for outcome in ended]
    assert not ray.alive


class Outcome(dict):
    """Has an identity, as Ray's references do."""

    __hash__ = object.__hash__


def test_ray_jobs_that_continue_from_each_other(tmp_path, monkeypatch) -> None:
    """They run in the study's folder, each after the one it needs; nothing is left when that has failed."""
    done = {"status": "done", "precision": "fp32", "result": {}, "seconds": 1.0}
    outcomes = {"a": done, "b": {"status": "failed", "reason": "as asked", "fix": "", "log": []}}
    monkeypatch.setattr(backends, "connect", lambda *given: ray)
    ray, options = ToyRay(1, lambda job, folder: Outcome(outcomes[job["id"]])), EngineOptions(backend="ray")
    jobs = [toy_job("a"), toy_job("b", after=("a",)), toy_job("c", after=("b",))]
    store = opened(tmp_path / "out", jobs)
    events = start(options, jobs, store, 1, in_place=True, timed_on="cuda")
    assert run_events(events, store, LiveStatus(jobs, {}, lambda row: ("", 0.0))) == 0
    assert [asked["job"] for asked in ray.asked] == ["a", "b"]
    assert [store.rows[name]["status"] for name in "abc"] == ["done", "failed", "not run"]
    assert [Path(asked["folder"]) for asked in ray.asked] == [tmp_path / "out" / "jobs" / name for name in "ab"]
    assert (tmp_path / "out" / "jobs" / "a").is_dir()
    with pytest.raises(UserError, match="the steps were timed on this machine, which has no GPU"):
        start(options, jobs, store, 1, in_place=True, timed_on="cpu")


def test_a_node_without_the_folder(tmp_path) -> None:
    outcome = run_remotely(toy_job("a").to_dict(), str(tmp_path / "elsewhere"))
    assert outcome["status"] == "failed" and f"has no folder {tmp_path / 'elsewhere'}" in outcome["reason"]
    assert "use --backend local" in outcome["fix"]
