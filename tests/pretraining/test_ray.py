"""Pretraining on Ray itself, in workers on this machine: a worker is killed, then the command is stopped, and one
process finishes the run, which equals an uninterrupted one. And errors before and in the workers."""

import importlib.util
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fastbert.cli import main
from fastbert.config import from_dict, load_yaml
from fastbert.errors import UserError
from fastbert.pretraining.on_ray import resources_of_worker
from fastbert.pretraining.options import LAUNCH, PretrainOptions

STEPS = 40
RAY = ["--launch", "ray", "--processes", "2"]


@pytest.fixture(scope="module")
def ray_flags(tmp_path_factory) -> Iterator[list[str]]:
    """Flags for two processes on a cluster of this machine that runs for all tests."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        patch.setenv("HOME", str(home))
        patch.setenv("RAY_AUTH_MODE", "disabled")  # otherwise Ray writes a token to the home directory
        cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 2, "object_store_memory": 100 * 2**20},
            shutdown_at_exit=False,
        )
        yield [*RAY, "--ray-address", cluster.address]
        cluster.shutdown()
        assert not list(home.iterdir())


@pytest.fixture
def options(prepared) -> list[str]:
    """A run of many micro-batches, so that its steps take long enough to be interrupted."""
    return [
        *("pretrain", "--data", str(prepared), "--layers", "2", "--width", "32", "--heads", "2", "--length", "32"),
        *("--batch-size", "32", "--machine.micro-batch-size", "2", "--machine.precision", "fp32"),
        *("--steps", str(STEPS), "--eval-every", str(STEPS), "--eval-sequences", "16", "--checkpoint-every", "4"),
    ]


def workers_of(driver: int) -> list[int]:
    """Process ids of the workers of Ray Train that descend from the process `driver`."""
    parents, workers = {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if (folder / "cmdline").read_text().startswith("ray::RayTrainWorker"):
                workers.append(int(folder.name))
        except OSError:  # it has ended
            continue

    def descends(process: int) -> bool:
        return process == driver or (process in parents and descends(parents[process]))

    return [worker for worker in workers if descends(worker)]


def kill_and_stop(run: Path, ended: threading.Event, killed: list[int]) -> None:
    """Kills a worker after the first checkpoint, and stops the command when the run has been resumed."""

    def wait_for(condition) -> bool:
        while not ended.is_set():
            if condition():
                return True
            time.sleep(0.02)
        return False

    if not wait_for(lambda: list(run.glob("checkpoints/step-*/state.json"))):
        return
    killed.append(workers_of(os.getpid())[-1])
    os.kill(killed[0], signal.SIGKILL)
    if wait_for(lambda: len(json.loads((run / "manifest.json").read_text())["sessions"]) == 2):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_killed_worker_and_a_stopped_command(options, ray_flags, tmp_path, capsys, monkeypatch) -> None:
    """Weights are sharded. Neither Ray's messages nor its files remain, and nobody has chosen the folder."""
    monkeypatch.chdir(tmp_path)
    run, ended, killed = Path("runs/pretrain"), threading.Event(), []
    thread = threading.Thread(target=kill_and_stop, args=(run, ended, killed))
    thread.start()
    try:
        assert main([*options, *ray_flags, "--machine.shard", "blocks"]) == 143
    finally:
        ended.set()
        thread.join()
    out, error = capsys.readouterr()
    lines = error.splitlines()
    assert killed and "a process was killed or has failed; all are started again (1 of 3 times)" in lines
    assert [line for line in lines if line.startswith(f"resuming {run} at step ")]
    stopped = [line for line in lines if line.startswith("stopped at step ")]
    resume = f"resume with: fastbert pretrain --resume {run} --launch ray --processes 2"
    assert len(stopped) == 1 and stopped[0].endswith(resume)
    assert "2 x cpu, sharded" in error and "Traceback" not in error and not out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]
    stored = load_yaml(PretrainOptions, run / "config.yaml")
    assert {name: getattr(stored, name) for name in LAUNCH} == LAUNCH

    assert main(["pretrain", "--resume", str(run)]) == 2
    assert "between several processes; start them with torchrun" in capsys.readouterr().err
    assert main(["pretrain", "--resume", str(run), "--machine.shard", "none"]) == 0
    changed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("resumed with another")]
    assert changed == ["resumed with another machine.shard: 'blocks' -> 'none'"]
    assert main([*options, "--out", "alone"]) == 0
    rows = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (run, Path("alone"))
    ]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    assert [row["loss"] for row in rows[0]] == pytest.approx([row["loss"] for row in rows[1]], rel=1e-5)
    found, alone = (load_file(folder / "model" / "model.safetensors") for folder in (run, Path("alone")))
    for name, value in alone.items():
        assert (found[name] - value).abs().max() <= 1e-4 * value.abs().max().clamp(min=1e-3), name


