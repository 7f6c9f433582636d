"""Modules with the weights of a pretrained model."""

from fastbert.finetuning.model import encoder_weights
from fastbert.hub.load import Pretrained
from fastbert.model.encoder import Encoder
from fastbert.model.heads import MLMHead


def build_encoder(pretrained: Pretrained) -> tuple[Encoder, MLMHead | None]:
    """The encoder in float32, and the MLM head if there is one, tied to it."""
    encoder = Encoder(pretrained.config)
    encoder.load_state_dict(encoder_weights(pretrained))
    if not pretrained.has_head:
        return encoder, None
    head = MLMHead(pretrained.config, encoder.words)
    weights = pretrained.weights.items()
    head.load_state_dict({name.removeprefix("head."): tensor for name, tensor in weights if name.startswith("head.")})
    return encoder, head
