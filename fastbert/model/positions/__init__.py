"""Position encodings. A new one is one file with a subclass of `encoding.PositionEncoding`, and one line here, which
also names the shared options that only these encodings use."""

from fastbert.registry import Registry, Variant

POSITIONS = Registry(
    {
        "absolute": "fastbert.model.positions.absolute:Absolute",
        "relative": "fastbert.model.positions.relative:Relative",
        "tupe-a": Variant("fastbert.model.positions.tupe:TupeAbsolute", uses=("cls_attention",)),
        "tupe-r": Variant("fastbert.model.positions.tupe:TupeRelative", uses=("cls_attention",)),
        "rope": Variant("fastbert.model.positions.rotary:Rotary", uses=("rope_base",)),
        "alibi": "fastbert.model.positions.alibi:Alibi",
    }
)
