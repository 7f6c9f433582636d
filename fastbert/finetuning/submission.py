"""The archive for GLUE's server: eleven TSV files in a zip, written whole and checked line by line."""

import io
import lzma
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from fastbert.encodings import explain
from fastbert.errors import LINE, UserError, brief, choose, nearest
from fastbert.finetuning.glue import GLUE, GlueTask
from fastbert.finetuning.rows import number_in
from fastbert.inputs import input_errors, open_input, read_input
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
MOST_FILES = 1000  # in an archive or a folder that is checked
LARGEST_ARCHIVE = LONGEST_FILE = 2**24  # bytes; QQP's, the largest, has 4 MB


# Exceptions of zipfile for a damaged archive: RuntimeError if it is encrypted or its compression is unknown, OSError
# without a number for damaged bz2.
_UNZIPPING = (
    *(zipfile.BadZipFile, lzma.LZMAError, zlib.error, struct.error),
    *(EOFError, OSError, ValueError, RuntimeError),
)


def write_submission(
    path: Path | str,
    predictions: Mapping[str, Mapping[str, Sequence[str | float]]],
    fill_missing: bool = False,
) -> dict[str, int]:
    """Writes the zip file `path` after checking it as in `validate`; the same predictions give the same bytes.

    Args:
        predictions: task -> test split -> label words in the order of the split (numbers for STS-B, which are clipped
            to 0..5).
        fill_missing: use the task's majority label in files without predictions (the server requires all eleven).

    Returns:
        The number of rows of each file.

    Raises:
        UserError: a task or split is unknown or missing, it has another number of rows than the official split, or a
            word is not a label.
    """
    for name, splits in predictions.items():
        choose("GLUE task", name, GLUE)
        for split in splits:
            choose(f"test split of {name}", split, [split for task, split in FILES.values() if task == name])
    missing = tuple(file for file, (name, split) in FILES.items() if split not in predictions.get(name, {}))
    if missing and not fill_missing:
        raise UserError(
            f"no predictions for {', '.join(missing)}, and GLUE's server requires all {len(FILES)} files; predict "
            "the others too, or fill them with the majority label"
        )
    contents = {}
    for file, (name, split) in FILES.items():
        task, count = GLUE[name], GLUE[name].rows[split]
        given = [task.majority] * count if file in missing else predictions[name][split]
        if len(given) != count:
            raise UserError(f"{file}: {len(given):,} predictions, and {name}'s {split} has {count:,} rows; predict all")
        cells = [_cell(value, task, f"{file}, prediction {index}") for index, value in enumerate(given)]
        contents[file] = "\n".join([HEADER, *(f"{index}\t{cell}" for index, cell in enumerate(cells)), ""])
    path, made = Path(path), io.BytesIO()  # a few megabytes; a FIFO cannot be read back
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for file, text in contents.items():
            entry = zipfile.ZipInfo(file)  # with a fixed date; writestr by name would use the current one
            entry.external_attr = 0o644 << 16  # without it the unpacked files have no permissions
            archive.writestr(entry, text, zipfile.ZIP_DEFLATED)
    rows = _checked(path, _unzipped(made, path))
    with output_file(path) as out:
        out.write(made.getbuffer())
    return rows


def _cell(value: str | float, task: GlueTask, where: str) -> str:
    if task.kind.labels:
        if str(value) not in task.kind.labels:
            raise UserError(f"{where}: {brief(value)} is not a label; {nearest(str(value), task.kind.labels)}")
        return str(value)
    number = number_in(value)
    if number is None or not math.isfinite(number):
        raise UserError(f"{where}: {brief(value)} is not a finite number; predict again")
    return f"{min(max(number, LOWEST), HIGHEST):.3f}"


def validate(path: Path | str) -> dict[str, int]:
    """Checks an archive (a zip, or a folder with its files) against the rules of GLUE's server.

    Returns:
        The number of rows of each file.

    Raises:
        UserError: lists every wrong file with its first wrong line; or the archive cannot be read.
    """
    path = Path(path)
    return _checked(path, _contents(path))


