"""Options of `fastbert fill`, and the check of its texts; imports no torch."""

import re
from dataclasses import dataclass, field

from fastbert.config import MACHINE, POSITIONAL
from fastbert.downloads import FROM_HUB
from fastbert.errors import UserError, brief
from fastbert.hub.folders import check_model_folder
from fastbert.ranges import Count, Texts, check_values
from fastbert.training.options import MachineOptions

MASK = "[MASK]"
STANDARD_INPUT = "-"
_MEANT = re.compile(r"\[ *mask *\]|<mask>|___+", re.IGNORECASE)  # other spellings of [MASK]


@dataclass(frozen=True)
class FillOptions:
    """Predict the most likely words for each [MASK] in a text, with their probabilities."""

    model: str = field(metadata={**POSITIONAL, **FROM_HUB})
    """A run, a checkpoint, an export, or a masked language model of transformers, as a folder or as
    owner/name[@revision] on the hub. In a run of ELECTRA or multiple choice the generator or the meta controller fills
    in the words; an export of such a run contains neither."""
    texts: Texts = field(default=(), metadata=POSITIONAL)
    """Texts that contain [MASK], each in quotes. Without texts, or with -, the lines of standard input are read."""
    top: Count = 5
    """Number of words for each [MASK]."""
    json: bool = False
    """Print one JSON object per text, each on its line, instead of a table."""
    machine: MachineOptions = field(default_factory=MachineOptions, metadata=MACHINE)

    def __post_init__(self) -> None:
        check_values(self)

    @property
    def reads_standard_input(self) -> bool:
        return self.texts in ((), (STANDARD_INPUT,))

    def check_inputs(self) -> None:
        """Checks, before torch is imported, that the model exists and the texts contain [MASK].

        Raises:
            UserError: the model does not exist, or a text has nothing to fill in.
        """
        if MASK in self.model:
            raise UserError(f"the model comes before the text: fastbert fill MODEL {brief(self.model)}")
        check_model_folder(self.model)
        if not self.reads_standard_input:
            for number, text in enumerate(self.texts, 1):
                check_masked(text, f"text {number}")


def check_masked(text: str, where: str) -> None:
    """Raises a UserError that begins with `where` if the text contains no [MASK]."""
    if MASK in text:
        return
    if found := _MEANT.search(text):
        raise UserError(f"{where} has no {MASK}; write {MASK}, in capital letters, instead of {brief(found[0], str)}")
    quotes = "" if " " in text.strip() else ", and put the whole text in quotes"
    raise UserError(f"{where} ({brief(text)}) has no {MASK}; write it for each word to fill in{quotes}")
