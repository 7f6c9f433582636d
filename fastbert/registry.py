"""Names of variants and where they are defined: a wrong name is refused before torch is imported."""

import importlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class Variant(NamedTuple):
    """A line of a registry."""

    path: str
    """"module:attribute" of what the name stands for."""
    options: str = ""
    """"module:attribute" of the dataclass of its own options, best in a module without torch; empty if it has none."""
    uses: tuple[str, ...] = ()
    """Options of the group that all variants share which have an effect only with variants that name them here."""


class Registry(Mapping[str, Any]):
    """A mapping whose values are imported when they are first asked for.

    Args:
        lines: name -> its `Variant`, or the path alone.
    """

    def __init__(self, lines: Mapping[str, Variant | str]) -> None:
        self.lines = {name: Variant(line) if isinstance(line, str) else line for name, line in lines.items()}

    def register(self, name: str, line: Variant | str) -> None:
        """Adds a variant at run time, as a line of the registry's file does; an older one of that name is replaced."""
        self.lines[name] = Variant(line) if isinstance(line, str) else line

    def __getitem__(self, name: str) -> Any:
        return imported(self.lines[name].path)

    def options(self, name: str) -> type | None:
        """The dataclass of the variant's own options."""
        path = self.lines[name].options
        return imported(path) if path else None

    def uses(self, name: str) -> tuple[str, ...]:
        """The shared options that have an effect with this variant and not with all."""
        return self.lines[name].uses

    def unused(self, name: str) -> set[str]:
        """The shared options that have an effect with other variants only."""
        return {use for line in self.lines.values() for use in line.uses} - set(self.lines[name].uses)

    def __iter__(self) -> Iterator[str]:
        return iter(self.lines)

    def __len__(self) -> int:
        return len(self.lines)


def imported(path: str) -> Any:
    """The attribute at "module:attribute"."""
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)
