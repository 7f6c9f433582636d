"""What values an option can have: compared with the declarations of a small job, as flags, in YAML and in Python."""

from dataclasses import dataclass, field
from typing import Annotated

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert import config
from fastbert.errors import OptionError, UserError
from fastbert.flags import parse
from fastbert.ranges import LARGEST, Count, NotNegative, Positive, Range, Rate, Seed, check_values


@dataclass(frozen=True)
class Group:
    rate: Rate = 0.1
    """A rate."""
    size: Positive | None = None
    """A size."""

    def __post_init__(self) -> None:
        check_values(self)


@dataclass(frozen=True)
class Job:
    """A job."""

    steps: Count = 1
    """Steps."""
    most_words: int | None = None
    """A number without a range."""
    name: str = "x"
    """A name."""
    files: tuple[str, ...] = ()
    """Names."""
    seed: Seed = 0
    """A seed."""
    weight: NotNegative = 0.0
    """A weight."""
    fast: bool = False
    """A switch."""
    group: Group = field(default_factory=Group)
    flat: Group = field(default_factory=Group, metadata=config.FLAT)

    def __post_init__(self) -> None:
        check_values(self)


REFUSED = [  # flag, text, the end of the message
    ("steps", "0", "must be at least 1, not 0"),
    ("steps", "-3", "must be at least 1, not -3"),
    ("steps", str(10**30), f"must be at most 2,147,483,647, not {10**30}"),
    ("most-words", str(-(2**31)), f"must be at least -2,147,483,647, not {-(2**31)}"),
    ("seed", "-1", "must be at least 0, not -1"),
    ("seed", str(2**64), f"must be at most 9,223,372,036,854,775,807, not {2**64}"),
    ("weight", "-0.5", "must be at least 0, not -0.5"),
    ("weight", "5e-324", "must be 0 or between 1e-30 and 1e+30, not 5e-324"),
    ("weight", "1e308", "must be 0 or between 1e-30 and 1e+30, not 1e+308"),
    ("weight", "-0.0", "must not be -0.0; write 0"),
    ("group.rate", "1", "must be in [0, 1), not 1.0"),
    ("group.size", "0", "must be greater than 0, not 0.0"),
    ("name", "", "is empty; give a value, or leave the option out"),
    ("name", "  ", "is empty; give a value, or leave the option out"),
    ("name", "a\nb", "contains a line break or another control character: 'a\\nb'"),
    ("name", "a\0b", "contains a zero byte: 'a\\x00b'"),
    ("name", "\udcff", "is not UTF-8 text: '\\udcff'"),
    ("name", "a\u2028b", "contains a line break or another control character: 'a\\u2028b'"),
    ("name", "x" * 256, f"contains a name that is too long, of more than 255 bytes: '{'x' * 199}..."),
    ("name", "x" * 5000, "has 5,000 characters, more than 4,096"),
]
ONLY_IN_FILES = [
    ("weight", "nan", "must be a finite number, not nan"),
    ("weight", "1e400", "must be a finite number, not inf"),
    ("group.rate", "-inf", "must be a finite number, not -inf"),
]
ONLY_AS_FLAGS = [
    ("weight", "nan", "must be a finite number, not 'nan'"),
    ("weight", "1e400", "must be a finite number, not '1e400'"),
    ("rate", "-inf", "must be a finite number, not '-inf'"),
    ("steps", "1.5", "must be a whole number, not '1.5'"),
    ("steps", "1_000", "must be a whole number, not '1_000'"),
    ("seed", "1e18", "must be a whole number, not '1e18'"),  # beyond what a fraction holds exactly
    ("steps", "", "must be a whole number, not ''"),
    ("steps", "none", "must be a whole number, not 'none'"),
    ("steps", "None", "must be a whole number, not 'None'"),
    ("steps", " 5", "must be a whole number, not ' 5'"),
    ("steps", "\u0661", "must be a whole number, not '\u0661'"),  # ARABIC-INDIC DIGIT ONE
    ("steps", "9" * 5000, "must be a whole number, not '999"),
    ("weight", "1_0", "must be a finite number, not '1_0'"),
    ("files", "", "is empty; give a value, or leave the option out"),
]


