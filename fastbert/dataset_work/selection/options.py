"""Options of `fastbert select`."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from fastbert.config import MACHINE, choice
from fastbert.downloads import FROM_HUB
from fastbert.errors import UserError
from fastbert.finetuning.custom import check_custom_file
from fastbert.finetuning.glue import check_glue_folder
from fastbert.finetuning.tasks import check_glue_options, check_task
from fastbert.hub.folders import check_model_folder
from fastbert.inputs import refuse_slash
from fastbert.lists import paths
from fastbert.outputs import check_output_file, refuse_input
from fastbert.ranges import Count, NotNegative, Seed, check_values
from fastbert.training.options import MachineOptions

RANDOM, K_CENTRE, FACILITY_LOCATION = "random", "k-centre", "facility-location"
UNCERTAINTY = ("entropy", "least-confidence", "margin")
QUERIES = (RANDOM, *UNCERTAINTY, K_CENTRE, FACILITY_LOCATION)
OUTPUTS = (".jsonl", ".csv")
POOL_SIZE = 5000
"""Default size of the subsample for queries that compare hidden states."""
MOST_STATES = 20_000
"""Largest one: facility location needs 4 n^2 bytes, 1.6 GB."""


@dataclass(frozen=True)
class SelectOptions:
    """Select the texts of a pool to label next: `--out` has their rows, the most informative first.

    Texts that are labelled in the task already, and repeated ones, are not selected."""

    task: str
    """A GLUE task or the YAML file of a custom task. Its columns are those of the pool, and its labelled texts (train
    and dev, and test if it has labels) are excluded."""
    pool: str
    """File of the texts without labels: a table, or with kind tokens also CoNLL columns. Labels in it are ignored."""
    count: Count
    """Number of texts to select."""
    out: str
    """File to write, .jsonl or .csv: the rows of the pool with all their columns, `score` and `reason`."""
    query: str = choice("margin", QUERIES, "query")
    """Texts to select: random ones; those about which the model is least certain, by entropy, by least-confidence (of
    the most likely class) or by margin (between the two most likely classes); those that differ most from all labelled
    and selected ones by their hidden states, k-centre; or those that represent the pool and are uncertain,
    facility-location (SDS2). Tasks with numbers have only random and k-centre."""
    model: str | None = field(default=None, metadata=FROM_HUB)
    """A fine-tuned model, or several as in `fastbert predict`, whose probabilities are averaged; random needs none."""
    previous: str | None = field(default=None, metadata=FROM_HUB)
    """The model of the round before: prints the agreement of both on the pool (Cohen's kappa), by which you can decide
    to stop."""
    pool_size: Count | None = None
    """Use only this number of texts, a hashed sample of those that remain (default: all; 5,000 for k-centre and
    facility-location, which hold their hidden states or similarities in memory)."""
    entropy_weight: NotNegative = 0.1
    """Weight of the entropies in facility-location, lambda, in units of the number of texts."""
    seed: Seed = 0
    """Seed of --query random and of --pool-size."""
    glue_dir: str | None = None
    """Folder of the official GLUE archive, or of Parquet files (default: nyu-mll/glue through `datasets`)."""
    glue_subset: bool = False
    """Accept GLUE files with fewer rows than the official number."""
    machine: MachineOptions = field(default_factory=MachineOptions, metadata=MACHINE)

    def __post_init__(self) -> None:
        check_values(self)
        if self.model is None and self.query != RANDOM:
            raise UserError(f"--model is missing: --query {self.query} scores the texts with a fine-tuned model")
        if self.model is None and self.previous is not None:
            raise UserError("--previous is compared with --model, which is missing")
        if self.compares_states and self.pool_size is not None and self.pool_size > MOST_STATES:
            raise UserError(
                f"--pool-size {self.pool_size:,} is too large for --query {self.query}, which compares all texts with "
                f"each other; give at most {MOST_STATES:,}"
            )
        if self.pool_size is not None and self.count > self.pool_size:
            raise UserError(f"--count {self.count:,} is larger than --pool-size {self.pool_size:,}; change one of them")

    @property
    def compares_states(self) -> bool:
        return self.query in (K_CENTRE, FACILITY_LOCATION)

    @property
    def limit(self) -> int | None:
        """Maximum number of texts to use; None for all."""
        return self.pool_size or (POOL_SIZE if self.compares_states else None)

    def check_inputs(self) -> None:
        """Checks, before torch is imported, that task, pool and models exist and --out can be written.

        Raises:
            UserError: one of them does not exist; --out has another suffix or is the pool.
        """
        if Path(self.out).suffix.lower() not in OUTPUTS:
            raise UserError(
                f"--out {self.out}: the selected rows are written as JSON lines or CSV; name it .jsonl or .csv"
            )
        check_output_file(self.out)
        check_task(self.task, None)
        check_glue_folder(self.glue_dir)
        check_glue_options([self.task], self.glue_dir, self.glue_subset)
        refuse_slash(self.pool)
        check_custom_file(Path(self.pool), None)
        refuse_input(self.out, [self.pool])
        for given in (self.model, self.previous):
            for folder in [] if given is None else folders(given):
                check_model_folder(folder, one=False)


def folders(models: str) -> list[str]:
    """The folders in --model or --previous, separated by commas.

    Raises:
        UserError: a name before or after a comma is missing.
    """
    return paths(models, os.path.isdir) or [models]
