"""Options common to all studies."""

from dataclasses import dataclass

from fastbert.config import choice
from fastbert.errors import UserError
from fastbert.ranges import Processes, Retries, check_values
from fastbert.ray_cluster import check_ray

BACKENDS = ("local", "ray")


@dataclass(frozen=True)
class EngineOptions:
    """Back end, workers and folders of a study."""

    out: str | None = None
    """Folder for results.jsonl, report/ and jobs/ (default: runs/<name of the YAML file>)."""
    workers: Processes = 1
    """Number of concurrent jobs, each in a process with the YAML file's number of threads; results do not depend on it.
    On this machine each worker has one GPU, in rotation; GPUs that CUDA_VISIBLE_DEVICES hides are not used. Workers
    that need exactly all CPU cores have their own ones, and fewer jobs run at a time where memory is short."""
    backend: str = choice("local", BACKENDS, "back end")
    """Back end that runs the jobs: local (processes on this machine) or ray."""
    ray_address: str | None = None
    """host:port of a running Ray cluster; without it Ray is started on this machine for this call. All nodes need
    fastbert, and models, tasks, data and GLUE under the same paths. A job gets a GPU if the cluster has any, unless
    machine.device is cpu."""
    retries: Retries = 1
    """Number of times that a job is started again if its process was killed or its node was lost; it resumes from its
    last files. A job that ended with an error is not started again by the same call."""
    glue_dir: str | None = None
    """Folder of the official GLUE archive, or of Parquet files (default: nyu-mll/glue through `datasets`)."""

    def __post_init__(self) -> None:
        check_values(self)
        if self.ray_address is not None and self.backend != "ray":
            raise UserError("a Ray address is given, but the back end is local; add --backend ray or drop the address")

    def check_backend(self) -> None:
        """Raises a UserError if the back end is Ray, and it is not installed or does not answer."""
        if self.backend == "ray":
            check_ray(self.ray_address, "--backend ray", "use --backend local")
