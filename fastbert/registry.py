"""Names of variants and where they are defined: a wrong name is refused before torch is imported."""

import importlib
from collections.abc import Iterator, Mapping
from typing import Any


def load(path: str) -> Any:
    """What "module:attribute" names, imported."""
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)


class Registry(Mapping[str, Any]):
    """A mapping whose values are imported when they are first asked for.

    Args:
        paths: name -> "module:attribute".
    """

    def __init__(self, paths: dict[str, str]) -> None:
        self.paths = paths
        self._loaded: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._loaded:
            self._loaded[name] = load(self.paths[name])
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)
