"""The command line: values, defaults, errors and help, of a small dataclass and of every job."""

from dataclasses import dataclass, field

import pytest

from fastbert import config
from fastbert.errors import UserError
from fastbert.flags import parse


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    """A rate."""


@dataclass(frozen=True)
class Lifted:
    layers: int | None = None
    """Layers."""
    fast: bool = False
    """A switch."""


@dataclass(frozen=True)
class Outer:
    """A job."""

    name: str = "x"
    """A name."""
    long_name: str = "long"
    """Its name has two words."""
    inner: Inner = field(default_factory=Inner)
    lifted: Lifted = field(default_factory=Lifted, metadata=config.FLAT)
    speed: Inner = field(default_factory=Inner, metadata=config.MACHINE)


def write(tmp_path, text: str) -> str:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    return str(path)


def test_yaml_then_flags(tmp_path) -> None:
    path = write(tmp_path, "name: y\nlayers: 3\ninner:\n  rate: 1e-3\n")
    assert parse(Outer, [], "job", config.load_yaml(Outer, path)) == Outer("y", Inner(1e-3), Lifted(3))
    flags = ["--layers", "5", "--inner.rate", "0.5", "--fast"]
    assert parse(Outer, flags, "job", config.load_yaml(Outer, path)) == Outer("y", Inner(0.5), Lifted(5, True))
    assert parse(Outer, [], "job") == Outer()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--name", "a", "--name", "b"], "--name is given twice"),
        (["--name=a", "--name", "a"], "--name is given twice"),
        (["--inner.rate", "1", "--layers", "2", "--inner.rate=1"], "--inner.rate is given twice"),
        (["--fast", "--no-fast"], "--fast with --no-fast"),
        (["--long_name", "x", "--long-name=y"], "--long-name is given twice"),
    ],
)
def test_a_flag_given_twice_is_refused(flags, message) -> None:
    with pytest.raises(UserError, match=message):
        parse(Outer, flags, "job")


def test_values_are_no_flags() -> None:
    """Nor are flags of other groups that end alike."""
    assert parse(Outer, ["--name", "name", "--layers", "-1"], "job") == Outer("name", lifted=Lifted(-1))
    flags = ["--inner.rate", "1", "--speed.rate", "1", "--name", "--name=x".removeprefix("--")]
    assert parse(Outer, flags, "job") == Outer("name=x", Inner(1.0), speed=Inner(1.0))
