"""The engine with jobs of its own kind: dependencies, GPUs of local workers, and what Ray is asked for."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastbert.errors import UserError
from fastbert.ray_cluster import ClusterLost, Connection
from fastbert.studies.engine import backends
from fastbert.studies.engine.backends import (
    cores_of_workers,
    may_use_gpus,
    memory_limit,
    start,
    usable_cores,
    visible_gpus,
)
from fastbert.studies.engine.events import run_events, startable
from fastbert.studies.engine.job_queue import JobQueue
from fastbert.studies.engine.live_status import LiveStatus
from fastbert.studies.engine.options import EngineOptions
from fastbert.studies.engine.outcomes import ended, print_failures
from fastbert.studies.engine.ray_backend import outcome_of, run_ray, run_remotely
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
    events = start(EngineOptions(workers=2), store.remaining, store, 3)
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


def test_jobs_for_which_memory_is_short_have_their_own_process(tmp_path, monkeypatch) -> None:
    """A process holds the memory of its largest job until it ends."""
    write_toy_runner(tmp_path, monkeypatch)
    for free, processes in ((1, 3), (2, 1)):
        monkeypatch.setattr(backends, "memory", lambda device, free=free: (free, free))
        jobs = [toy_job(name, memory=size) for name, size in {"a": 2, "b": 1, "c": 0}.items()]
        out = tmp_path / str(free)
        assert sum(event is not None for event in start(EngineOptions(), jobs, opened(out, jobs), 1)) == 6
        assert len({(out / "jobs" / name / "run" / "process").read_text() for name in "abc"}) == processes


def test_workers_that_need_all_cores_have_their_own(tmp_path, monkeypatch, capsys) -> None:
    """The process that replaces that of a failed job has the same cores."""
    write_toy_runner(tmp_path, monkeypatch)
    cores = usable_cores()
    pair = [cores[0], cores[-1]]
    monkeypatch.setattr(backends, "usable_cores", lambda: pair)
    jobs = [toy_job("a", options={"fails": True}), toy_job("b", options={"with": "c"}), toy_job("c")]
    events = start(EngineOptions(workers=2), jobs, opened(tmp_path / "out", jobs), 1)
    ended = {job.id: outcome for job, outcome in filter(None, events) if outcome}
    assert [ended[name]["result"]["cores"] for name in "bc"] == [pair[1:], pair[:1]]
    assert cores_of_workers(1, 2) == [pair] and cores_of_workers(1, 1) == []
    assert "compete" not in capsys.readouterr().err
    assert (
        cores_of_workers(3, 1) == [] and "3 workers with 1 thread each compete for 2 cores" in capsys.readouterr().err
    )


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
        with LiveStatus([toy_job("a", task="[red]x")], {}, lambda row: ("", 0.0)) as live:
            assert ("[red]x" in terminal.getvalue()) is (kind == "xterm")
            assert terminal.getvalue().rfind("\x1b[?25h") >= terminal.getvalue().rfind("\x1b[?25l")
            assert ("0 of 1 done" in terminal.getvalue()) is (kind == "xterm")
            live.ended(toy_job("a"), {"status": "done", "seconds": 1.0})
        text = terminal.getvalue()
        terminal.seek(0)
        terminal.truncate()
    assert "\x1b" not in text and "0.0000, 1 s\n" in text  # a line for each job


def test_the_table_has_the_form_that_fits_the_terminal() -> None:
    """Models in rows, tasks in rows, or a line for each model; a cell without jobs is empty."""
    cells = [(f"model {model}", f"task {task}") for model in "ab" for task in range(4) if (model, task) != ("b", 3)]
    jobs = [toy_job(f"{model}, {task}, {seed}", model=model, task=task) for model, task in cells for seed in (0, 1)]
    live = LiveStatus(jobs, {}, lambda row: ("score", row["score"]))
    for number, score in ((0, 0.5), (1, 0.75)):
        live.ended(jobs[number], {"status": "done", "seconds": 1.0, "score": score})
    live.ended(jobs[2], {"status": "failed", "reason": "as asked", "seconds": 1.0})
    rows = [
        ["", "task 0", "task 1", "task 2", "task 3"],
        ["model a", "2/2  0.6250", "0/2 1 failed", "0/2", "0/2"],
        ["model b", "0/2", "0/2", "0/2", ""],
    ]
    assert live._fitting(9 + 13 + 14 + 8 + 8, 3) == rows
    transposed = [list(row) for row in zip(*rows, strict=True)]
    assert live._fitting(9 + 13 + 14 + 8 + 7, 5) == live._fitting(8 + 14 + 9, 5) == transposed
    short = [["model a", "2/8 1 failed"], ["model b", "0/6"]]
    assert live._fitting(8 + 14 + 9, 4) == live._fitting(30, 5) == live._fitting(9 + 14, 2) == short
    assert live._fitting(9 + 13, 9) == live._fitting(80, 1) == []


def test_which_gpus_are_shared(monkeypatch) -> None:
    assert may_use_gpus([toy_job("a", device="cpu"), toy_job("b")])
    assert not may_use_gpus([toy_job("a", device="cpu")])
    assert not may_use_gpus([toy_job("a", device="cuda:1"), toy_job("b")])  # whoever names one knows which they are
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    report_gpus(monkeypatch, count=2)
    assert visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []


class NodeDiedError(Exception):
    """Named like Ray's."""


