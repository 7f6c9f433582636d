"""Options of `fastbert export`."""

from dataclasses import dataclass, field

from fastbert.config import POSITIONAL
from fastbert.downloads import FROM_HUB
from fastbert.ranges import check_values


@dataclass(frozen=True)
class ExportOptions:
    """Export of a run as a Hugging Face folder."""

    run: str = field(metadata={**POSITIONAL, **FROM_HUB})
    """Run (its newest complete checkpoint is used), one of its checkpoints, an export, or a Hugging Face BERT."""
    out: str
    """Folder to write. An earlier export there is replaced; a folder with anything else is refused."""

    def __post_init__(self) -> None:
        check_values(self)
