"""The subset of YAML used for options: text, numbers, true, false and null, in lists and in mappings with text keys.

Everything else is refused with its line: duplicate keys, of which `yaml.safe_load` drops one without a warning, tags
for other objects, numbers with an unexpected meaning (010 is 8), and excessive nesting or repetition by aliases, so
that reading takes bounded time and memory.
"""

import re
from typing import Any

import yaml

from fastbert.errors import UserError, brief

MOST_VALUES = 20_000  # keys and values in a file; those of aliases are counted each time
DEEPEST = 32
LARGEST_INTEGER = 2**64

_TAG = "tag:yaml.org,2002:"
_NULL, _BOOL, _INT, _FLOAT, _STR, _MERGE = (_TAG + name for name in ("null", "bool", "int", "float", "str", "merge"))
_SCALARS = (_NULL, _BOOL, _INT, _FLOAT, _STR)
_TEXTS = (_TAG + "timestamp", _TAG + "value", _MERGE)  # a date, "=", and << that is not a key: read as text
_DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9]*)")  # others are binary, octal, hexadecimal, or minutes and seconds
_UNUSABLE = re.compile("[\0\ud800-\udfff]")  # not allowed in a path, and in UTF-8
_NAMES = {_NULL: "null", _BOOL: "true or false", _INT: "a number", _FLOAT: "a number"}


def parse_yaml(text: str, where: str) -> Any:
    """Parses `text`; returns None if it is empty.

    Args:
        where: names the file in error messages.

    Raises:
        UserError: the text is not valid YAML, or is not allowed for options; the message names the line.
    """
    try:
        loader = _Loader(text, where)
        try:
            node = loader.get_single_node()
        except (ValueError, OverflowError):  # yaml's scanner: an escape like "\\UFFFFFFFF", a version of 5,000 digits
            line = loader.line + 1
            raise UserError(f"{where} is not valid YAML: line {line}: no such character or version") from None
    except yaml.MarkedYAMLError as error:
        mark, problem = error.problem_mark or error.context_mark, error.problem or error.context
        at = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        raise UserError(f"{where} is not valid YAML: {at}{brief(problem, str)}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(
            f"{where} is not valid YAML: line {line}: the character U+{error.character:04X} is not allowed there"
        ) from None
    return None if node is None else _Values(loader, where).of(node)


class _Loader(yaml.SafeLoader):
    """Composes nodes with limits on their number and depth."""

    def __init__(self, text: str, where: str) -> None:
        super().__init__(text)
        self.where = where
        self.count = self.depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.count += 1
        _check_size(self.peek_event(), self.where, self.count, self.depth)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Values:
    """Builds values from nodes. Values of an alias are built each time, so their number is limited too."""

    def __init__(self, loader: _Loader, where: str) -> None:
        self.loader, self.where = loader, where
        self.count = 0
        self.open: list[yaml.Node] = []  # the enclosing lists and mappings

    def of(self, node: yaml.Node) -> Any:
        self.count += 1
        _check_size(node, self.where, self.count, len(self.open))
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node)
        if node.tag != _TAG + ("map" if isinstance(node, yaml.MappingNode) else "seq"):
            raise self.error(node, f"the tag {brief(node.tag.replace(_TAG, '!!'), str)} is not allowed in options")
        if node in self.open:
            raise self.error(node, "an alias is inside the value that it refers to")
        self.open.append(node)
        value = self.mapping(node) if isinstance(node, yaml.MappingNode) else [self.of(item) for item in node.value]
        self.open.pop()
        return value

    def mapping(self, node: yaml.MappingNode) -> dict[str, Any]:
        values: dict[str, Any] = {}
        lines: dict[str, int] = {}  # key -> its line
        merged: list[dict[str, Any]] = []  # mappings given by <<
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE:
                value = self.of(value_node)
                merged += value if isinstance(value, list) else [value]
                if not all(isinstance(base, dict) for base in merged):
                    raise self.error(value_node, "<< takes a mapping or a list of mappings")
                continue
            key, line = self.key(key_node), key_node.start_mark.line + 1
            if key in lines:
                raise self.error(key_node, f"{brief(key, str)} is given twice, first in line {lines[key]}")
            lines[key] = line
            values[key] = self.of(value_node)
        for base in merged:  # keys of the mapping itself take precedence, then those of the first in the list
            values |= {key: value for key, value in base.items() if key not in values}
        return values

    def key(self, node: yaml.Node) -> str:
        if not isinstance(node, yaml.ScalarNode):
            what = "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
            raise self.error(node, f"a key is {what}; keys are text")
        key = self.of(node)
        if not isinstance(key, str):
            raise self.error(node, f"the key {brief(node.value or 'null', str)} is not text; put it in quotes")
        return key

    def scalar(self, node: yaml.ScalarNode) -> Any:
        tag, text = node.tag, node.value
        if tag in _TEXTS:
            return text
        if tag not in _SCALARS:
            raise self.error(node, f"the tag {brief(tag.replace(_TAG, '!!'), str)} is not allowed in options")
        if tag == _STR:
            if found := _UNUSABLE.search(text):
                raise self.error(node, f"a text contains the character U+{ord(found[0]):04X}, which is not allowed")
            return text
        if tag != self.loader.resolve(yaml.ScalarNode, text, (True, False)):
            raise self.error(node, f"{brief(text)} is not {_NAMES[tag]}; leave its tag out")
        if tag == _INT:
            return self.integer(node)
        if tag == _FLOAT and ":" in text:
            raise self.error(node, f"{brief(text)} would be read as minutes and seconds; put text in quotes")
        if tag == _FLOAT and "_" in text:
            raise self.underscore(node)
        return self.loader.construct_object(node)

    def integer(self, node: yaml.ScalarNode) -> int:
        text = node.value
        if "_" in text and _DECIMAL.fullmatch(text.replace("_", "")):
            raise self.underscore(node)
        if not _DECIMAL.fullmatch(text):
            raise self.error(
                node,
                f"{brief(text)} would be read as a binary, octal or hexadecimal number or as minutes and seconds; "
                "write a decimal number without leading zeros, or put text in quotes",
            )
        if len(text) > 21 or abs(int(text)) >= LARGEST_INTEGER:
            raise self.error(node, f"the number {brief(text, str)} is too large")
        return int(text)

    def underscore(self, node: yaml.Node) -> UserError:
        """Error for a number with an underscore, which is also refused in flags."""
        plain = brief(node.value.replace("_", ""), str)
        return self.error(node, f"{brief(node.value)} has an underscore; write {plain}, or put text in quotes")

    def error(self, node: yaml.Node, problem: str) -> UserError:
        return UserError(f"{self.where}: line {node.start_mark.line + 1}: {problem}")


def _check_size(at: yaml.Node | yaml.Event, where: str, count: int, depth: int) -> None:
    """Raises a UserError if there are too many values or they are nested too deeply."""
    line = f"{where}: line {at.start_mark.line + 1}"
    if count > MOST_VALUES:
        raise UserError(f"{line}: more than {MOST_VALUES:,} values; options have far fewer")
    if depth > DEEPEST:
        raise UserError(f"{line}: more than {DEEPEST} lists and mappings inside each other")
