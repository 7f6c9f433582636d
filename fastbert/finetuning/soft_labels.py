"""Soft labels and weights of training examples, in the columns `soft` and `weight` of a custom task."""

import math
from collections.abc import Sequence
from typing import Any

from fastbert.errors import UserError, brief, nearest
from fastbert.finetuning.rows import Row, number_in
from fastbert.records import parse_json

LARGEST_WEIGHT = 1e30  # so that sums in float64 and values in float32 are finite
LARGEST_NUMBER = 1e15  # of labels of kind number, so that squared errors and norms of gradients in float32 are finite
TOLERANCE = 1e-3  # of the sum of probabilities, which files round


def add_soft_label(row: Row, soft: str | None, weight: str | None, cells: Sequence[Any]) -> Row:
    """The row with its soft label and weight.

    Args:
        soft: column of the soft label; None if there is none.
        weight: column of the weight; None if there is none.
        cells: the cells of these columns that exist, in this order.

    Raises:
        UserError: a cell is empty, or the weight is not a number from 0 to `LARGEST_WEIGHT`.
    """
    rest = list(cells)
    if soft is not None:
        cell = rest.pop(0)
        if cell is None or cell == "":
            raise UserError(f"{row.where}: the soft label {soft!r} is missing; fill it in or drop the row")
        row = row._replace(soft=cell)
    if weight is not None:
        number = number_in(rest[0])
        if number is None or not 0 <= number <= LARGEST_WEIGHT:
            raise UserError(
                f"{row.where}: the weight {brief(rest[0])} in {weight!r} is not a number from 0 to "
                f"{LARGEST_WEIGHT:g}; fix it"
            )
        row = row._replace(weight=number)
    return row


def probabilities(row: Row, labels: Sequence[str]) -> tuple[float, ...]:
    """The probability of each label in the order of `labels`, divided by their sum.

    Raises:
        UserError: the soft label is neither a list of this length nor an object with these labels, a probability is
            not a number of 0 or more, or they do not sum to 1 within `TOLERANCE`.
    """
    soft = _value(row)
    where = f"{row.where}: the soft label {brief(soft)}"
    if isinstance(soft, dict):
        for name in soft:
            if name not in labels:
                raise UserError(
                    f"{row.where}: the soft label has the unknown label {brief(name)}; {nearest(name, labels)}"
                )
        cells = [soft.get(label, 0.0) for label in labels]
    elif isinstance(soft, list | tuple):
        cells = list(soft)
        if len(cells) != len(labels):
            raise UserError(
                f"{where} has {len(cells)} probabilities; give {len(labels)}, in the order of the labels: "
                f"{brief(', '.join(labels), str)}"
            )
    else:
        raise UserError(f"{where} is neither a list of probabilities nor an object label -> probability; fix it")
    values = [number_in(cell) for cell in cells]
    if not all(value is not None and math.isfinite(value) and value >= 0 for value in values):
        raise UserError(f"{where} has a probability that is not a finite number of 0 or more; fix it")
    total = math.fsum(values) if max(values) <= 1 + TOLERANCE else sum(values)  # fsum raises where sum is infinite
    if abs(total - 1.0) > TOLERANCE:
        raise UserError(f"{where} sums to {total:.6g}; make the probabilities sum to 1")
    return tuple(value / total for value in values)


def soft_number(row: Row) -> float:
    """The soft label of a row with kind number.

    Raises:
        UserError: it is not a number of at most `LARGEST_NUMBER`.
    """
    value = number_in(row.soft)
    if value is None or math.isnan(value):
        raise UserError(f"{row.where}: the soft label {brief(row.soft)} is not a number; fix it")
    check_size(row.where, f"soft label {brief(row.soft)}", value)
    return value


def check_size(where: str, what: str, number: float) -> None:
    """Raises a UserError if the label `number`, which `what` names, is too large to be learned in float32."""
    if abs(number) > LARGEST_NUMBER:
        raise UserError(
            f"{where}: the {what} is not from {-LARGEST_NUMBER:g} to {LARGEST_NUMBER:g}; divide all labels by a "
            "constant, or fix it"
        )


def _value(row: Row) -> Any:
    """The soft label, parsed from JSON if it is text, as in CSV."""
    if not isinstance(row.soft, str):
        return row.soft
    return parse_json(row.soft, f"{row.where}: the soft label {brief(row.soft)}")