class LocalRayletDiedError(NodeDiedError):
    """Named like Ray's."""


class OtherError(Exception):
    """Named like none of Ray's."""


class ToyRay:
    """Runs `run` when a remote function is called; records what it is asked for."""

    exceptions = SimpleNamespace(RayError=Exception)

    def __init__(self, gpus: int, run: Callable[[dict, str | None], dict], without: Sequence[str] = ()) -> None:
        self.gpus, self.run, self.asked, self.alive, self.without = gpus, run, [], True, without
        strategy = SimpleNamespace(NodeAffinitySchedulingStrategy=lambda node_id, soft: (node_id, soft))
        self.util = SimpleNamespace(scheduling_strategies=strategy)

    def nodes(self) -> list[dict]:
        """Two nodes for jobs, a head node without CPUs and one that has left; `without` lack the study's folder."""
        sizes = {"one": ({"CPU": 4.0, "memory": 5e9}, True), "two": ({"CPU": 4.0, "memory": 2e9}, True)}
        sizes |= {"head": ({"memory": 9e9}, True), "gone": ({"CPU": 4.0, "memory": 9e9}, False)}
        return [
            {"NodeID": name, "NodeManagerHostname": f"host-{name}", "Alive": alive, "Resources": resources}
            for name, (resources, alive) in sizes.items()
        ]

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 4.0, **({"GPU": float(self.gpus)} if self.gpus else {})}

    def remote(self, **resources):
        def probe(scheduling_strategy):
            node, soft = scheduling_strategy
            assert not soft
            return SimpleNamespace(remote=lambda path: Outcome(there=node not in self.without and os.path.exists(path)))

        def decorate(function):
            if function is os.path.exists:
                return SimpleNamespace(options=probe)
            assert function is run_remotely

            def options(**more):
                def call(*given):
                    self.asked.append(resources | more | {"job": given[0]["id"], "folder": given[1]})
                    return self.run(*given)

                return SimpleNamespace(remote=call)

            return SimpleNamespace(options=options)

        return decorate

    def wait(self, references, timeout, num_returns=1):
        assert references  # Ray refuses none
        return references[:num_returns], references[num_returns:]

    def get(self, reference):
        answer = reference.get("raised", reference.get("there", reference))
        if isinstance(answer, Exception):
            raise answer
        return answer

    def get_runtime_context(self) -> SimpleNamespace:
        return SimpleNamespace(gcs_address="127.0.0.1:1")

    def shutdown(self) -> None:
        self.alive = False


@pytest.mark.parametrize(("gpus", "expected"), [(0, [0, 0, 1, 1]), (2, [1, 0, 1, 1])])
def test_ray_jobs_ask_for_a_gpu(gpus: int, expected: list[int], tmp_path, monkeypatch) -> None:
    """Where the cluster has any, also with device: auto; the CPU's never."""
    ray = ToyRay(gpus, lambda job, folder: Outcome(status="done", folder=folder))
    devices = ("auto", "cpu", "cuda", "cuda:1")
    jobs = [toy_job(name, device=device) for name, device in zip("abcd", devices, strict=True)]
    jobs[0], jobs[1] = replace(jobs[0], memory=3 * 10**9), replace(jobs[1], memory=8 * 10**9)
    events = run_ray(ray, JobQueue(jobs), 2, 3, tmp_path, in_place=False)
    ended = [outcome for _, outcome in filter(None, events) if outcome]
    assert [asked["memory"] for asked in ray.asked] == [3 * 10**9, 5 * 10**9, 0, 0]  # at most that of the largest node
    assert [asked["num_gpus"] for asked in ray.asked] == expected
    assert all(asked["num_cpus"] == 3 and asked["max_retries"] == 0 for asked in ray.asked)
    assert [asked["folder"] for asked in ray.asked] == [None] * 4 == [outcome["folder"] for outcome in ended]
    assert not ray.alive


