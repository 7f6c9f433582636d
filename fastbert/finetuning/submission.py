"""The archive that GLUE's server takes: eleven TSV files in a zip, written whole and checked line by line."""

import io
import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fastbert.encodings import explain
from fastbert.errors import UserError, choose, nearest
from fastbert.finetuning.glue import GLUE, GlueTask
from fastbert.outputs import output_file

FILES: dict[str, tuple[str, str]] = {
    "CoLA.tsv": ("cola", "test"),
    "SST-2.tsv": ("sst2", "test"),
    "MRPC.tsv": ("mrpc", "test"),
    "STS-B.tsv": ("stsb", "test"),
    "MNLI-m.tsv": ("mnli", "test_matched"),
    "MNLI-mm.tsv": ("mnli", "test_mismatched"),
    "QNLI.tsv": ("qnli", "test"),
    "QQP.tsv": ("qqp", "test"),
    "RTE.tsv": ("rte", "test"),
    "WNLI.tsv": ("wnli", "test"),
    "AX.tsv": ("ax", "test"),
}
"""Name in the archive -> task and split."""
HEADER = "index\tprediction"
LOWEST, HIGHEST = 0.0, 5.0  # scores of STS-B
LONGEST_FILE = 2**26  # bytes; QQP's, the largest, has 4 MB


@dataclass(frozen=True)
class Submission:
    """What was written."""

    path: Path
    placeholders: tuple[str, ...]
    """Files that hold the majority label in every row because there were no predictions; say so to the user."""
    rows: dict[str, int]
    """Of each file."""


def write_submission(
    path: Path | str,
    predictions: Mapping[str, Mapping[str, Sequence[str | float]]],
    fill_missing: bool = False,
) -> Submission:
    """Writes the zip file `path`, after it was checked as `validate` does; the same predictions give the same bytes.

    Args:
        predictions: task -> test split -> label words in the order of the split (numbers for STS-B, which are clipped
            to 0..5).
        fill_missing: give files without predictions the task's majority label (the server takes only all eleven).

    Raises:
        UserError: a task or split is unknown or missing, its rows are not the official ones, or a word is no label.
    """
    for name, splits in predictions.items():
        choose("GLUE task", name, GLUE)
        for split in splits:
            choose(f"test split of {name}", split, [split for task, split in FILES.values() if task == name])
    missing = tuple(file for file, (name, split) in FILES.items() if split not in predictions.get(name, {}))
    if missing and not fill_missing:
        raise UserError(
            f"no predictions for {', '.join(missing)}, and GLUE's server takes only all {len(FILES)} files; predict "
            "the others too, or ask for the majority label in their place"
        )
    contents = {}
    for file, (name, split) in FILES.items():
        task, count = GLUE[name], GLUE[name].rows[split]
        given = [task.majority] * count if file in missing else predictions[name][split]
        if len(given) != count:
            raise UserError(f"{file}: {len(given):,} predictions, and {name}'s {split} has {count:,} rows; predict all")
        cells = [_cell(value, task, f"{file}, prediction {index}") for index, value in enumerate(given)]
        contents[file] = "\n".join([HEADER, *(f"{index}\t{cell}" for index, cell in enumerate(cells)), ""])
    path, made = Path(path), io.BytesIO()  # some megabytes; what is written to a FIFO cannot be read back
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for file, text in contents.items():
            entry = zipfile.ZipInfo(file)  # of a fixed date, where writestr by name takes today's
            entry.external_attr = 0o644 << 16  # without it they unpack as files that nobody may read
            archive.writestr(entry, text, zipfile.ZIP_DEFLATED)
    rows = _checked(path, _unzipped(made, path))
    with output_file(path) as out:
        out.write(made.getbuffer())
    return Submission(path, missing, rows)


def _cell(value: str | float, task: GlueTask, where: str) -> str:
    if task.labels:
        if str(value) not in task.labels:
            raise UserError(f"{where}: {value!r} is no label; {nearest(str(value), task.labels)}")
        return str(value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{where}: {value!r} is no finite number; predict again")
    return f"{min(max(number, LOWEST), HIGHEST):.3f}"


def validate(path: Path | str) -> dict[str, int]:
    """Checks an archive (a zip, or a folder with its files) against what GLUE's server takes.

    Returns:
        The rows of each file.

    Raises:
        UserError: every file that is wrong, with its first wrong line; or the archive cannot be read.
    """
    path = Path(path)
    return _checked(path, _contents(path))


def _checked(path: Path, contents: Mapping[str, bytes]) -> dict[str, int]:
    """The rows of each file, by name; raises a UserError, which names `path`, if the server would not take them."""
    problems = [f"{path}/{file} does not belong in a submission; take it out" for file in contents if file not in FILES]
    rows = {}
    for file, (name, split) in FILES.items():
        if file not in contents:
            problems.append(f"{path}/{file} is missing; {nearest(file, contents) if contents else 'it is empty'}")
        elif problem := _problem(contents[file], GLUE[name], GLUE[name].rows[split]):
            problems.append(f"{path}/{file}{problem}")
        else:
            rows[file] = GLUE[name].rows[split]
    if problems:
        raise UserError("\n".join(problems))
    return rows


def _contents(path: Path) -> dict[str, bytes]:
    if path.is_dir():
        return {file.name: file.read_bytes() for file in sorted(path.iterdir()) if file.is_file()}
    return _unzipped(path, path)


def _unzipped(archive: Path | IO[bytes], path: Path) -> dict[str, bytes]:
    """The files in `archive`, by name; errors name `path`."""
    try:
        with zipfile.ZipFile(archive) as archive:
            large = [entry.filename for entry in archive.infolist() if entry.file_size > LONGEST_FILE]
            if large:
                raise UserError(f"{path}/{large[0]} is larger than any submission file; make the archive again")
            return {name: archive.read(name) for name in archive.namelist()}
    except FileNotFoundError:
        raise UserError(f"no submission {path}; give a zip file, or a folder with {', '.join(FILES)}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # RuntimeError: encrypted
        raise UserError(f"{path} is damaged or no zip file ({error}); make it again") from None


def _problem(content: bytes, task: GlueTask, count: int) -> str | None:
    """The first thing wrong with a file: ", line 3: ..."; None where it is right."""
    try:
        lines = content.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        return f" is not UTF-8 text: {explain(content, error.start, None)}"
    if not lines or lines[0] != HEADER:
        return f", line 1: the header must be {HEADER!r}, not {lines[0] if lines else ''!r}"
    for index, line in enumerate(lines[1:]):
        where = f", line {index + 2}"
        fields = line.split("\t")
        if len(fields) != 2:
            return f"{where}: {len(fields)} fields, not index and prediction with a tab between them"
        if index == count:
            return f"{where}: more than the {count:,} official rows; predict the official test split"
        if fields[0] != str(index):
            return f"{where}: the index must be {index}, not {fields[0]!r}; keep the order of the test split"
        if task.labels and fields[1] not in task.labels:
            return f"{where}: {fields[1]!r} is no label; {nearest(fields[1], task.labels)}"
        if not task.labels and not _is_score(fields[1]):
            return f"{where}: {fields[1]!r} is no number from {LOWEST:g} to {HIGHEST:g}"
    if len(lines) - 1 < count:
        return f", line {len(lines) + 1}: the file ends after {len(lines) - 1:,} of {count:,} rows; predict them all"
    return None


def _is_score(text: str) -> bool:
    try:
        return LOWEST <= float(text) <= HIGHEST
    except ValueError:
        return False
