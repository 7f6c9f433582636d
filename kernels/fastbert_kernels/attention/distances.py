"""T5's buckets of distances (arXiv 1910.10683), and biases that are constant along diagonals."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def relative_bucket(distance: Tensor, buckets: int = 32, max_distance: int = 128) -> Tensor:
    """T5's bucket of a distance j - i, both directions: half the buckets each, a quarter exact, a quarter logarithmic.

    Buckets from buckets/2 on belong to j > i; buckets/2 itself is never produced.
    """
    side = buckets // 2
    exact = side // 2
    steps = distance.abs()
    ratio = torch.log(steps.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (ratio * (side - exact)).long()).clamp(max=side - 1)
    return torch.where(steps < exact, steps, far) + side * (distance > 0)


def from_diagonals(by_distance: Tensor, first: int, rows: int, length: int) -> Tensor:
    """Rows of the bias matrix with one value for each distance: a view, or a copy when traced or compiled.

    Args:
        by_distance: [H, 2 P - 1], the values for the distances 1 - P to P - 1.
        first, rows: the first row and the number of rows; row indices are below P.
        length: number of columns, at most P.

    Returns:
        [H, rows, length], with by_distance[j - i + P - 1] in row i - first and column j.
    """
    middle = (by_distance.shape[-1] - 1) // 2
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        # `unfold` would make the window size a constant of the graph. In eager mode its gradient is faster than that of
        # indexing.
        row = torch.arange(first, first + rows, device=by_distance.device)
        column = torch.arange(length, device=by_distance.device)
        return by_distance[:, column - row[:, None] + middle]
    # Row i is the window of values that begins at the distance -i; the window of the last row comes first.
    start = middle - (first + rows - 1)
    return by_distance[:, start : start + rows + length - 1].unfold(-1, length, 1).flip(1)


def add_diagonals(by_distance: Tensor, rows: Tensor, first: int) -> None:
    """Gradient of `from_diagonals`: adds the sums of the diagonals of rows [H, rows, T] to `by_distance`, in place and
    in a fixed order."""
    heads, count, length = rows.shape
    start = (by_distance.shape[-1] - 1) // 2 - (first + count - 1)
    # Rows are padded to length + count and read with length + count - 1, which shifts each row by one relative to the
    # next, so that diagonals become columns.
    skewed = F.pad(rows.flip(1), (0, count)).flatten(1)[:, : count * (length + count - 1)]
    skewed = skewed.view(heads, count, length + count - 1)
    by_distance[:, start : start + count + length - 1] += skewed.sum(1)
