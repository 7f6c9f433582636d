"""Data of a run other than --data: old data for replay, and prepared data whose held-out documents are validated."""

from dataclasses import replace
from pathlib import Path

from fastbert.data.batches import TrainingBatches
from fastbert.data.prepare import PrepareOptions, prepared_folder
from fastbert.data.shards import Dataset, open_dataset
from fastbert.data.tokenizer_check import differences
from fastbert.errors import UserError
from fastbert.pretraining.note_corpus import rare_word_range
from fastbert.pretraining.options import PretrainOptions
from fastbert.training.splits import OLD, named_folders


def open_others(options: PretrainOptions, dataset: Dataset, tokenizer: Path | None, verify: bool) -> dict[str, Dataset]:
    """The other data by name; `old` is that of --replay.data.

    Args:
        dataset: the prepared --data.
        tokenizer: folder of the tokenizer with which old text is prepared; None: that of `dataset`.
        verify: verify the hashes of all files.

    Raises:
        UserError: data is missing or damaged, its vocabulary is not the beginning of that of `dataset`, or it has too
            little text.
    """
    found = {}
    for name, folder in named_folders(options.eval_data).items():
        found[name] = _open(f"--eval-data {name}", Path(folder), options, dataset, verify)
    if options.replay.data is not None:
        folder = old_folder(options, tokenizer or dataset.tokenizer)
        found[OLD] = _open("--replay.data", folder, options, dataset, verify)
    return found


def old_folder(options: PretrainOptions, tokenizer: Path) -> Path:
    """Prepared folder of --replay.data; prepares it first, with this tokenizer, if it is a source."""
    try:
        return prepared_folder(
            options.replay.data,
            PrepareOptions(
                source=options.replay.data,
                out="data",  # has no effect
                tokenizer=str(tokenizer),
                workers=options.machine.workers,
                validation_fraction=options.validation_fraction,
                **rare_word_range(options.notes),
            ),
        )
    except UserError as error:
        raise UserError(f"--replay.data: {error}") from None


def _open(flag: str, folder: Path, options: PretrainOptions, dataset: Dataset, verify: bool) -> Dataset:
    try:
        opened = open_dataset(folder, verify)
    except UserError as error:
        without = "" if flag == "--replay.data" else "; to resume a run without it, give --eval-data None"
        raise UserError(f"{flag}: {error}{without}") from None
    check_vocabulary(flag, opened, dataset)
    if (tokens := len(opened.split("validation"))) < options.length - 1:
        raise UserError(
            f"{flag}: {folder} has {tokens} tokens for validation, less than one sequence of {options.length}; lower "
            "--length, or prepare it with a larger --validation-fraction"
        )
    return opened


def check_vocabulary(flag: str, other: Dataset, dataset: Dataset) -> None:
    """Raises a UserError if an id means different words in the two."""
    theirs, ours = other.wordpiece, dataset.wordpiece
    if ours.extends(theirs):
        return
    beginning = replace(ours, tokens=ours.tokens[: len(theirs.tokens)])
    found = differences(theirs, beginning, (str(other.folder), str(dataset.folder)))
    raise UserError(
        f"{flag}: the tokenizer of {other.folder} is not that of {dataset.folder}, nor the beginning of its "
        f"vocabulary, so the same ids mean other words: {'; '.join(found)}. Prepare that text again with "
        f"`fastbert prepare --tokenizer {dataset.tokenizer}`"
    )


def replay_lines(options: PretrainOptions, batches: TrainingBatches) -> list[str]:
    """Lines that describe the replay of a run, before its first step; empty without replay."""
    if batches.replay is None:
        return []
    lines = []
    for length, count in batches.plan.sequences(options.steps).items():
        rows, old = batches.rows[length], batches.replay.schedule.old_before(count)
        lines.append(
            f"replay: {old:,} of {count:,} sequences of {length} tokens are old data, "
            f"{old / rows.old_rows:.2f} epochs of {options.replay.data} in the order of seed {options.replay.seed}; "
            f"the others are {(count - old) / rows.new_rows:.2f} epochs of {options.data}"
        )
    return lines
