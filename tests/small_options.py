"""A job's options with every form a field can have, for the tests of YAML and flags."""

from dataclasses import dataclass, field

from fastbert import config


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
    inner: Inner = field(default_factory=Inner)
    lifted: Lifted = field(default_factory=Lifted, metadata=config.FLAT)
    speed: Inner = field(default_factory=Inner, metadata=config.MACHINE)
    long_name: str = "long"
    """Its name has two words."""


def write(tmp_path, text: str) -> str:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    return str(path)
