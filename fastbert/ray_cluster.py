"""Connection to Ray: a running cluster, given by its address, or a local one that starts and ends with the command."""

import importlib.util
import os
import signal
import socket
from typing import Any

from fastbert.errors import UserError

OBJECT_STORE = 100 * 2**20  # bytes; by default Ray reserves 30 % of the memory
ANSWER_TIMEOUT = 5.0  # seconds for an address to answer
_HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)  # a client's preface and empty SETTINGS


def check_ray(address: str | None, option: str, instead: str) -> None:
    """Raises a UserError if Ray is not installed, or nothing that could be Ray answers at `address`.

    Args:
        option: the option that needs Ray.
        instead: advice for working without it.
    """
    if importlib.util.find_spec("ray") is None:
        raise UserError(f"{option} needs Ray, which is not installed: pip install 'ray>=2.50', or {instead}")
    if address is not None:
        check_answers(address)


def connect(cpus: int, address: str | None) -> Any:
    """Starts Ray with this number of CPUs, or connects to the cluster at `address`; returns the module.

    Raises:
        UserError: the cluster refuses this process.
    """
    import ray

    how: dict[str, Any] = {"address": address}
    if address is None:  # "local": without it Ray joins a cluster that happens to run on this machine
        how = {"address": "local", "num_cpus": cpus, "object_store_memory": OBJECT_STORE}
        how |= {"include_dashboard": False}
    before = signal.getsignal(signal.SIGTERM)
    try:
        # Ray itself sets a task's OMP_NUM_THREADS to its num_cpus.
        ray.init(log_to_driver=False, logging_level="ERROR", **how)
    # Ray has no class for all of these: a refused token, a version that differs, and a plain Exception if a node does
    # not start in time. All are problems of the cluster or the machine, and their text is in the message.
    except Exception as error:
        token = (
            ". If it asks for a token, as Ray does by default from 2.59 on, set RAY_AUTH_MODE=token and give this "
            "process the cluster's token: https://docs.ray.io/en/latest/ray-security/token-auth.html"
        )
        where = f"at {address}" if address else "on this machine"
        raise UserError(f"Ray {where} cannot be used: {error}{token if address else ''}") from None
    finally:
        signal.signal(signal.SIGTERM, before)  # Ray has replaced the handler
    return ray


def check_answers(address: str) -> None:
    """Checks that a gRPC server listens at `address`, host:port; ray.init alone would try for minutes.

    Raises:
        UserError: it is not a valid address, or nothing answers.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"the Ray address {address!r} is not of the form host:port, such as 10.0.0.1:6379")
    try:
        with socket.create_connection((host, int(port)), timeout=ANSWER_TIMEOUT) as connection:
            connection.settimeout(ANSWER_TIMEOUT)
            if os.environ.get("RAY_USE_TLS", "0") == "1":
                return  # it would answer only after a handshake
            connection.sendall(_HTTP2)
            settings = connection.recv(4)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"no Ray answers at {address} ({error}); see `ray status` on its head node, or leave the address out to "
            "start one here"
        ) from None
    if settings[3:] != b"\x04":
        raise UserError(f"the server at {address} is not Ray; give host:port of the head node, by default port 6379")


def has_gpus(ray: Any) -> bool:
    return ray.cluster_resources().get("GPU", 0) > 0
