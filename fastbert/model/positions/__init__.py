"""Position schemes. A new one is one file with a subclass of `scheme.Scheme`, and one line here, which also names the
shared options that only some schemes read."""

from fastbert.registry import Registry

POSITIONS = Registry(
    {
        "absolute": "fastbert.model.positions.absolute:Absolute",
        "relative": "fastbert.model.positions.relative:Relative",
        "tupe-a": "fastbert.model.positions.tupe:TupeAbsolute",
        "tupe-r": "fastbert.model.positions.tupe:TupeRelative",
        "rope": "fastbert.model.positions.rotary:Rotary",
        "alibi": "fastbert.model.positions.alibi:Alibi",
    }
)
