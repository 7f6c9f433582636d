"""Options of `fastbert weak-label`."""

import math
from dataclasses import dataclass
from pathlib import Path

from fastbert.config import choice
from fastbert.errors import OptionError, UserError, brief
from fastbert.finetuning.glue import check_glue_folder
from fastbert.finetuning.tasks import check_glue_options, check_task
from fastbert.inputs import open_input
from fastbert.lists import words
from fastbert.ranges import check_values, number_of

COMBINE = ("best", "majority", "em", "triplets")
FROM_DEV, ESTIMATE = "dev", "estimate"


@dataclass(frozen=True)
class WeakLabelOptions:
    """Label the training texts of a task with labelling functions, for `fastbert finetune --task OUT/task.yaml`.

    Functions are keyword lists, lexicons, regular expressions, columns and predictions in a YAML file, or Python. Each
    votes for a label or abstains; a label model combines the votes. Labels in train are not used."""

    task: str | None = None
    """A GLUE task or the YAML file of a custom task of kind classes. Its labelled dev split measures the functions."""
    functions: str | None = None
    """YAML file of the labelling functions."""
    out: str | None = None
    """Folder to write: train.jsonl, dev.jsonl, task.yaml, table.json, table.md, table.png, manifest.json. Labels of an
    earlier call are replaced."""
    glue_dir: str | None = None
    """Folder of the official GLUE archive, or of Parquet files (default: nyu-mll/glue through `datasets`)."""
    glue_subset: bool = False
    """Accept GLUE files with fewer rows than the official number."""
    combine: str = choice("best", COMBINE, "label model")
    """Label model: majority (a tie is decided by the balance), em (Dawid-Skene with one accuracy a function), triplets
    (closed form, two labels), or best: the one with the highest accuracy on dev, majority if equal."""
    balance: str = FROM_DEV
    """Fraction of each label: dev (as in the labelled dev split), estimate (from the votes), or numbers in the order of
    the labels, such as 0.9,0.1."""
    run_python: str | None = None
    """Python file of further functions, which is executed: each function without a leading _ in its name gets a row, a
    dict with text and pair, and returns a label or None."""
    worth: tuple[str, ...] = ()
    """Instead of labelling: --out folders of two fine-tunings, on gold labels with several --train-fraction and on weak
    labels. Prints how many gold labels give the same result on dev."""

    def __post_init__(self) -> None:
        check_values(self)
        if self.balance not in (FROM_DEV, ESTIMATE):
            numbers = [_number(word) for word in words(self.balance)]
            if not numbers or not all(0 < number < 1 for number in numbers) or abs(math.fsum(numbers) - 1) > 1e-3:
                raise OptionError(
                    self, "balance", f"must be {FROM_DEV}, {ESTIMATE}, or positive numbers that sum to 1, not "
                    f"{brief(self.balance)}",
                )  # fmt: skip

    def check_inputs(self) -> None:
        """Checks that the inputs exist.

        Raises:
            UserError: an input does not exist, or options are missing or contradict each other.
        """
        if self.worth:
            if len(self.worth) != 2:
                raise UserError("--worth takes two folders: that of the gold labels, then that of the weak labels")
            if self.task or self.functions or self.out or self.run_python:
                raise UserError("--worth only reads results; leave out --task, --functions, --run-python and --out")
            return
        for name in ("task", "out"):
            if getattr(self, name) is None:
                raise UserError(f"--{name} is missing; see fastbert weak-label --help")
        if self.functions is None and self.run_python is None:
            raise UserError("--functions is missing: the YAML file of the labelling functions (or --run-python FILE)")
        check_task(self.task, None)
        check_glue_folder(self.glue_dir)
        check_glue_options([self.task], self.glue_dir, self.glue_subset)
        for path, what in ((self.functions, "functions file"), (self.run_python, "Python file")):
            if path is not None:
                open_input(Path(path), what).close()

    def given_balance(self) -> list[float] | None:
        """The numbers of --balance, divided by their sum; None for a name."""
        if self.balance in (FROM_DEV, ESTIMATE):
            return None
        numbers = [_number(word) for word in words(self.balance)]
        return [number / math.fsum(numbers) for number in numbers]


def _number(word: str) -> float:
    try:
        return number_of(word)
    except ValueError:
        return math.nan
