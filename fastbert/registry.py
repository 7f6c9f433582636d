"""Registries of variants by name and import path, so that an unknown name is refused before torch is imported."""

import gc
import importlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class Variant(NamedTuple):
    """An entry of a registry."""

    path: str
    """"module:attribute" of the variant."""
    options: str = ""
    """"module:attribute" of the dataclass of its specific options, in a module without torch; empty if it has none."""
    uses: tuple[str, ...] = ()
    """Common options that have an effect with this variant, but not with variants that do not list them."""


class Registry(Mapping[str, Any]):
    """A mapping whose values are imported when they are looked up.

    Args:
        lines: name -> its `Variant`, or the path alone.
    """

    def __init__(self, lines: Mapping[str, Variant | str]) -> None:
        self.lines = {name: Variant(line) if isinstance(line, str) else line for name, line in lines.items()}

    def register(self, name: str, line: Variant | str) -> None:
        """Adds a variant at run time, or replaces the one with this name."""
        self.lines[name] = Variant(line) if isinstance(line, str) else line

    def __getitem__(self, name: str) -> Any:
        return imported(self.lines[name].path)

    def options(self, name: str) -> type | None:
        """The dataclass of the variant's specific options."""
        path = self.lines[name].options
        return imported(path) if path else None

    def uses(self, name: str) -> tuple[str, ...]:
        """The common options that have an effect with this variant, but not with all variants."""
        return self.lines[name].uses

    def unused(self, name: str) -> set[str]:
        """The common options that have an effect only with other variants."""
        return {use for line in self.lines.values() for use in line.uses} - set(self.lines[name].uses)

    def __iter__(self) -> Iterator[str]:
        return iter(self.lines)

    def __len__(self) -> int:
        return len(self.lines)


def imported(path: str) -> Any:
    """The attribute at "module:attribute".

    A first import is done without garbage collection: torch and its companions create half a million objects that stay,
    and to look through them again and again takes a sixth of the time (docs/lab-notes.md). They are not looked through
    later either, when a collection would stop a training step for a quarter of a second.
    """
    module, _, attribute = path.partition(":")
    if module in sys.modules or not gc.isenabled():
        return getattr(importlib.import_module(module), attribute)
    gc.disable()
    try:
        return getattr(importlib.import_module(module), attribute)
    finally:
        gc.freeze()
        gc.enable()
