"""Configuration of a fastbert encoder for transformers. Options that BERT has too are named as in BERT.

This file and modeling_fastbert.py are part of an exported model; they need only torch and transformers.
"""

from transformers import PretrainedConfig

DEFAULTS = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "classifier_dropout": None,
    "layer_norm_eps": 1e-12,
    "initializer_range": 0.02,
    "position": "absolute",
    "cls_attention": "untied",
    "norm": "post",
    "relative_buckets": 32,
    "relative_max_distance": 128,
    "feed_forward": "gelu",
    "bias": True,
    "rope_base": 10000.0,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}
CHOICES = {"cls_attention": ("untied", "tied"), "norm": ("post", "pre"), "feed_forward": ("gelu", "geglu")}

AT_LEAST_ONE = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
AT_LEAST_ONE += ("max_position_embeddings", "relative_buckets", "relative_max_distance")
FRACTIONS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")


class FastBertConfig(PretrainedConfig):
    """Configuration of a `FastBertModel`: the keys of DEFAULTS, and those that all configurations have.

    Args:
        position: name of the position encoding, whose code is in modeling_fastbert.py.
        cls_attention: with TUPE, untied gives [CLS] two learned attention values, tied treats it as a word.
        norm: LayerNorm after each residual sum (post, as BERT) or before each sublayer (pre).
        relative_buckets: number of buckets of relative distances, both directions together.
        relative_max_distance: distance from which on all distances have the same bucket.
        type_vocab_size: number of token types (segments); 0 for an encoder without them.
        feed_forward: gelu (BERT) or geglu (arXiv 2002.05202), with inner width `intermediate_size`.
        bias: true if linear layers and LayerNorms have biases; the outputs of heads always have them.
        rope_base: with rope, base of its wavelengths.

    The position encoding reads fastbert's names of these options: `width`, `heads`, `max_positions`, ...

    Raises:
        ValueError: a value is impossible (`check`).
    """

    model_type = "fastbert"
    attribute_map = {  # noqa: RUF012
        "layers": "num_hidden_layers",
        "width": "hidden_size",
        "heads": "num_attention_heads",
        "ffn": "intermediate_size",
        "max_positions": "max_position_embeddings",
        "dropout": "hidden_dropout_prob",
        "attention_dropout": "attention_probs_dropout_prob",
        "norm_eps": "layer_norm_eps",
        "initializer_std": "initializer_range",
    }

    def __init__(self, **kwargs):
        values = {name: kwargs.pop(name, default) for name, default in DEFAULTS.items()}
        super().__init__(**kwargs)
        for name, value in values.items():
            setattr(self, name, value)
        self.check()

    def check(self):
        """Raises a ValueError if a value is impossible; the message names it."""
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        for name in (*AT_LEAST_ONE, "type_vocab_size"):
            value, least = getattr(self, name), int(name in AT_LEAST_ONE)
            if type(value) is not int or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}")
        for name in FRACTIONS:
            value = getattr(self, name)
            if not (value is None and name == "classifier_dropout") and not 0 <= value <= 1:
                raise ValueError(f"{name} must be between 0 and 1, not {value!r}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads {self.num_attention_heads}"
            )

    @property
    def head_size(self):
        return self.hidden_size // self.num_attention_heads
