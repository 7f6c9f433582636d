"""Guard against divergence: counts and reports skipped updates, and stops the training after too many in a row."""

from collections.abc import Callable, Mapping
from typing import Protocol

from fastbert.errors import UserError

PATIENCE = 5  # updates in a row that may be skipped before the training stops


class SkipCounts(Protocol):
    """Counters, stored in the checkpoint."""

    skipped: int
    """Updates skipped so far."""
    skipped_in_row: int


def guard(
    counts: SkipCounts,
    step: int,
    values: Mapping[str, float],
    echo: Callable[[str], None],
    advice: Callable[[], str],
) -> bool:
    """Counts an update and returns whether it was performed.

    Args:
        step: number of the update, from 0.
        values: its `loss`, the gradient's `norm`, and whether both were `finite`.
        echo: prints warnings.
        advice: returns the end of the error message, which explains the fix; called only if the training ends here.

    Raises:
        UserError: `PATIENCE` updates in a row were skipped.
    """
    if values["finite"]:
        counts.skipped_in_row = 0
        return True
    counts.skipped += 1
    counts.skipped_in_row += 1
    echo(f"step {step + 1}: loss {values['loss']:.4g}, gradient norm {values['norm']:.4g}; update skipped")
    if counts.skipped_in_row >= PATIENCE:
        raise UserError(
            f"loss or gradient was not finite in {PATIENCE} steps in a row, up to step {step + 1}{advice()}"
        )
    return False