def test_a_user_error_of_the_workers(options, ray_flags, tmp_path, capsys) -> None:
    """Printed once, without the traceback that Ray adds, and not tried again."""
    out = tmp_path / "run"
    options[options.index("--length") + 1] = "8192"
    assert main([*options, "--out", str(out), *ray_flags]) == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1 and "less than one sequence of 8192" in error
    assert "Traceback" not in error and "started again" not in error and not out.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--processes", "2"], "--processes has no effect without --launch ray"),
        (["--ray-address", "127.0.0.1:1"], "--ray-address has no effect without --launch ray"),
        (["--launch", "ray"], "--launch ray needs the number of processes: --processes N"),
        ([*RAY, "--dry-run"], "--dry-run measures one process"),
        ([*RAY, "--machine.device", "cuda:1"], "--machine.device cuda:1 is one GPU"),
        ([*RAY, "--ray-address", "127.0.0.1:99999"], "no Ray answers at 127.0.0.1:99999"),
    ],
)
def test_refused_options(options, flags, message, tmp_path, capsys) -> None:
    assert main([*options, *flags, "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("package", "message"),
    [
        ("ray", "--launch ray needs Ray, which is not installed: pip install 'ray>=2.50', or start the processes with"),
        ("pydantic", "--launch ray needs pydantic, which Ray Train imports: pip install 'ray[train]>=2.50'"),
    ],
)
def test_packages_that_are_not_installed(options, capsys, monkeypatch, package, message) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == package else real(name, *more))
    assert main([*options, *RAY]) == 2
    assert message in capsys.readouterr().err


def test_resources_of_a_worker() -> None:
    """A GPU each where there are GPUs; never more than Ray has, for which it would wait."""

    def resources(device: str, threads: int, **cluster: float) -> dict[str, int]:
        values = {"launch": "ray", "processes": 2, "machine": {"device": device, "threads": threads}}
        return resources_of_worker(from_dict(PretrainOptions, values, "test"), cluster)

    assert resources("auto", 0, CPU=2.0) == {"CPU": 1}
    assert resources("auto", 3, CPU=6.0, GPU=2.0) == {"CPU": 3, "GPU": 1}
    assert resources("cpu", 0, CPU=2.0, GPU=2.0) == {"CPU": 1}
    with pytest.raises(
        UserError, match=r"needs 2 GPUs, and Ray has 1; give at most --processes 1 or --machine.device cpu"
    ):
        resources("auto", 0, CPU=2.0, GPU=1.0)
    with pytest.raises(UserError, match=r"needs 2 GPUs, and Ray has 0; give --machine.device cpu"):
        resources("cuda", 0, CPU=2.0)
    with pytest.raises(UserError, match="needs 8 CPUs, and Ray has 7; give at most --processes 1"):
        resources("auto", 4, CPU=7.0)


def test_two_launchers(options, capsys, monkeypatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main([*options, *RAY]) == 2
    assert "torchrun and --launch ray both start processes" in capsys.readouterr().err
