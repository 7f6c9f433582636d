"""T5's buckets of distances (arXiv 1910.10683), and what lies on the diagonals of a bias."""

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
    """From a number for each distance to rows of the matrix they make: a view, or a copy in a traced
    program.

    Args:
        by_distance: [H, 2 P - 1], of the distances 1 - P to P - 1.
        first, rows: which rows, of at most P.
        length: columns, at most P.

    Returns:
        [H, rows, length], with by_distance[j - i + P - 1] in row i - first and column j.
    """
    middle = (by_distance.shape[-1] - 1) // 2
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        # The size of `unfold`'s windows would be a constant of the graph. Its gradient takes less time than that of an
        # index, so training has it.
        row = torch.arange(first, first + rows, device=by_distance.device)
        column = torch.arange(length, device=by_distance.device)
        return by_distance[:, column - row[:, None] + middle]
    # Row i is a window of the diagonal values that begins at the distance -i: the last row's comes first.
    start = middle - (first + rows - 1)
    return by_distance[:, start : start + rows + length - 1].unfold(-1, length, 1).flip(1)


def add_diagonals(by_distance: Tensor, rows: Tensor, first: int) -> None:
    """The gradient of `from_diagonals`: adds the sums of the diagonals of rows [H, rows, T] to `by_distance`, in place
    and in a fixed order."""
    heads, count, length = rows.shape
    start = (by_distance.shape[-1] - 1) // 2 - (first + count - 1)
    # With each row longer by its number of rows and read as if it were one shorter, every row stands one further to the
    # right than the one below it, and the diagonals are columns.
    skewed = F.pad(rows.flip(1), (0, count)).flatten(1)[:, : count * (length + count - 1)]
    skewed = skewed.view(heads, count, length + count - 1)
    by_distance[:, start : start + count + length - 1] += skewed.sum(1)
