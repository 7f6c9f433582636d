"""Recognition of the encoding of a file that is not UTF-8, for the error message, which explains the conversion.

UTF-16 is recognized by its byte order mark or zero bytes. An older encoding is recognized by its letters: each
candidate decodes the text, and the one with the most likely characters and neighbors is chosen. On short texts this is
correct far more often than charset-normalizer.
"""

import codecs
import math
import re
import shlex
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from fastbert.alphabets import (
    ANOTHER,
    ASCII_LETTERS,
    BROKEN,
    ENCODINGS,
    JOINING,
    RARE,
    SYMBOL,
    UTF8,
    WORDS,
    Encoding,
    Language,
)

EXAMINED = 2**16  # bytes from the line of the first invalid byte
MOST_BYTES = 1000  # non-ASCII bytes used to recognize an older encoding
FEW = 3  # this many non-ASCII characters, or lines with such characters, are not valid UTF-8 by chance
UNLIKELY = -6.0  # no encoding is reported if the mean log-likelihood of such a byte is lower
UNUSUAL_RATIO = -4.0  # for few Cyrillic letters among many ASCII letters, or a word of accented letters only
LONGEST_SAMPLE = 40  # characters of the text that a message shows

_CONTINUED = rb"[\x80-\xbf]"
_MULTIBYTE = re.compile(  # the characters of UTF-8 outside ASCII
    rb"[\xc2-\xdf]%b|\xe0[\xa0-\xbf]%b|\xed[\x80-\x9f]%b|[\xe1-\xec\xee\xef]%b{2}|\xf0[\x90-\xbf]%b{2}"
    rb"|[\xf1-\xf3]%b{3}|\xf4[\x80-\x8f]%b{2}" % ((_CONTINUED,) * 7)
)
_SURROGATE = re.compile(rb"\xed[\xa0-\xbf]" + _CONTINUED)
_HIGH = re.compile(rb"[\x80-\xff]")
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")
_ASCII_LETTER = re.compile(r"[A-Za-z]")
_PRINTABLE = re.compile(rb"[\t\n\r -~]")
_OUTSIDE_ASCII = re.compile(r"[^\x00-\x7f]")
_MARKS = (  # longer marks first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "UTF-32", "utf-32-le"),
    (codecs.BOM_UTF32_BE, "UTF-32", "utf-32-be"),
    (codecs.BOM_UTF16_LE, "UTF-16", "utf-16-le"),
    (codecs.BOM_UTF16_BE, "UTF-16", "utf-16-be"),
)
_DECOMPRESS = {".gz": "gzip", ".xz": "xz", ".zst": "zstd"}


@dataclass(frozen=True)
class Wide:
    """UTF-16 or UTF-32, with its name in iconv."""

    iconv: str
    codec: str
    mark: int
    """Bytes of its byte order mark."""


def explain(content: bytes, start: int, path: Path | str | None, earlier: int = 0) -> str:
    """Explains the encoding of `content`, whose byte `start` is not UTF-8, and how to convert the file, as the end of a
    sentence.

    Args:
        content: a part of a file, from the beginning of a line.
        path: the file, for the command that converts it; None if it is part of another file.
        earlier: number of non-ASCII characters, or of lines with such characters, that were valid UTF-8 before
            `content`.
    """
    if found := wide(content):
        text = content[found.mark : EXAMINED].decode(found.codec, "replace")
        return f"it is {found.iconv}, {_reads(text)}; {convert(found.iconv, path)}"
    begin = _line_start(content, start)
    earlier += len(_MULTIBYTE.findall(content, max(0, begin - EXAMINED), begin))
    content, start = content[begin : begin + EXAMINED], start - begin
    if is_binary(content):
        return "it is binary, not text; give UTF-8 text"
    if broken := _broken(content, start, path, earlier):
        return broken
    encoding = older(content)
    if encoding is UTF8:
        return _damaged(path)
    if encoding is None:
        return (
            f"its encoding was not recognized; {convert('ENCODING', path)}, with the encoding in which it was written"
        )
    text = content.decode(encoding.codec, "replace")
    if earlier >= FEW:
        return f"it is UTF-8 before and probably {encoding.title} from there, {_reads(text)}; convert only that part"
    return f"it is probably {encoding.title}, {_reads(text)}; {convert(encoding.iconv, path)}"


