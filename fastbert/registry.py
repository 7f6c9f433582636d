"""Names of variants and where they are defined: a wrong name is refused before torch is imported."""

import importlib
from collections.abc import Iterator, Mapping
from typing import Any


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
            module, _, attribute = self.paths[name].partition(":")
            self._loaded[name] = getattr(importlib.import_module(module), attribute)
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)
