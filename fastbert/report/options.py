"""Options of `fastbert report`."""

from dataclasses import dataclass, field

from fastbert.config import POSITIONAL
from fastbert.errors import UserError
from fastbert.ranges import check_values

MOST_RUNS = 50


@dataclass(frozen=True)
class ReportOptions:
    """Compare pretraining runs on one HTML page.

    Curves over steps, tokens, FLOPs or minutes, the options that differ, results, speed and examples. The page is one
    file that opens in a browser without a network."""

    runs: tuple[str, ...] = field(default=(), metadata=POSITIONAL)
    """Folders of runs, finished or not."""
    out: str = "report.html"
    """File to write, or - for standard output; .html is added to a name without it. An earlier page is replaced; any
    other file is refused."""

    def __post_init__(self) -> None:
        check_values(self)

    def check_inputs(self) -> None:
        """Raises a UserError if there are no runs or too many for one page."""
        if not self.runs:
            raise UserError("give the folders of one or more runs: fastbert report runs/a runs/b --out page.html")
        if len(self.runs) > MOST_RUNS:
            raise UserError(f"{len(self.runs)} runs are too many for one page; give up to {MOST_RUNS}")
