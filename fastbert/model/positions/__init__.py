"""Position schemes. A new one is one file and one line here.

A scheme is a `Scheme` built from an `EncoderConfig`, with

    score_scale                     what q k^T is multiplied by
    embed(length, position_ids)     [1 or B, T, D] added to the word embeddings, or None
    bias(length, position_ids)      [1 or B, H, T, T] added to the scaled scores of every layer, or None
    rotation(length, position_ids)  what queries and keys of every layer are turned by, or None
    parameters_of(config)           closed forms; FLOPs of one forward pass, a multiply and an add counted as two
    flops(config, length)

`position_ids` is an integer [B, T], or None for 0 to T - 1 in every row; position 0 belongs to [CLS] alone.
"""

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