class Outcome(dict):
    """Has an identity, as Ray's references do."""

    __hash__ = object.__hash__


def test_ray_jobs_that_continue_from_each_other(tmp_path, monkeypatch) -> None:
    """They run in the study's folder, which every node must have, each after the one it needs."""
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
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["jobs", "results.jsonl", "toy.json"]
    ray = ToyRay(0, None, without=["two"])
    with pytest.raises(UserError, match=f"folder {tmp_path / 'out'} is not on the node host-two of the Ray cluster"):
        start(options, jobs, opened(tmp_path / "out", jobs), 1, in_place=True)
    assert not ray.alive and not ray.asked
    ray = ToyRay(1, None)
    with pytest.raises(UserError, match="the steps were timed on this machine, which has no GPU"):
        start(options, jobs, store, 1, in_place=True, timed_on="cpu")


def test_a_cluster_whose_head_node_is_lost(tmp_path, monkeypatch, capsys) -> None:
    """Its running job has not failed. A job that only lost its node starts again, `retries` times. An error of the job
    is none of Ray's."""
    done = Outcome(status="done", precision="fp32", result={}, seconds=1.0)
    lost = [NodeDiedError("preempted"), NodeDiedError("preempted"), done]
    answers = iter(lost)
    ray = ToyRay(0, lambda job, folder: Outcome(raised=next(answers)))
    monkeypatch.setattr(backends, "connect", lambda *given: ray)
    monkeypatch.setattr("fastbert.ray_cluster.check_answers", lambda address: None)
    jobs = [toy_job("a")]
    for retries, left in ((1, "failed"), (2, "done")):
        answers = iter(lost)
        store = opened(tmp_path / str(retries), jobs)
        options = EngineOptions(backend="ray", ray_address="127.0.0.1:1", retries=retries)
        assert run_events(start(options, jobs, store, 1), store, LiveStatus(jobs, {}, lambda row: ("", 0.0))) == 0
        assert store.rows["a"]["status"] == left
        error = capsys.readouterr().err
        again = "t, m, seed 0: its node was lost (NodeDiedError: preempted); it starts again from its last files "
        assert error.count(again) == retries and f"(retry {retries} of {retries})" in error
    assert outcome_of(ray, Outcome(raised=OtherError("odd")), tmp_path).get("lost") is None

    monkeypatch.undo()
    monkeypatch.setattr(backends, "connect", lambda *given: ray)
    answers, store = iter(lost), opened(tmp_path / "out", jobs)
    assert run_events(start(options, jobs, store, 1), store, LiveStatus(jobs, {}, lambda row: ("", 0.0))) == 1
    error = capsys.readouterr().err
    assert "the connection to the Ray cluster at 127.0.0.1:1 was lost" in error and "FAILED" not in error
    assert not store.rows and not ray.alive
    answers = iter([LocalRayletDiedError("killed")])
    assert run_events(start(options, jobs, store, 1), store, LiveStatus(jobs, {}, lambda row: ("", 0.0))) == 1
    error = capsys.readouterr().err
    assert "error: Ray's process on this machine (raylet) was lost. The same command" in error and not store.rows


def test_a_head_node_that_is_silent_for_a_while(monkeypatch) -> None:
    """It is asked at most every five seconds, and is lost after thirty."""
    now, asked, answering = [0.0], [], [True]

    def check_answers(address: str) -> None:
        asked.append(now[0])
        if not answering[0]:
            raise UserError("no answer")

    monkeypatch.setattr("fastbert.ray_cluster.time.monotonic", lambda: now[0])
    monkeypatch.setattr("fastbert.ray_cluster.check_answers", check_answers)
    connection = Connection(ToyRay(0, None), None)
    for now[0] in range(1, 70):
        answering[0] = not 20 <= now[0] <= 40  # it comes back in time
        connection.check(patient=True)
    assert asked == list(range(5, 70, 5))
    answering[0] = False
    with pytest.raises(ClusterLost, match=r"the Ray cluster at 127\.0\.0\.1:1 was lost"):
        for now[0] in range(70, 200):
            connection.check(patient=True)
    assert now[0] == 95