def _checked(path: Path, contents: Mapping[str, bytes]) -> dict[str, int]:
    """Number of rows of each file; raises a UserError, with `path`, if the server would not accept them."""
    others = [file for file in contents if file not in FILES]
    more = f" (and {len(others) - 5:,} more)" if len(others) > 5 else ""
    problems = [f"{path}/{file} does not belong in a submission; remove it{more}" for file in others[:5]]
    rows = {}
    for file, (name, split) in FILES.items():
        if file not in contents:
            problems.append(f"{path}/{file} is missing; {nearest(file, contents) if contents else 'it is empty'}")
        elif problem := _problem(contents[file], GLUE[name], GLUE[name].rows[split]):
            problems.append(f"{path}/{file}{problem}")
        else:
            rows[file] = GLUE[name].rows[split]
    if problems:
        raise UserError(LINE.join(problems))
    return rows


def _contents(path: Path) -> dict[str, bytes]:
    if not path.is_dir():
        if not path.exists():
            raise UserError(f"no submission {path}; give a zip file, or a folder with {', '.join(FILES)}")
        with open_input(path, "submission") as archive:
            return _unzipped(archive, path)
    with input_errors(path, "submission"), os.scandir(path) as entries:
        names = sorted(entry.name for _, entry in zip(range(MOST_FILES), entries, strict=False) if entry.is_file())
    # Files that do not belong there are not read.
    return {name: read_input(path / name, most=LONGEST_FILE) if name in FILES else b"" for name in names}


def _unzipped(file: IO[bytes], path: Path) -> dict[str, bytes]:
    """Name -> content of the files in the archive `file`; files that do not belong there are not read.

    The sizes in the archive are not trusted: no more is unpacked than a file of a submission can have.
    """
    try:
        if file.seek(0, os.SEEK_END) > LARGEST_ARCHIVE:
            raise UserError(f"{path} is larger than any submission; make the archive again")
        contents: dict[str, bytes] = {}
        with zipfile.ZipFile(file) as archive:
            if len(archive.infolist()) > MOST_FILES:
                raise UserError(
                    f"{path} holds {len(archive.infolist()):,} files, and a submission {len(FILES)}; make it again"
                )
            for entry in archive.infolist():
                name = brief(entry.filename, str)
                if name in contents:
                    raise UserError(f"{path} holds {name} twice; make the archive again")
                contents[name] = b""
                if entry.filename in FILES:
                    with archive.open(entry) as member:
                        contents[name] = member.read(LONGEST_FILE + 1)
                if len(contents[name]) > LONGEST_FILE:
                    raise UserError(f"{path}/{name} is larger than any submission file; make the archive again")
        return contents
    except _UNZIPPING as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{path} is damaged or not a zip file ({brief(error, str)}); make it again") from None


def _problem(content: bytes, task: GlueTask, count: int) -> str | None:
    """First error in a file, such as ", line 3: ..."; None if there is none."""
    try:
        lines = content.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        return f" is not UTF-8 text: {explain(content, error.start, None)}"
    if not lines or lines[0] != HEADER:
        return f", line 1: the header must be {HEADER!r}, not {brief(lines[0] if lines else '')}"
    for index, line in enumerate(lines[1:]):
        where = f", line {index + 2}"
        fields = line.split("\t")
        if len(fields) != 2:
            return f"{where}: {len(fields)} fields, not index and prediction with a tab between them"
        if index == count:
            return f"{where}: more than the {count:,} official rows; predict the official test split"
        if fields[0] != str(index):
            return f"{where}: the index must be {index}, not {brief(fields[0])}; keep the order of the test split"
        if task.kind.labels and fields[1] not in task.kind.labels:
            return f"{where}: {brief(fields[1])} is not a label; {nearest(fields[1], task.kind.labels)}"
        score = number_in(fields[1])
        if not task.kind.labels and not (score is not None and LOWEST <= score <= HIGHEST):
            return f"{where}: {brief(fields[1])} is not a number from {LOWEST:g} to {HIGHEST:g}"
    if len(lines) - 1 < count:
        return f", line {len(lines) + 1}: the file ends after {len(lines) - 1:,} of {count:,} rows; predict them all"
    return None
