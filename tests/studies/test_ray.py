"""Ray itself, started for one study, against the processes of this machine; and addresses where no Ray answers."""

import contextlib
import importlib.util
import signal
import socket
import threading
from pathlib import Path

import pytest

from fastbert.cli import main
from fastbert.errors import UserError
from fastbert.finetuning.dev_ensemble import SCORES
from fastbert.ray_cluster import check_answers
from tests.studies.conftest import read_rows, without_times, write_sweep


def test_ray_gives_what_processes_give(axes, finished, tmp_path, capsys, monkeypatch) -> None:
    """Also a job that fails, alone, and its log; results are written here. A cluster that the environment names is not
    joined unless it is asked for."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    out = tmp_path / "out"
    path = write_sweep(tmp_path, axes, learning_rates=[3e-3, 1e18], seeds=[0], backend="ray")
    before = signal.getsignal(signal.SIGTERM)
    assert main(["sweep", path, "--out", str(out)]) == 1
    assert signal.getsignal(signal.SIGTERM) == before
    rows = read_rows(out)
    done = [row for row in rows if row["status"] == "done"]
    same = [row for row in read_rows(finished) if row["seed"] == 0]
    assert without_times(done) == without_times(same) and len(same) == 2
    failed = [row for row in rows if row["status"] == "failed"]
    assert len(failed) == 2 and all("not finite" in row["reason"] and row["log"] for row in failed)
    for row in rows:
        assert "step" in (out / "jobs" / row["id"] / "log.txt").read_text()
    seed = Path("jobs") / done[0]["id"] / "run" / "seed-0"
    assert (out / seed / "metrics.jsonl").is_file()
    assert (out / seed / SCORES).read_bytes() == (finished / seed / SCORES).read_bytes()
    assert "2 of 4 done, 0 running, 2 failed, 0 left" in capsys.readouterr().err


@pytest.fixture
def refused(axes, tmp_path, capsys):
    def refused(*flags: str, **changes) -> str:
        out = tmp_path / "out"
        assert (
            main(["sweep", write_sweep(tmp_path, axes, **changes), "--backend", "ray", "--out", str(out), *flags]) == 2
        )
        assert not out.exists()
        return capsys.readouterr().err

    return refused


def test_an_address_that_does_not_answer(refused) -> None:
    with socket.socket() as free:  # bound, and nobody listens
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        error = refused("--ray-address", address)
        assert f"no Ray answers at {address}" in error and "refused" in error
    assert "not of the form host:port" in refused("--ray-address", "cluster")
    assert "no Ray answers at 127.0.0.1:99999" in refused("--ray-address", "127.0.0.1:99999")


def serve(answer: bytes) -> str:
    """The address of a server that answers so."""
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        with contextlib.suppress(OSError), listener, listener.accept()[0] as connection:
            while connection.recv(100):  # until the other side closes
                connection.sendall(answer)

    threading.Thread(target=run, daemon=True).start()
    return f"127.0.0.1:{listener.getsockname()[1]}"


def test_something_else_than_ray_answers(monkeypatch) -> None:
    with pytest.raises(UserError, match="is not Ray; give host:port of the head node"):
        check_answers(serve(b"HTTP/1.1 400 Bad Request\r\n\r\n"))
    check_answers(serve(bytes(3) + b"\x04" + bytes(5)))  # the SETTINGS of a gRPC server
    host, port = serve(bytes(3) + b"\x04" + bytes(5)).split(":")
    check_answers(f"[{host}]:{port}")  # as an IPv6 address is written
    monkeypatch.setattr("fastbert.ray_cluster.ANSWER_TIMEOUT", 0.2)
    with pytest.raises(UserError, match=r"no Ray answers at .*timed out"):
        check_answers(serve(b""))
    monkeypatch.setenv("RAY_USE_TLS", "1")
    check_answers(serve(b""))


def test_ray_is_not_installed(refused, monkeypatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "ray" else real(name, *more))
    assert "pip install 'ray>=2.50'" in refused()


def test_models_stay_on_the_nodes(refused, axes) -> None:
    error = refused(finetune=axes["finetune"] | {"save_model": True})
    assert "save_model" in error and "--backend local" in error
