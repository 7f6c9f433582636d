"""The output of `fastbert select`: rows of the pool with all cells, a score and a reason, as JSON lines or CSV."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastbert.outputs import output_file
from fastbert.records import finite_or_none, json_text


def write_rows(out: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes the rows, column -> cell, whole or not at all. Columns of a CSV are in the order of their first
    occurrence; cells that are lists or objects are JSON in it."""
    with output_file(out, "w") as file:
        if Path(out).suffix.lower() == ".csv":
            names = list(dict.fromkeys(name for row in rows for name in row))
            # A line end of both characters makes the writer quote cells that contain either of them.
            writer = csv.writer(file, lineterminator="\r\n")
            writer.writerow(names)
            writer.writerows([_cell(row.get(name)) for name in names] for row in rows)
        else:
            for row in rows:
                file.write(json_text(row, ensure_ascii=False, default=str) + "\n")


def _cell(value: Any) -> str:
    value = finite_or_none(value)
    if value is None:
        return ""
    return json_text(value, ensure_ascii=False, default=str) if isinstance(value, bool | list | dict) else str(value)
