"""Options of `fastbert evaluate`. This module imports no torch."""

from dataclasses import dataclass, field, fields
from pathlib import Path

from fastbert.config import MACHINE, choice
from fastbert.data.sources import check_source, source_files
from fastbert.downloads import FROM_HUB
from fastbert.errors import UserError
from fastbert.hub.folders import check_model_folder
from fastbert.objectives.options import MaskRate
from fastbert.outputs import check_output_file, refuse_input
from fastbert.pretraining.zero_shot.pair_files import is_pair_file, pair_files
from fastbert.ranges import Count, Length, check_values
from fastbert.training.options import MachineOptions

MEASUREMENTS = ("source", "pll", "pairs")  # of `fastbert evaluate`
PLL_FORMS = ("salazar", "word-l2r")
_READ_BY = {
    **dict.fromkeys(("max_tokens", "mask_rate"), ("source",)),
    "column": ("source", "pll"),
    "sentences": ("pll",),
    **dict.fromkeys(("pll_form", "out"), ("pll", "pairs")),
}
"""Option of `fastbert evaluate` -> the measurements in which it has an effect; the others have one in all."""


@dataclass(frozen=True)
class EvaluateOptions:
    """Measure a model on held-out text (--source), by the pseudo-log-likelihood of sentences (--pll), or by minimal
    pairs (--pairs).

    --source: masked loss, accuracy and bits per byte; for a run of ELECTRA or multiple choice, the metrics of its
    objective. Bits per byte are (loss / ln 2 * W + 8 * U) / B, with the mean loss over the masked positions in nats, W
    tokens that are not special, U UTF-8 bytes that became [UNK], which is never masked, and B UTF-8 bytes in all.

    --pll: the sum of log p(token | rest of the sentence) with one token masked at a time, per token, word and byte.
    [UNK] is not scored and costs 8 bits for each of its bytes.

    --pairs: the fraction of pairs in which the acceptable sentence has the higher score, such as BLiMP's.

    Compare bits per byte only between models with the same normalization (case, accents)."""

    model: str = field(metadata=FROM_HUB)
    """Run, checkpoint, export, or Hugging Face BERT with an MLM head, as a folder or owner/name[@revision] on the hub;
    with --pairs and --pll any masked language model of transformers. For ELECTRA and multiple choice a run or a
    checkpoint: an export has no generator or meta controller, and of these only ELECTRA's discriminator can score
    --pairs."""
    source: str | None = None
    """Held-out text, one of the sources of prepare: text files, tables (JSONL, JSON, CSV, TSV, Parquet), globs,
    hf:NAME, sotu, python."""
    pll: str | None = None
    """Text, a source as for --source, of which sentences are scored by their pseudo-log-likelihood (arXiv
    1910.14659)."""
    pairs: str | None = None
    """Minimal pairs: a JSONL file or a folder of such files, with the keys sentence_good and sentence_bad, and
    optionally UID (paradigm; default: the file's name) and linguistics_term (phenomenon)."""
    pll_form: str = choice("salazar", PLL_FORMS)
    """Tokens that are masked for the score of one: salazar (that token alone, arXiv 1910.14659), or word-l2r (also the
    later tokens of the same word, arXiv 2305.10588)."""
    sentences: Count = 1000
    """Number of sentences that --pll samples from the text, the same for every model."""
    column: str = "text"
    """Column of the text in a table; in JSON, its field."""
    length: Length | None = None
    """Tokens per sequence, [CLS] included (default: the model's positions, at most 512). More than the positions need a
    position encoding that extrapolates. --pll cuts longer sentences between words; given with --pairs,
    it leaves out pairs with a longer sentence."""
    max_tokens: Count = 1_000_000
    """Tokens of --source to read, in whole documents from the beginning of the text."""
    mask_rate: MaskRate = 0.15
    """Fraction of the tokens of --source that are masked; all of them are replaced by [MASK]."""
    out: str | None = None
    """JSONL file for the scores of every sentence of --pll or --pairs."""
    json: bool = False
    """Print one JSON object instead of a table."""
    machine: MachineOptions = field(default_factory=MachineOptions, metadata=MACHINE)

    def __post_init__(self) -> None:
        check_values(self)

    def check_inputs(self) -> None:
        """Checks, before torch is imported, that model and text exist and that one measurement is requested.

        Raises:
            UserError: a file does not exist, not exactly one of --source, --pll and --pairs is given, or an option has
                no effect with it.
        """
        defaults = {one.name: one.default for one in fields(self)}
        for name, readers in _READ_BY.items():
            if self.measurement not in readers and getattr(self, name) != defaults[name]:
                raise UserError(
                    f"--{name.replace('_', '-')} has no effect with --{self.measurement}; leave it out (it is for "
                    f"{' and '.join(f'--{reader}' for reader in readers)})"
                )
        check_model_folder(self.model)
        if self.measurement == "pairs":
            pair_files(self.pairs)
        else:
            check_source(getattr(self, self.measurement), self.column)
        if self.out is not None:
            check_output_file(self.out)
            self._check_out()

    def _check_out(self) -> None:
        """Raises a UserError if the scores would replace an input, or become one of the next call."""
        if self.measurement == "pll":
            refuse_input(self.out, source_files(self.pll))
            return
        refuse_input(self.out, pair_files(self.pairs))
        if Path(self.pairs).resolve() == Path(self.out).resolve().parent and is_pair_file(self.out):
            raise UserError(
                f"--out {self.out} would be read as minimal pairs the next time; choose a file outside {self.pairs}"
            )

    @property
    def measurement(self) -> str:
        """The one of MEASUREMENTS that is given.

        Raises:
            UserError: none is given, or several are.
        """
        given = [name for name in MEASUREMENTS if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(f"--{name}" for name in given) or "none"
            raise UserError(f"give one of --source, --pll and --pairs, not {found}")
        return given[0]