@pytest.mark.parametrize(("flag", "text", "problem"), REFUSED + ONLY_AS_FLAGS)
def test_a_flag_that_does_not_fit(flag: str, text: str, problem: str) -> None:
    for arguments in ([f"--{flag}={text}"], [f"--{flag}", text], [f"--{flag.replace('-', '_')}", text]):
        with pytest.raises(UserError) as error:
            parse(Job, arguments, "job")
        assert str(error.value).startswith(f"--{flag} {problem}")


@pytest.mark.parametrize("separator", [",", "/"])
def test_each_name_of_a_list_or_a_path_may_be_long(separator: str) -> None:
    text = separator.join(["x" * 200] * 3)
    assert parse(Job, ["--name", text], "job").name == text


@pytest.mark.parametrize(("flag", "text", "problem"), REFUSED + ONLY_IN_FILES)
def test_a_value_in_a_file_that_does_not_fit(flag: str, text: str, problem: str) -> None:
    group, _, name = flag.replace("-", "_").rpartition(".")
    value = text if name == "name" else float(text) if name in ("weight", "rate", "size") else int(text)
    given = {group: {name: value}} if group else {name: value}
    with pytest.raises(UserError) as error:
        config.from_dict(Job, given, "x.yaml")
    assert str(error.value) == f"x.yaml: {f'{group}: ' if group else ''}{name} {problem}"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": True}, "steps must be a whole number, found true or false (True)"),
        ({"steps": 2.0**60}, "steps must be a whole number, found a number (1.152921504606847e+18)"),
        ({"steps": None}, "steps must be a whole number, found nothing"),
        ({"steps": 2**100_000}, "steps must be at most 2,147,483,647, not a whole number of 100,001 bits"),
        ({"weight": 10**400}, "weight must be a number, found a whole number (1000"),
        ({"most-words": 1, "most_words": 2}, "most_words is given twice, with - and with _"),
        ({"group": {"ra-te": 1, "ra_te": 2}}, "group: ra_te is given twice, with - and with _"),
    ],
)
def test_values_of_other_types(values: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        config.from_dict(Job, values, "x.yaml")
    assert str(error.value).startswith(f"x.yaml: {message}")


def test_a_value_given_in_python_is_checked_too() -> None:
    with pytest.raises(OptionError, match=r"^steps must be at least 1, not 0$"):
        Job(steps=0)


def test_flags_without_a_value() -> None:
    for arguments in (["--steps"], ["--steps", "--name", "x"]):
        with pytest.raises(UserError, match=r"^--steps: a value is missing"):
            parse(Job, arguments, "job")


def test_what_fits() -> None:
    flags = [
        "--steps",
        "1e3",
        "--most-words",
        "None",
        "--files",
        "a",
        "b",
        "--fast",
        "--rate",
        ".5",
        "--group.size=2",
    ]
    expected = Job(steps=1000, files=("a", "b"), fast=True, flat=Group(0.5), group=Group(size=2.0))
    assert parse(Job, flags, "job") == expected
    assert config.from_dict(Job, {"steps": "1e3", "weight": 2, "seed": 2**63 - 1}, "x") == Job(
        1000, None, weight=2.0, seed=2**63 - 1
    )


@settings(max_examples=200, derandomize=True)
@given(
    st.floats(-4, 4) | st.integers(-4, 4),
    st.sampled_from([None, -1, 0, 1]),
    st.sampled_from([None, 2, 3]),
    st.booleans(),
    st.booleans(),
)
def test_an_interval_is_that_of_its_message(value, low, high, opened, closed) -> None:
    bounds = {"above" if opened else "least": low, "most" if closed else "below": high}
    found = Range(**bounds).problem(value)
    inside = (low is None or value > low or (value == low and not opened)) and (
        high is None or value < high or (value == high and closed)
    )
    small = isinstance(value, float) and ((0 < abs(value) < 1e-30 and high is None) or str(value) == "-0.0")
    assert (found is None) == (inside and not small)
    if not inside:
        violated = [bound for bound in (low, high) if bound is not None and str(bound) in found]
        assert any(value <= bound if bound is low else value >= bound for bound in violated)


def test_ranges_within_unions() -> None:
    @dataclass(frozen=True)
    class Each:
        a: Count | None = None
        b: Annotated[int | None, Range(1)] = None
        c: Annotated[int | None, Range(1, LARGEST**2)] = None

    for name in "abc":
        with pytest.raises(OptionError, match=f"^{name} must .* 0"):
            check_values(Each(**{name: 0}))
    check_values(Each(c=LARGEST + 1))