def test_a_job_whose_process_is_killed_starts_again(tmp_path, monkeypatch, capsys) -> None:
    """In its folder. One that raises an error does not."""
    write_toy_runner(tmp_path, monkeypatch)
    jobs = [toy_job("a", options={"kills": 1}), toy_job("b", options={"fails": True}), toy_job("c", after=("a",))]
    jobs.append(toy_job("d", options={"kills": 2}))
    store = opened(tmp_path / "out", jobs)
    live = LiveStatus(jobs, store.rows, lambda row: ("attempts", row["attempts"]))
    assert run_events(start(EngineOptions(workers=2), jobs, store, 1), store, live) == 0
    attempts = {
        name: (tmp_path / "out" / "jobs" / name / "run" / "attempts").read_text().count("\n") for name in "abcd"
    }
    assert attempts == {"a": 2, "b": 1, "c": 1, "d": 2}
    assert [store.rows[name]["status"] for name in "abcd"] == ["done", "failed", "done", "failed"]
    assert "killed by SIGKILL" in store.rows["d"]["reason"] and store.rows["b"]["reason"] == "as asked"
    error = capsys.readouterr().err
    assert error.count("its process was killed by SIGKILL") == 3  # two lines of retries, and a failure
    assert error.count("it starts again from its last files (retry 1 of 1)") == 2
    assert "2 of 4 done, 0 running, 2 failed, 0 left" in error
    assert ended(143)["lost"] and "lost" not in ended(1)  # a training that SIGTERM stopped, and one that failed


def test_jobs_that_need_memory(monkeypatch, capsys) -> None:
    """A job waits until it fits, also alone; others that fit start before it, but only ten of them."""
    jobs = [
        toy_job("a", memory=6),
        toy_job("b", memory=6),
        toy_job("c", memory=4),
        toy_job("d"),
        toy_job("e", memory=11),
    ]
    queue, done = JobQueue(iter(jobs), memory=10), {"status": "done"}
    assert [queue.next(), queue.next(), queue.next(), queue.next()] == [jobs[0], jobs[2], jobs[3], None]
    queue.end(jobs[0], done)
    assert [queue.next(), queue.next()] == [jobs[1], None]
    for job in (jobs[1], jobs[2]):
        queue.end(job, done)
    assert queue.next() is None  # e would not fit even alone, but d is running
    queue.end(jobs[3], done)
    assert queue.next() is jobs[4]

    small = [toy_job(f"s{number}", memory=1) for number in range(30)]
    queue = JobQueue(iter([small[0], toy_job("large", memory=10), *small[1:]]), memory=10)
    started = [queue.next(), queue.next()]
    while (following := queue.next() or queue.next()) or queue.running:
        if following:
            started.append(following)
        else:
            queue.end(next(iter(queue.running.values())), done)
    assert [job.id for job in started].index("large") == 11 and len(started) == 31

    monkeypatch.setattr(backends, "memory", lambda device: (10 * 10**9, 20 * 10**9))
    assert memory_limit([toy_job("a")] * 2, 2) is None
    equal = [toy_job(name, memory=4 * 10**9) for name in "abc"]
    assert memory_limit(equal, 2) is None and memory_limit(equal, 3) == 10 * 10**9
    assert not capsys.readouterr().err
    large = toy_job("a", memory=12 * 10**9)
    assert memory_limit([large, toy_job("b", memory=1)], 1) == 10 * 10**9
    assert "1 job may need more than the 10.0 GB of free memory, and will run alone: t, m, seed 0" in (
        capsys.readouterr().err
    )


def test_a_node_without_the_folder(tmp_path) -> None:
    outcome = run_remotely(toy_job("a").to_dict(), str(tmp_path / "elsewhere"))
    assert outcome["status"] == "failed" and f"has no folder {tmp_path / 'elsewhere'}" in outcome["reason"]
    assert "use --backend local" in outcome["fix"]
