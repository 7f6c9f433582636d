"""Documents of Parquet files: one text column, a row a document, read in batches of rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fastbert.errors import UserError, nearest

if TYPE_CHECKING:
    import pyarrow

# Rows that are decoded at a time: even rows of a megabyte each stay within 64 MB.
ROWS = 64
PAGE_BUFFER = 2**20  # bytes of a column read ahead, in place of the whole column of a row group


def check_parquet(path: Path, column: str) -> None:
    """Looks at the file's end, where its columns are named.

    Raises:
        UserError: damaged, or `column` is missing or holds no text.
    """
    import pyarrow.parquet

    with _damage(path):
        schema = pyarrow.parquet.read_schema(path)
    check_column(schema, column, str(path))


def check_column(schema: "pyarrow.Schema", column: str, where: str) -> None:
    """
    Raises:
        UserError: `column` is missing, named twice, or of another type than text; names the columns there are.
    """
    found = schema.get_all_field_indices(column)
    if not found:
        hint = nearest(column, schema.names) if schema.names else "it has none"
        raise UserError(f"{where} has no column {column!r}; {hint}; choose with --column")
    if len(found) > 1:
        raise UserError(f"{where} has {len(found)} columns {column!r}; rename one, or choose another with --column")
    kind = schema.field(column).type
    if not is_text(kind):
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise UserError(f"{where}: the column {column!r} is {kind}, not text; choose with --column; columns: {columns}")


def is_text(kind: "pyarrow.DataType") -> bool:
    """Whether a column of this type holds text, perhaps by way of a dictionary."""
    import pyarrow.types

    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    checks = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
    return any(check(kind) for check in checks)


def read_parquet(path: Path, column: str) -> Iterator[tuple[int, str]]:
    """(share of the file's bytes read, text) of every row that is not null.

    Memory does not grow with the file or its row groups: pages are read as they are needed.

    Raises:
        UserError: damaged, or text that is not UTF-8.
    """
    import pyarrow.parquet

    size = path.stat().st_size
    with _damage(path), pyarrow.parquet.ParquetFile(path, buffer_size=PAGE_BUFFER, pre_buffer=False) as file:
        check_column(file.schema_arrow, column, str(path))
        rows, done = file.metadata.num_rows, 0
        # One thread: there is one column, and a pool would only hold more of it.
        for batch in file.iter_batches(batch_size=ROWS, columns=[column], use_threads=False):
            texts = texts_of(batch.column(0), f"{path}, column {column!r}", done)
            done += len(texts)
            for text in texts:
                if text is not None:
                    yield size * min(done, rows) // max(rows, 1), text


def texts_of(values: "pyarrow.Array | pyarrow.ChunkedArray", where: str, first: int) -> list[str | None]:
    """The texts of a column with line ends as \\n; null where there is none.

    Args:
        first: the number of the first row, for errors.

    Raises:
        UserError: a text that is not UTF-8, which Arrow itself does not look at.
    """
    try:
        texts = values.to_pylist()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: a row between {first + 1:,} and {first + len(values):,} is not UTF-8 text ({error}); "
            "write the file again from text"
        ) from None
    return [text if text is None or "\r" not in text else text.replace("\r\n", "\n") for text in texts]


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turns what Arrow says of a file into a UserError that names it."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"{path} is cut off, damaged or no Parquet file ({said}); fetch it again") from error
