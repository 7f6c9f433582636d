"""Documents of Hugging Face datasets: from the hub or its cache, a folder of data files, or a folder written by
`save_to_disk`."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastbert.data.columns import Columns
from fastbert.data.parquet import ROWS, cells_of, check_schema
from fastbert.data.sources.files import file_identity
from fastbert.data.sources.source import Chunk, Source, text_bytes
from fastbert.data.text import clean
from fastbert.encodings import explain
from fastbert.errors import UserError, nearest
from fastbert.records import read_json

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder, IterableDataset

HUB = "hf:"
CHUNK_ROWS = 2**16
STREAM_ROWS = 256  # rows decoded at a time, with all columns
STREAM_BUFFER = 2**22  # bytes requested at a time, for each column
FORM = "hf:NAME[:CONFIG[:SPLIT]]"


def open_hub(spec: str, column: str, streamed: bool) -> Source:
    """Opens the dataset `hf:NAME[:CONFIG[:SPLIT]]`; the split is train by default.

    NAME is a name on the hub (owner/name; a cached copy works without a network), a local folder that
    `datasets.load_dataset` reads (Parquet, JSONL, CSV, text with a row for each line), or a folder of `save_to_disk`.
    Code in a dataset is never executed.

    Args:
        streamed: reads the data from where it is stored, without a copy in the local cache. The documents are the same.

    Raises:
        UserError: the dataset cannot be reached or read, or a configuration, split or column does not exist (the
            message lists those that exist).
    """
    name, config, split = (*spec.removeprefix(HUB).split(":", 2), "", "")[:3]
    if not name.strip("/"):
        raise UserError(f"source {spec!r} names no dataset; write {FORM}")
    folder = Path(name)
    if not folder.is_dir() and (name.startswith(("/", ".", "~")) or name.count("/") > 1):
        raise UserError(f"source {spec!r}: the folder {name} does not exist, and a name on the hub is owner/name")
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        folder = _saved(folder, spec, config, split)
        with _refusals(spec):
            from datasets import load_from_disk

            dataset = load_from_disk(str(folder))
        files = [folder / "state.json", *(Path(file["filename"]) for file in dataset.cache_files)]
        identity = {"files": [file_identity(file) for file in files]}
        size, rows = _bytes_of(dataset), dataset.num_rows
    else:
        with _refusals(spec):
            from datasets import load_dataset_builder

            builder = load_dataset_builder(name, config or None)
            if folder.is_dir() and hasattr(
                builder.config, "keep_default_na"
            ):  # CSV, where NA and null are ordinary words
                builder = load_dataset_builder(name, config or None, keep_default_na=False)
        split = split or "train"
        dataset = _load(builder, spec, split, streamed)
        identity = {"config": builder.config.name, "split": split, **_files_of(builder, folder)}
        size, rows = _extent(builder, dataset, split)
    _check(dataset, column, spec)
    identity = {"kind": "datasets", "name": folder.name if folder.is_dir() else name, **identity}
    return Source(spec, Path(name).name, identity, size, _chunks(dataset, column, spec, size, rows))


def _chunks(dataset: "Dataset | IterableDataset", column: str, spec: str, size: int, rows: int) -> list[Chunk]:
    """Chunks of CHUNK_ROWS rows; a single one for a stream, which is read from its beginning only."""
    if not hasattr(dataset, "num_rows"):
        return [Chunk(size, partial(_read, dataset, column, spec, size, rows, 0))]
    chunks = []
    for start in range(0, max(rows, 1), CHUNK_ROWS):
        stop = min(start + CHUNK_ROWS, rows)
        here = size * stop // max(rows, 1) - size * start // max(rows, 1)
        part = dataset.select(range(start, stop)) if rows > CHUNK_ROWS else dataset
        chunks.append(Chunk(here, partial(_read, part, column, spec, here, stop - start, start)))
    return chunks


def _saved(folder: Path, spec: str, config: str, split: str) -> Path:
    """The folder of the selected split in a folder written by `save_to_disk`."""
    if config:
        raise UserError(f"source {spec!r}: a saved folder has no configurations; write hf:{folder}::{split or 'SPLIT'}")
    if (folder / "dataset_dict.json").is_file():
        splits = _stated(folder / "dataset_dict.json", {"splits": [str]}, spec)["splits"]
        split = split or (splits[0] if len(splits) == 1 else "train")
        if split not in splits:
            raise _no_split(spec, split, splits)
        return folder / split
    if split:
        its_split = _stated(folder / "state.json", {"_split": (str, type(None))}, spec)["_split"]
        if split != its_split:
            raise _no_split(spec, split, [its_split] if its_split else [])
    return folder


def _stated(path: Path, shape: dict[str, Any], spec: str) -> dict[str, Any]:
    try:
        return read_json(path, "the record of the dataset", shape)
    except UserError as error:
        raise UserError(f"source {spec!r} cannot be read: {error}") from None


def _load(builder: "DatasetBuilder", spec: str, split: str, streamed: bool) -> "Dataset | IterableDataset":
    splits = [str(name) for name in builder.info.splits or getattr(builder.config, "data_files", None) or ()]
    if splits and split.split("[")[0].split("+")[0] not in splits:
        raise _no_split(spec, split, splits)
    if streamed and ("[" in split or "+" in split):
        raise UserError(f"source {spec!r}: a part of a split cannot be streamed; leave out --streamed")
    with _refusals(spec):
        if streamed:
            _read_by_pages(builder)
            return builder.as_streaming_dataset(split=split)
        builder.download_and_prepare()
        return builder.as_dataset(split=split)


def _read_by_pages(builder: "DatasetBuilder") -> None:
    """Limits the memory for streamed Parquet files, which `datasets` would otherwise read as a whole. It still decodes
    all rows of a row group at a time."""
    if hasattr(builder.config, "fragment_scan_options"):
        from pyarrow.dataset import ParquetFragmentScanOptions

        builder.config.batch_size = STREAM_ROWS
        builder.config.fragment_scan_options = ParquetFragmentScanOptions(
            use_buffered_stream=True, buffer_size=STREAM_BUFFER, pre_buffer=False
        )


def _no_split(spec: str, split: str, splits: Iterable[str]) -> UserError:
    known = nearest(split, splits) if splits else "it has none by name"
    return UserError(f"source {spec!r} has no split {split!r}; {known}; write {FORM}")


def _files_of(builder: "DatasetBuilder", folder: Path) -> dict[str, Any]:
    """Identity of the files in a local folder, or the revision on the hub."""
    if not folder.is_dir():
        return {"revision": builder.hash}
    paths = sorted({Path(file) for files in builder.config.data_files.values() for file in files})
    return {"files": [file_identity(path) for path in paths]}


def _extent(builder: "DatasetBuilder", dataset: "Dataset | IterableDataset", split: str) -> tuple[int, int]:
    """(bytes of the Arrow tables, rows), or (0, 0) for a stream of unknown length."""
    if hasattr(dataset, "num_rows"):
        return _bytes_of(dataset), dataset.num_rows
    known = (builder.info.splits or {}).get(split)
    return (known.num_bytes, known.num_examples) if known and known.num_bytes and known.num_examples else (0, 0)


def _bytes_of(dataset: "Dataset") -> int:
    return sum(Path(file["filename"]).stat().st_size for file in dataset.cache_files)


def _check(dataset: "Dataset | IterableDataset", column: str, spec: str) -> None:
    """Raises a UserError if `column` is missing or contains no text."""
    features = dataset.features
    if features is None:  # a stream whose columns are unknown before its first row
        with _refusals(spec):
            features = dataset._resolve_features().features
    check_schema(features.arrow_schema, Columns((column,)), f"source {spec!r}")


def _read(
    dataset: "Dataset | IterableDataset", column: str, spec: str, size: int, rows: int, before: int
) -> Iterator[tuple[int, str]]:
    """Yields (bytes read, text) for `rows` rows of `size` bytes; `before` is the number of earlier rows, for errors."""
    done = held = 0
    with _refusals(spec):
        # Only this column is decoded, as Arrow, so images in other columns cost nothing.
        for batch in dataset.select_columns([column]).with_format("arrow").iter(ROWS):
            texts = cells_of(batch.column(column), f"source {spec!r}, column {column!r}", before + done)
            for text in texts:
                done += 1
                if text is not None:
                    text = clean(text, f"source {spec!r}, row {before + done}")
                    held += text_bytes(text)
                    yield (size * min(done, rows) // rows if size else held), text


@contextmanager
def _refusals(spec: str) -> Iterator[None]:
    """Converts errors of `datasets` about names, files and networks to a UserError."""
    import pyarrow
    from datasets.exceptions import DatasetGenerationError

    try:
        yield
    except (
        *(OSError, ValueError, RuntimeError, KeyError, TypeError),
        *(pyarrow.ArrowException, DatasetGenerationError),
    ) as raised:
        error = raised.__cause__ if isinstance(raised, DatasetGenerationError) and raised.__cause__ else raised
        if isinstance(error, UnicodeDecodeError):
            what = explain(error.object, error.start, None)
            raise UserError(f"source {spec!r} cannot be read: one of its files is not UTF-8 text: {what}") from raised
        reason = " ".join(str(error).split("Example of usage")[0].split())
        if isinstance(error, FileNotFoundError | ConnectionError) and not Path(spec.removeprefix(HUB)).exists():
            reason += (
                "; where the hub cannot be reached, give a local copy: a folder of its Parquet files, or one that "
                "save_to_disk wrote, as hf:FOLDER"
            )
        elif "BuilderConfig" in reason or "Config name" in reason:
            reason += f"; write {FORM}, or hf:NAME::SPLIT to give only a split"
        raise UserError(f"source {spec!r} cannot be read: {reason}") from raised
