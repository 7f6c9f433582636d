"""Connection to Ray: a running cluster, given by its address, or a local one that starts and ends with the command;
nodes of the cluster, and whether its head node still answers."""

import importlib.util
import os
import signal
import socket
import time
from typing import Any

from fastbert.errors import UserError

OBJECT_STORE = 100 * 2**20  # bytes; by default Ray reserves 30 % of the memory
ANSWER_TIMEOUT = 5.0  # seconds for an address to answer
CHECK_SECONDS, PATIENCE = 5.0, 30.0  # between two checks of a head node; silence after which it is lost
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
    host = host.removeprefix("[").removesuffix("]")  # of an IPv6 address
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


ONLY_MISSING = "The same command with a new cluster, or with --backend local, runs only what is missing"


class ClusterLost(UserError):
    """The connection to the cluster was lost; what runs there has not failed."""


class Connection:
    """Connection to a Ray cluster whose head node is checked, in a `with` block that shuts Ray down at its end.

    Ray itself ends the process without an error that Python could handle, 60 seconds after the head node is lost.

    Args:
        ray: the module, connected.
        address: host:port of the cluster; None: that of the cluster on this machine.
    """

    def __init__(self, ray: Any, address: str | None) -> None:
        self.ray, self.address = ray, address or ray.get_runtime_context().gcs_address
        self._checked = self._answered = time.monotonic()

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *error: object) -> None:
        self.ray.shutdown()

    def check(self, patient: bool = False) -> None:
        """Checks that the head node answers.

        Args:
            patient: at most every `CHECK_SECONDS` seconds, and it may be silent for `PATIENCE` seconds.

        Raises:
            ClusterLost: it does not.
        """
        now = time.monotonic()
        if patient and now - self._checked < CHECK_SECONDS:
            return
        self._checked = now
        try:
            check_answers(self.address)
            self._answered = time.monotonic()
        except UserError:
            if patient and time.monotonic() - self._answered < PATIENCE:
                return
            where = f"the Ray cluster at {self.address}"
            raise ClusterLost(
                f"the connection to {where} was lost: its head node does not answer. {ONLY_MISSING}"
            ) from None


def alive_nodes(ray: Any) -> list[dict[str, Any]]:
    """Descriptions of the nodes of the cluster, by `ray.nodes`, that have CPUs for jobs."""
    return [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]


def on_node(ray: Any, remote: Any, node: dict[str, Any]) -> Any:
    """The remote function `remote`, on this node."""
    strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
    return remote.options(scheduling_strategy=strategy)


def has_gpus(ray: Any) -> bool:
    return ray.cluster_resources().get("GPU", 0) > 0