def convert(iconv: str, path: Path | str | None, flags: str = "") -> str:
    """Command that converts the file to UTF-8, in a new file next to it."""
    command = f"iconv {flags}-f {iconv} -t UTF-8"
    if path is None:
        return f"convert it with: {command}"
    source = Path(path)
    target = source
    if unpack := _DECOMPRESS.get(source.suffix):
        target = source.with_suffix("")
        command = f"{unpack} -dc {_quoted(source)} | {command}"
    else:
        command = f"{command} {_quoted(source)}"
    return f"convert it with: {command} > {_quoted(target.with_name(f'{target.stem}.utf8{target.suffix}'))}"


def wide(content: bytes) -> Wide | None:
    """UTF-16 or UTF-32, recognized by a byte order mark or by its zero bytes; None for anything else.

    Args:
        content: beginning of a file, of which EXAMINED bytes are used.
    """
    content = content[:EXAMINED]
    for mark, name, codec in _MARKS:
        if content.startswith(mark) and _usual(content[len(mark) :], codec) is not None:
            return Wide(name, codec, len(mark))
    zeros, printable = content.count(b"\0"), len(_PRINTABLE.findall(content))
    if not zeros or (zeros < len(content) / 5 and printable > 0.9 * (len(content) - zeros)):
        return None  # no zero bytes, or a few in ASCII text
    for name in ("UTF-32LE", "UTF-32BE"):
        if _usual(content, name):
            return Wide(name, name, 0)
    usual, name = max((_usual(content, name) or 0, name) for name in ("UTF-16LE", "UTF-16BE"))
    return Wide(name, name, 0) if usual > len(content) / 400 else None


def is_binary(content: bytes) -> bool:
    """Returns True if there is a zero byte, or more control characters than in text."""
    return b"\0" in content or len(_CONTROL.findall(content)) > len(content) / 50


# --- damaged UTF-8


def _broken(content: bytes, start: int, path: Path | str | None, earlier: int) -> str | None:
    """Explanation, as the end of a sentence, if `content` is UTF-8 except for a few bytes; otherwise None."""
    if _SURROGATE.match(content, start):
        return (
            "it is UTF-8 except for surrogates, the halves of a character (CESU-8, as written by Java and several "
            "databases); write it again as UTF-8"
        )
    right = len(_MULTIBYTE.findall(content))
    wrong = len(_HIGH.findall(_MULTIBYTE.sub(b"", content)))
    if wrong < 4 and right + earlier and _is_cut(content[start:]):
        return "it is UTF-8 that ends within a character, so it was cut off; fetch it again"
    if right + earlier < FEW or right + (earlier and 4) < 4 * wrong:
        return None
    return _damaged(path)


def _damaged(path: Path | str | None) -> str:
    command = convert("UTF-8", path, "-c ").removeprefix("convert it with: ")
    return f"it is UTF-8 with damaged bytes; fetch it again, or drop them with: {command}"


