"""YAML files that state only how they differ from another file.

`inherits: other.yaml` in a mapping, at the top level of a file or nested, adds the values of that file that the mapping
does not have. The path is relative to the folder of the file that contains it; if there is no such file, paths such as
configs/pretrain/tiny.yaml are those of the files that come with fastbert. Mappings are merged key by key; lists and
single values replace inherited ones, so `key: null` resets a value.
"""

from collections import Counter
from pathlib import Path
from typing import Any

from fastbert.errors import UserError, brief
from fastbert.inputs import read_text_input
from fastbert.named_configs import shipped
from fastbert.ranges import text_problem

INHERITS = "inherits"
LARGEST_YAML = 2**20  # bytes
MOST_FILES, LONGEST_CHAIN = 64, 16  # files read for one file, with repetitions; length of a chain


def read_yaml(path: str | Path) -> tuple[Any, str]:
    """Reads a YAML file including inherited values; an empty file has no options.

    Returns:
        The value, and its origin for error messages: the file and those that it inherits.

    Raises:
        UserError: the file, or one that it inherits, does not exist or is not YAML; the message names the chain of
            files.
    """
    chain = _Chain()
    value = chain.read(Path(path), ())
    inherited = list(dict.fromkeys(map(str, chain.files[1:])))
    return value, f"{path}, which inherits {', '.join(inherited)}" if inherited else str(path)


def merged(values: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`values` updated with those of `over`, mappings key by key. batch-size and batch_size are the same key."""
    found = dict(values)
    spelled = {_plain(key): key for key in values}
    given = Counter(map(_plain, over))
    for key, value in over.items():
        if key not in values and given[_plain(key)] == 1:
            key = spelled.get(_plain(key), key)
        before = values.get(key)
        found[key] = merged(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return found


def _plain(key: str) -> str:
    return key.replace("-", "_")


class _Chain:
    """A file with everything that it inherits."""

    def __init__(self) -> None:
        self.files: list[Path] = []

    def read(self, path: Path, above: tuple[Path, ...]) -> Any:
        """Reads the values of `path`; the files `above` inherit it, the outermost first."""
        from fastbert.yaml_text import parse_yaml  # yaml is imported only when needed

        chain = (*above, path)
        self.files.append(path)
        try:
            value = parse_yaml(read_text_input(path, "configuration file", LARGEST_YAML), str(path))
        except UserError as error:
            if not above:
                raise
            raise UserError(f"{_named(above)}: {error}") from None
        if above and not isinstance(value, dict | None):
            raise UserError(f"{_named(chain)}: the inherited file must be a mapping of options, found {brief(value)}")
        return {} if value is None else self.resolved(value, chain)

    def resolved(self, value: Any, chain: tuple[Path, ...]) -> Any:
        """`value` from the last file in the chain, with the inherited values of its mappings."""
        if isinstance(value, list):
            return [self.resolved(item, chain) for item in value]
        if not isinstance(value, dict):
            return value
        beneath = self.inherited(value[INHERITS], chain) if INHERITS in value else {}
        own = {key: self.resolved(item, chain) for key, item in value.items() if key != INHERITS}
        return merged(beneath, own)

    def inherited(self, name: Any, chain: tuple[Path, ...]) -> dict[str, Any]:
        if not isinstance(name, str) or text_problem(name):
            raise UserError(f"{_named(chain)}: inherits must be the path of one YAML file, found {brief(name)}")
        path = chain[-1].parent / name
        if not path.exists():
            path = shipped(name) or path
        if path.resolve() in {file.resolve() for file in chain}:
            raise UserError(f"{_named((*chain, path))}: the files inherit each other in a cycle; remove one `inherits`")
        if len(self.files) == MOST_FILES or len(chain) == LONGEST_CHAIN:
            limits = f"at most {MOST_FILES} files are read for one, {LONGEST_CHAIN} of them in a chain"
            raise UserError(f"{_named((*chain, path))}: too many files; {limits}")
        return self.read(path, chain)


def _named(chain: tuple[Path, ...]) -> str:
    return " inherits ".join(map(str, chain))
