"""Plain English: words that the project replaced by the field's terms do not come back, and a docstring of the code
begins with a noun or a verb."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("fastbert", "kernels", "scripts", "configs", "docs", "tests", ".")
SUFFIXES = (".py", ".md", ".yaml", ".sh")
REPLACED = {
    r"mend(s|ed|ing)?": "fix",
    r"beside": "compared with, next to",
    r"held against": "compared with",
    r"(go(es)?|going|went|gone) on": "continue, resume",
    r"(?<!not )shares?": "a fraction, a ratio; have in common, use the same",
    r"said|says|told|tells": "is reported, warns, prints, states",
    r"(so|as) many": "this many, the number of",
    r"one's own": "custom, your",
    r"turned|(in|by) turns|takes? turns": "rotated, alternating, converted",
    r"small network": "generator (ELECTRA), meta controller (MC-BERT)",
    r"(?<!in )(?<!in-)(?<!in_)(?<!take )(?<!takes )(?<!first )places?": "masked position, index, folder",
    r"draws?|drawn|drew|drawing": "sample, batch; plot",
    r"taken|kept|some": "selected, retained, used; a few, several, part of: the thing itself",
    r"rehears\w*": "dry run",
    r"mistakes?|faults?": "user error, internal error, bug",
    r"what it takes|what it ends with": "cost, resource usage; final value",
    r"without a word|in silence": "without a warning",
    r"dearer|dear": "more expensive",
    r"live board": "live status",
    r"on paper": "estimated",
    r"kinds? of (fault|error|problem)s?": "class",
}
OPENINGS = re.compile(
    "(Of|Those|As|That|Which|What|How|Whether|Where|When|While|Who|Whose|If|Unless|For|In|On|To|With|Without|By|From|At"
    "|Into|Until|Even|Also|Not|So|Such|Because|Since|Then|There|It|This|These|Its|Still|Else|Otherwise|Nothing)[^a-z]"
)


def text_files() -> list[Path]:
    found = []
    for folder in FOLDERS:
        paths = (ROOT / folder).iterdir() if folder == "." else (ROOT / folder).rglob("*")
        found += [path for path in paths if path.suffix in SUFFIXES and path != Path(__file__) and path.is_file()]
    return sorted(found)


def matches(pattern: str, text: str) -> bool:
    """Whether the text has one of the words, also as a part of a name with underscores."""
    return re.search(rf"(?<![A-Za-z])({pattern})(?![A-Za-z])", text, re.IGNORECASE) is not None


@pytest.mark.parametrize("pattern", REPLACED)
def test_no_replaced_word_is_used(pattern: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}"
        for path in text_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if matches(pattern, line)
    ]
    assert not found, f"write {REPLACED[pattern]} instead:\n" + "\n".join(found)


def test_the_words_are_found() -> None:
    texts = (
        "mended;Beside it;held against;goes on;a_share;is told;so many;one's own;in turns;small network;places;drawn"
    )
    texts += ";kept_rows;rehearsal;a fault;what it takes;without a word;dearer;live board;on paper;kind of error"
    assert {next((i for i, p in enumerate(REPLACED) if matches(p, text)), None) for text in texts.split(";")} == {
        *range(21)
    }
    harmless = ("shared", "in place", "placed", "default", "reckon", "handsome", "drawback", "add-on", "TensorBoard")
    assert not [text for text in harmless if any(matches(pattern, text) for pattern in REPLACED)]


def test_docstrings_begin_with_a_noun_or_a_verb() -> None:
    found = []
    for folder in ("fastbert", "kernels", "scripts"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                text = node.value.value if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) else None
                if isinstance(text, str) and OPENINGS.match(text.strip()):
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {text.strip()[:80]}")
    assert not found, "begin with a noun or a verb:\n" + "\n".join(found)
