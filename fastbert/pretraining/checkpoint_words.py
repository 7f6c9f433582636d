"""The list of `--checkpoint-words`, such as 500k,1M,2M,...,10M."""

import re
from decimal import Decimal

UNITS = {"M": 10**6, "k": 10**3, "": 1}
MOST = 1000  # exports of a run
FORM = "must be ascending numbers of words such as 500k,1M,2M,...,10M (... continues the last two up to the next)"


def parse_counts(text: str) -> list[int]:
    """The numbers of words in a list.

    Raises:
        ValueError: it has another form, does not ascend, or has more than MOST numbers.
    """
    counts: list[int] = []
    gap = None  # between the two numbers before "..."
    for part in map(str.strip, text.split(",")):
        if part == "..." and len(counts) > 1 and gap is None:
            gap = counts[-1] - counts[-2]
            continue
        count = _count(part)
        if counts and (count <= counts[-1] or (gap and (count - counts[-1]) % gap)):
            raise ValueError(FORM)
        counts += range(counts[-1] + gap, count, gap)[: MOST + 1] if gap else ()
        counts.append(count)
        gap = None
        if len(counts) > MOST:
            raise ValueError(f"must be at most {MOST:,} numbers")
    if gap is not None:
        raise ValueError(FORM)
    return counts


def _count(text: str) -> int:
    found = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,6})?)([kM]?)", text)
    count = Decimal(found[1]) * UNITS[found[2]] if found else Decimal(0)
    if count <= 0 or count % 1:
        raise ValueError(FORM)
    return int(count)


def short_count(count: int) -> str:
    """A number of words as BabyLM writes it: 1M, 1.5M, 500k."""
    unit = next(unit for unit, size in UNITS.items() if count >= size)
    return f"{(Decimal(count) / UNITS[unit]).normalize():f}{unit}"