def _is_cut(end: bytes) -> bool:
    """Returns True if `end` is the beginning of a single UTF-8 character."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(end)
    except UnicodeDecodeError:
        return False
    return len(end) < 4


# --- UTF-16 and UTF-32


def _usual(content: bytes, codec: str) -> int | None:
    """Number of spaces, line ends, stops and similar characters if `content` is text in `codec`, otherwise None."""
    size = 4 if "32" in codec.lower() else 2
    try:
        text = content[: len(content) // size * size].decode(codec)
    except UnicodeDecodeError as error:
        if size == 4 or error.start < len(content) - 4:
            return None
        text = content[: error.start].decode(codec)  # cut within a pair of surrogates
    if sum(map(_is_odd, text)) > len(text) / 200:
        return None
    return sum(text.count(c) for c in " \r\n\t,.:\"'{}、。，は的")


def _is_odd(character: str) -> bool:
    """Returns True for a character that does not occur in text: control, private, unassigned, or a surrogate."""
    return unicodedata.category(character) in ("Cc", "Cn", "Co", "Cs") and character not in "\t\n\r\f\x85"


# --- older encodings


def older(content: bytes) -> Encoding | None:
    """The most likely encoding of `content` with one or two bytes per character; the first of several equally likely
    ones."""
    high = [match.end() for match, _ in zip(_HIGH.finditer(content), range(MOST_BYTES), strict=False)]
    if len(high) == MOST_BYTES:
        content = content[: high[-1]]
    scored = [(_score(content, encoding), -number) for number, encoding in enumerate(ENCODINGS)]
    score, number = max(scored)
    return ENCODINGS[-number] if high and score > UNLIKELY * (len(high) + 1) else None


def _score(content: bytes, encoding: Encoding) -> float:
    """The log-likelihood of the non-ASCII characters, and of their ratio to all letters, in the best language."""
    text = content.decode(encoding.codec, "replace")
    found = Counter(
        (text[max(0, match.start() - 1) : match.start()], match[0], text[match.end() : match.end() + 1])
        for match in _OUTSIDE_ASCII.finditer(text)
    )
    letters = sum(often for (_, c, _), often in found.items() if _is_letter(c))
    ratio = letters / max(1, letters + len(_ASCII_LETTER.findall(text)))
    return encoding.prior + max(
        (UNUSUAL_RATIO * (1 + min(letters, 3)) if (ratio > 0.5 if language.latin else ratio < 0.2) else 0.0)
        + sum(often * math.log(_likelihood(*near, language, encoding)) for near, often in found.items())
        for language in encoding.languages
    )


def _likelihood(before: str, character: str, after: str, language: Language, encoding: Encoding) -> float:
    """Frequency of `character`, times a factor for its neighbors."""
    likelihood = _frequency(character, language, encoding)
    follows, precedes = _is_letter(before), _is_letter(after)
    if not _is_letter(character):
        if follows and precedes and character not in JOINING:
            likelihood *= 0.01
        return likelihood
    foreign = (before in ASCII_LETTERS) + (after in ASCII_LETTERS)
    if not follows and not precedes and not language.each:
        return likelihood * (0.05 if character in WORDS else 0.005)
    if character.isupper() and before.islower():
        likelihood *= 0.01
    return likelihood if language.latin else likelihood * 0.05**foreign


def _is_letter(character: str) -> bool:
    return character.isalpha() or (not character.isascii() and unicodedata.category(character) in ("Mn", "Mc"))


def _frequency(character: str, language: Language, encoding: Encoding) -> float:
    if (listed := language.frequency.get(character)) is not None:
        return listed
    if character == "\ufffd" or _is_odd(character):
        return BROKEN
    if language.each:
        coded = character.encode(encoding.codec, "replace")
        first, last = encoding.lead or language.lead
        # GBK and CP949 have further, rarely used characters with a second byte below 0xA1.
        usual = len(coded) > 1 and first <= coded[0] <= last and (coded[1] >= 0xA1 or first != 0xB0)
        return language.each if usual else RARE
    if not character.isalpha():
        return SYMBOL
    return ANOTHER if language.latin == ("LATIN" in unicodedata.name(character, "")) else RARE


# --- for messages


def _line_start(content: bytes, start: int) -> int:
    """Index of the beginning of the line of byte `start`, or of its first non-ASCII byte if the line is long."""
    begin = content.rfind(b"\n", 0, start) + 1
    if start - begin <= EXAMINED // 4:
        return begin
    begin = start - EXAMINED // 4
    return next((match.start() for match in [_HIGH.search(content, begin)] if match), start)


def _reads(text: str) -> str:
    """Sample of the decoded line around the first non-ASCII character, for the user to compare."""
    first = match.start() if (match := _OUTSIDE_ASCII.search(text)) else 0
    begin = max(text.rfind("\n", 0, first) + 1, first - LONGEST_SAMPLE // 2)
    line = text[begin : begin + LONGEST_SAMPLE].split("\n")[0].strip()
    shown = "".join(c if c.isprintable() else " " for c in line)
    return f"in which it reads {shown!r}"


def _quoted(path: Path) -> str:
    name = str(path)
    return shlex.quote(f"./{name}" if name.startswith("-") else name)
