"""A Ray cluster of several raylets on this machine: a node that is lost during a job, and then the head node."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastbert import ray_cluster
from fastbert.cli import main
from fastbert.studies.engine.backends import start
from fastbert.studies.engine.events import run_events
from fastbert.studies.engine.live_status import LiveStatus
from fastbert.studies.engine.options import EngineOptions
from tests.studies.conftest import read_rows, toy_job, without_times, write_pipeline
from tests.studies.test_engine import opened

RUNNER = """
import os
import random
import time
from pathlib import Path

def run(job, out):
    out.mkdir(exist_ok=True)
    attempts = len(list(out.glob("attempt-*")))
    (out / f"attempt-{attempts}").touch()
    while attempts == 0 and job["options"].get("waits"):  # until its process ends
        time.sleep(0.05)
    before = [float((out.parents[1] / name / "run" / "value").read_text()) for name in job["after"]]
    value = sum(before, random.Random(job["seed"]).random()) / 3
    (out / "value").write_text(repr(value))
    return {"status": "done", "precision": "fp64", "result": {"value": value, "threads": os.environ["OMP_NUM_THREADS"]}}
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Any]:
    """A head node without CPUs for jobs, and a node with two."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        modules, home = tmp_path_factory.mktemp("modules"), tmp_path_factory.mktemp("home")
        (modules / "toy_runner.py").write_text(RUNNER)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(modules), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("HOME", str(home))
        patch.setenv("RAY_AUTH_MODE", "disabled")  # otherwise Ray writes a token to the home directory
        soon = {"health_check_period_ms": 300, "health_check_timeout_ms": 5000, "health_check_failure_threshold": 3}
        head = {"num_cpus": 0, "object_store_memory": 100 * 2**20, "_system_config": soon}
        found = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
        yield SimpleNamespace(whole=found, node=add_node(found), options=("ray", found.address))
        ray.shutdown()  # connected if the test has failed; the cluster cannot be stopped then
        found.shutdown()


def add_node(cluster: Any) -> Any:
    return cluster.add_node(wait=False, num_cpus=2, object_store_memory=100 * 2**20)


def run(out: Path, jobs: list, backend: str = "local", address: str | None = None) -> tuple[int, dict[str, dict]]:
    """The exit code and the rows of a study that is not done yet, in its second call too."""
    store = opened(out, jobs)
    options = EngineOptions(workers=2, backend=backend, ray_address=address)
    live = LiveStatus(jobs, store.rows, lambda row: ("value", row["value"]))
    return run_events(start(options, store.remaining, store, 1, in_place=True), store, live), store.rows


def meanwhile(path: Path, act) -> threading.Thread:
    """Calls `act` as soon as the file exists, in parallel to the test."""

    def wait() -> None:
        end = time.monotonic() + 60
        while not path.exists() and time.monotonic() < end:
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def attempts(out: Path, name: str) -> int:
    return len(list((out / "jobs" / name / "run").glob("attempt-*")))


def figures(rows: dict[str, dict]) -> dict[str, dict]:
    """Rows without what depends on the clock and on the folder."""
    return {name: {key: row[key] for key in row.keys() - {"seconds", "folder"}} for name, row in rows.items()}


def test_a_pipeline_on_a_cluster(cluster, pipeline, tmp_path, capsys) -> None:
    """Jobs that continue from each other's files on a node of a running cluster, one of them from a checkpoint of
    another's, give the results of processes of this machine, which do not run them again."""
    path, found = write_pipeline(tmp_path, pipeline), {}
    back_ends = {"local": [], "ray": ["--backend", "ray", "--ray-address", cluster.options[1]]}
    call = ["run", path, "--until", "first,short", "--out"]
    for name, flags in back_ends.items():
        assert main([*call, str(tmp_path / name), *flags]) == 0
        rows = without_times(read_rows(tmp_path / name))
        found[name] = [(row["id"], row.get("best"), row.get("unigram_entropy"), row["status"]) for row in rows]
    assert found["ray"] == found["local"] and len(found["ray"]) == 4
    models = [sorted((tmp_path / name).glob("jobs/*/run/**/model.safetensors")) for name in back_ends]
    assert [one.read_bytes() for one in models[0]] == [one.read_bytes() for one in models[1]] and len(models[0]) > 3
    capsys.readouterr()
    assert main([*call, str(tmp_path / "ray")]) == 0
    assert "; 4 done before" in capsys.readouterr().err


def test_nodes_that_are_lost(cluster, tmp_path, monkeypatch, capsys) -> None:
    """A job on a node that is killed runs again on another one, to the results of processes of this machine. When the
    head node is lost no job has failed, and the same command without it runs only what is missing."""
    jobs = [toy_job("a", seed=1), toy_job("b", seed=2), toy_job("c", seed=3, after=("a", "b"))]
    waiting = [jobs[0], toy_job("b", seed=2, options={"waits": True}), jobs[2]]
    out, cluster_of_nodes = tmp_path / "lost-node", cluster.whole

    def replace_node() -> None:
        add_node(cluster_of_nodes)
        cluster_of_nodes.remove_node(cluster.node, allow_graceful=False)

    thread = meanwhile(out / "jobs" / "b" / "run" / "attempt-0", replace_node)
    code, rows = run(out, waiting, *cluster.options)
    thread.join()
    error = capsys.readouterr().err
    assert code == 0 and "3 of 3 done" in error and error.count("its node was lost") >= 1
    assert attempts(out, "b") == 2 and attempts(out, "c") == 1
    assert figures(rows) == figures(run(tmp_path / "local", jobs)[1]) and rows["c"]["value"] > 0

    monkeypatch.setattr(ray_cluster, "CHECK_SECONDS", 0.2)
    monkeypatch.setattr(ray_cluster, "PATIENCE", 0.5)
    out, head = tmp_path / "lost-head", cluster_of_nodes.head_node
    waiting[1] = toy_job("b", seed=2, after=("a",), options={"waits": True})
    started = out / "jobs" / "b" / "run" / "attempt-0"
    thread = meanwhile(started, lambda: head.kill_all_processes(check_alive=False, allow_graceful=False))
    code, rows = run(out, waiting, *cluster.options)
    thread.join()
    error = capsys.readouterr().err
    assert code == 1 and list(rows) == ["a"] and "FAILED" not in error and "not run" not in error
    assert f"error: the connection to the Ray cluster at {cluster.options[1]} was lost" in error
    code, rows = run(out, waiting)
    assert code == 0 and set(rows) == set("abc")
    assert [attempts(out, name) for name in "abc"] == [1, 2, 1]
