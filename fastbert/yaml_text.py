"""YAML as options are written in it: texts, numbers, true, false and null, in lists and in mappings with text keys.

The rest of YAML is refused by its line: a key given twice, of which `yaml.safe_load` drops one without a warning, tags
that make other objects, numbers that do not mean what they look like (010 is 8), and what is nested or repeated by
aliases beyond any use, so that reading takes bounded time and memory.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from fastbert.errors import UserError, brief

MOST_VALUES = 20_000  # keys and values of a file, those of aliases counted each time
DEEPEST = 32
LARGEST_INTEGER = 2**64

_TAG = "tag:yaml.org,2002:"
_NULL, _BOOL, _INT, _FLOAT, _STR, _MERGE = (_TAG + name for name in ("null", "bool", "int", "float", "str", "merge"))
_SCALARS = (_NULL, _BOOL, _INT, _FLOAT, _STR)
_TEXTS = (_TAG + "timestamp", _TAG + "value")  # a date and "=": as they are written
_DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9_]*)")  # others are binary, octal, hexadecimal, or minutes and seconds
_UNUSABLE = re.compile("[\0\ud800-\udfff]")  # no path has the first, no UTF-8 the others
_NAMES = {_NULL: "null", _BOOL: "true or false", _INT: "a number", _FLOAT: "a number"}


def parse_yaml(text: str, where: str) -> Any:
    """The value that `text` describes; None for an empty one.

    Args:
        where: names the file in errors.

    Raises:
        UserError: names the line of what is not valid YAML, or not allowed here.
    """
    try:
        reader = _Reader(yaml.SafeLoader(text), where)
        return reader.document()
    except yaml.MarkedYAMLError as error:
        mark, problem = error.problem_mark or error.context_mark, error.problem or error.context
        at = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        raise UserError(f"{where} is not valid YAML: {at}{brief(problem, str)}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(
            f"{where} is not valid YAML: line {line}: the character U+{error.character:04X} is not allowed there"
        ) from None


@dataclass
class _Open:
    """A list or mapping whose end has not been read."""

    value: list[Any] | dict[str, Any]
    anchor: str | None
    first: int  # number of values read before it
    lines: dict[str, int] = field(default_factory=dict)  # a mapping's key -> its line
    key: Any = None  # of the value that follows
    keyed: bool = False  # a key was read, its value not yet
    merged: list[dict[str, Any]] = field(default_factory=list)  # of the key <<


_MERGE_KEY = object()


class _Reader:
    """Builds the value from the parser's events, without recursion."""

    def __init__(self, loader: yaml.SafeLoader, where: str) -> None:
        self.loader, self.where = loader, where
        self.count = 0
        self.open: list[_Open] = []
        self.anchors: dict[str, tuple[Any, int]] = {}  # anchor -> (value, the number of values in it)
        self.unfinished = object()

    def document(self) -> Any:
        value, documents = None, 0
        while not isinstance(event := self.event(), yaml.StreamEndEvent):
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise self.error(event, "a second document begins; give one")
            elif isinstance(event, yaml.SequenceStartEvent | yaml.MappingStartEvent):
                self.begin(event)
            elif isinstance(event, yaml.SequenceEndEvent | yaml.MappingEndEvent):
                value = self.end(event)
            elif isinstance(event, yaml.ScalarEvent):
                value = self.scalar(event)
                self.remember(event.anchor, value, 1)
                self.add(event, value)
            elif isinstance(event, yaml.AliasEvent):
                value = self.alias(event)
        return value

    def event(self) -> yaml.Event:
        try:
            return self.loader.get_event()
        except (ValueError, OverflowError):  # yaml's scanner: an escape like "\\UFFFFFFFF", a version of 5,000 digits
            line = self.loader.line + 1
            raise UserError(f"{self.where} is not valid YAML: line {line}: no such character or version") from None

    def begin(self, event: yaml.CollectionStartEvent) -> None:
        made: type = dict if isinstance(event, yaml.MappingStartEvent) else list
        if event.tag not in (None, "!", _TAG + {dict: "map", list: "seq"}[made]):
            raise self.error(event, f"the tag {brief(event.tag)} is not allowed in options")
        if len(self.open) == DEEPEST:
            raise self.error(event, f"more than {DEEPEST} lists and mappings inside each other")
        if self.open and isinstance(self.open[-1].value, dict) and not self.open[-1].keyed:
            raise self.error(event, f"a key is {'a list' if made is list else 'a mapping'}; keys are text")
        self.remember(event.anchor, self.unfinished, 0)
        self.open.append(_Open(made(), event.anchor, self.count))

    def end(self, event: yaml.CollectionEndEvent) -> Any:
        done = self.open.pop()
        if isinstance(done.value, dict):
            for base in done.merged:  # the mapping's own keys win, then those of the first in the list
                for key, value in base.items():
                    done.value.setdefault(key, value)
        self.remember(done.anchor, done.value, self.count - done.first + 1)
        self.add(event, done.value)
        return done.value

    def alias(self, event: yaml.AliasEvent) -> Any:
        if event.anchor not in self.anchors:
            raise self.error(event, f"*{brief(event.anchor, str)} has no anchor before it")
        value, size = self.anchors[event.anchor]
        if value is self.unfinished:
            raise self.error(event, f"*{brief(event.anchor, str)} stands inside what it names")
        self.count += size - 1  # and 1 in `add`
        self.add(event, value)
        return value

    def remember(self, anchor: str | None, value: Any, size: int) -> None:
        if anchor is not None:
            self.anchors[anchor] = (value, size)

    def add(self, event: yaml.Event, value: Any) -> None:
        """Puts a finished value, or a key, into the list or mapping around it."""
        self.count += 1
        if self.count > MOST_VALUES:
            raise self.error(event, f"more than {MOST_VALUES:,} values; options have far fewer")
        if not self.open:
            return
        around = self.open[-1]
        if isinstance(around.value, list):
            around.value.append(value)
        elif not around.keyed:
            around.key, around.keyed = self.key(event, value, around), True
        else:
            around.keyed = False
            if around.key is _MERGE_KEY:
                around.merged += self.bases(event, value)
            else:
                around.value[around.key] = value

    def key(self, event: yaml.Event, value: Any, around: _Open) -> Any:
        if isinstance(event, yaml.ScalarEvent) and self.tag(event) == _MERGE:
            return _MERGE_KEY
        if not isinstance(value, str):
            shown = event.value if isinstance(event, yaml.ScalarEvent) else value
            raise self.error(event, f"the key {brief(shown or 'null', str)} is not text; put it in quotes")
        line = event.start_mark.line + 1
        if value in around.lines:
            raise self.error(event, f"{brief(value, str)} is given twice, first in line {around.lines[value]}")
        around.lines[value] = line
        return value

    def bases(self, event: yaml.Event, value: Any) -> list[dict[str, Any]]:
        found = value if isinstance(value, list) else [value]
        if not all(isinstance(base, dict) for base in found):
            raise self.error(event, "<< takes a mapping or a list of mappings")
        return found

    def tag(self, event: yaml.ScalarEvent) -> str:
        if event.tag in (None, "!"):
            implicit = event.implicit if event.tag is None else (False, True)
            return self.loader.resolve(yaml.ScalarNode, event.value, implicit)
        return event.tag

    def scalar(self, event: yaml.ScalarEvent) -> Any:
        tag, text = self.tag(event), event.value
        if (tag in _TEXTS and event.tag is None) or tag == _MERGE:
            return text
        if tag not in _SCALARS:
            raise self.error(event, f"the tag {brief(tag.replace(_TAG, '!!'), str)} is not allowed in options")
        if tag == _STR:
            if found := _UNUSABLE.search(text):
                raise self.error(event, f"a text holds the character U+{ord(found[0]):04X}, which is not allowed")
            return text
        if tag != self.loader.resolve(yaml.ScalarNode, text, (True, False)):
            raise self.error(event, f"{brief(text)} is not {_NAMES[tag]}; leave its tag out")
        if tag == _INT:
            return self.integer(event)
        if tag == _FLOAT and ":" in text:
            raise self.error(event, f"{brief(text)} would be read as minutes and seconds; put text in quotes")
        node = yaml.ScalarNode(tag, text, event.start_mark, event.end_mark, event.style)
        return self.loader.construct_object(node)

    def integer(self, event: yaml.ScalarEvent) -> int:
        text = event.value
        if not _DECIMAL.fullmatch(text):
            raise self.error(
                event,
                f"{brief(text)} would be read as a binary, octal or hexadecimal number or as minutes and seconds; "
                "write a decimal number without leading zeros, or put text in quotes",
            )
        digits = text.replace("_", "")
        if len(digits) > 21 or abs(int(digits)) >= LARGEST_INTEGER:
            raise self.error(event, f"the number {brief(text, str)} is too large")
        return int(digits)

    def error(self, event: yaml.Event, problem: str) -> UserError:
        return UserError(f"{self.where}: line {event.start_mark.line + 1}: {problem}")
