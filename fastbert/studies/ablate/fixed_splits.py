"""Fixed validation splits of an ablation with `mode: data`, and the variants whose losses on them can be compared.

A loss per token is comparable only if the text has the same tokens and the model predicts the same words. So a variant
is compared on a split if its vocabulary is exactly the one with which the split was prepared. A variant whose
vocabulary only begins with it has further words: it is left out of the losses. Any other vocabulary would give the ids
of the split another meaning, and is refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fastbert.data.shards import open_dataset
from fastbert.data.tokenizer import WordPiece
from fastbert.data.tokenizer_check import differences
from fastbert.data.tokenizer_folders import load_tokenizer
from fastbert.errors import UserError
from fastbert.hub.load import load_pretrained
from fastbert.pretraining.options import PretrainOptions
from fastbert.pretraining.setup import data_fingerprint
from fastbert.studies.ablate.comparability import incomparable, planned_validations
from fastbert.studies.ablate.options import Ablation
from fastbert.studies.shared.grid import prefixed


@dataclass(frozen=True)
class FixedSplit:
    """A prepared folder whose held-out documents are a validation split of all variants."""

    name: str
    folder: str
    fingerprint: str
    """Hash of its tokens and its tokenizer."""
    vocabulary: WordPiece
    tokens: int
    """Tokens of the held-out documents."""
    unigram_entropy: float
    """Unigram entropy of the held-out documents, in nats."""

    def why_not(self, vocabulary: WordPiece, where: str) -> str:
        """The reason why the losses of a model with this vocabulary are not comparable; empty if they are.

        Args:
            where: folder of the vocabulary.

        Raises:
            UserError: the ids of the split would mean other words.
        """
        if vocabulary.fingerprint == self.vocabulary.fingerprint:
            return ""
        size = len(self.vocabulary.tokens)
        beginning = replace(vocabulary, tokens=vocabulary.tokens[:size])
        if beginning.fingerprint != self.vocabulary.fingerprint:
            found = differences(self.vocabulary, beginning, (self.folder, where))
            raise UserError(
                f"the vocabulary of {where} is not the one with which the validation split {self.name} was prepared, "
                f"nor does it begin with it, so the same ids mean other words: {'; '.join(found)}. Prepare the data of "
                f"all variants and the splits with one tokenizer: `fastbert prepare --tokenizer {self.folder}`"
            )
        further = len(vocabulary.tokens) - size
        return f"its vocabulary has {further:,} words more than the {size:,} with which the split was prepared"


def open_splits(ablation: Ablation) -> list[FixedSplit]:
    """Opens the fixed validation splits; without `mode: data` there are none.

    Raises:
        UserError: a folder is damaged, has too little text, or is the same as another one.
    """
    length, found = ablation.variants[0].options.length, []
    for name, folder in ablation.splits.items():
        with prefixed(f"{ablation.path}: validation: {name}"):
            dataset = open_dataset(folder)
            stream = dataset.split("validation")
            if len(stream) < length - 1:
                raise UserError(
                    f"{folder} has {len(stream)} tokens for validation, less than one sequence of {length}; lower "
                    "length, or prepare it with a larger --validation-fraction"
                )
            fingerprint = data_fingerprint(dataset)
            if same := next((other.name for other in found if other.fingerprint == fingerprint), None):
                raise UserError(f"{folder} is the same data as the split {same}; leave one of them out")
            entropy = stream.unigram_entropy
            found.append(FixedSplit(name, folder, fingerprint, dataset.wordpiece, len(stream), entropy))
    return found


def known_vocabularies(ablation: Ablation) -> dict[str, tuple[WordPiece, str]]:
    """Vocabulary of each variant, and its folder, as far as they are known before data is prepared."""
    found = {}
    for variant in ablation.variants if ablation.splits else ():
        with prefixed(f"{ablation.path}: variants: {variant.name}"):
            if (folder := _tokenizer_folder(variant.options)) is not None:
                found[variant.name] = load_tokenizer(folder), folder
    return found


def _tokenizer_folder(options: PretrainOptions) -> str | None:
    """Folder of the tokenizer of a training; None if a tokenizer is trained."""
    if (Path(options.data) / "dataset.json").is_file():
        return options.data
    if options.tokenizer is None and options.init_from is not None:
        return str(load_pretrained(options.init_from).tokenizer)
    return options.tokenizer


def incomparable_on(
    splits: Sequence[FixedSplit],
    path: str,
    vocabularies: Mapping[str, tuple[WordPiece, str]],
    reasons: Mapping[str, str],
) -> dict[str, dict[str, str]]:
    """Split -> variants whose losses on it cannot be compared -> the reason. If the baseline is one of them, no variant
    is compared on the split.

    Args:
        path: YAML file, for errors.
        vocabularies: vocabulary of each variant, and its folder.
        reasons: variants whose objective or masks differ from the baseline's -> the reason.

    Raises:
        UserError: a vocabulary is neither that of a split nor begins with it.
    """
    found: dict[str, dict[str, str]] = {}
    for split in splits:
        found[split.name] = dict(reasons)
        for name, (vocabulary, where) in vocabularies.items():
            with prefixed(f"{path}: variants: {name}"):
                if reason := split.why_not(vocabulary, where):
                    found[split.name].setdefault(name, reason)
    return found


def never_compared(by_split: Mapping[str, Mapping[str, str]], variants: Sequence[str]) -> dict[str, str]:
    """Variants, in addition to the baseline, that no loss compares with it -> the reason.

    Args:
        by_split: result of `incomparable_on`.
        variants: names of the variants, the baseline first.
    """
    first, *others = variants
    found = {}
    for name in others:
        reasons = [
            left_out.get(name) or (f"{first}, the baseline: {left_out[first]}" if first in left_out else "")
            for left_out in by_split.values()
        ]
        if all(reasons):
            found[name] = reasons[0]
    return found


def planned_reasons(ablation: Ablation) -> dict[str, str]:
    """Variants whose losses cannot be compared with the baseline's -> the reason, as far as it is known before data is
    prepared.

    Raises:
        UserError: a fixed split cannot be used, or has another vocabulary than a variant.
    """
    reasons = incomparable(planned_validations(ablation))
    if not ablation.splits:
        return reasons
    by_split = incomparable_on(open_splits(ablation), ablation.path, known_vocabularies(ablation), reasons)
    return never_compared(by_split, [variant.name for variant in ablation.variants])


def shown_splits(splits: Sequence[FixedSplit]) -> str:
    """The splits with their folders, such as "old (data/wiki) and new (data/de)"."""
    *names, last = (f"{split.name} ({split.folder})" for split in splits)
    return f"{', '.join(names)} and {last}" if names else last
