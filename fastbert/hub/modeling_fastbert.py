"""fastbert's encoder for transformers in one file, from the word embeddings to the heads.

The model is BERT (arXiv 1810.04805) except for the position encoding, whose source is part of this file in an export,
and three options: the position of LayerNorms (`norm`), the feed-forward layers (`feed_forward`), and biases (`bias`).
Weights have the same names as in pretraining.

Shapes: B batch, T tokens, D width, H heads, K head size, V vocabulary, L labels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils import can_return_tuple, logging

from .configuration_fastbert import FastBertConfig
from .positions_fastbert import POSITION_NAME, Position, rotate

logger = logging.get_logger(__name__)

# Added to the attention scores of padding. Its exponential is 0 in every floating-point type. Unlike the minimum of
# float32 it stays finite when autocast casts it to float16, so a row of nothing but padding gives no NaN.
PADDING_SCORE = -3e4


def layer_norm(config):
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=config.bias)


def with_mask(bias, attention_mask):
    """Adds a mask, as in `FastBertModel.forward`, to the bias of the attention scores."""
    if attention_mask.dim() == 2:
        return bias.masked_fill((attention_mask == 0)[:, None, None, :], PADDING_SCORE)
    if attention_mask.dim() == 4 and attention_mask.dtype == torch.bool:
        return bias.masked_fill(~attention_mask, PADDING_SCORE)
    if attention_mask.dim() == 4 and attention_mask.is_floating_point():
        return bias + attention_mask
    raise ValueError(
        f"an attention_mask of shape {list(attention_mask.shape)} and {attention_mask.dtype}: give [rows, tokens], or "
        "[rows, 1 or heads, tokens, tokens], either bool (true: attended) or floating-point (added to the scores)"
    )


# ---------------------------------------------------------------------------------------------------------------------
# The encoder: blocks of attention and feed-forward layers.


class FastBertAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config  # has the attention implementation, which `set_attn_implementation` may change
        self.heads, self.dropout_p = config.num_attention_heads, config.attention_probs_dropout_prob
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.bias)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)

    def forward(self, x, scale, bias, rotation):
        """Computes softmax(scale q k^T + bias) v for x [B, T, D] and bias [1 or B, 1 or H, 1 or T, T] or None.

        Returns:
            [B, T, D]; the softmax [B, H, T, T] if the attention implementation is "eager", else None.
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, H, T, K]
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        mask = None if bias is None else bias.to(q.dtype).expand(-1, -1, x.shape[1], -1)
        dropout_p = self.dropout_p if self.training else 0.0
        if self.config._attn_implementation == "eager":
            scores = scale * (q @ k.transpose(-1, -2))
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout_p)
            context = weights @ v
        else:
            weights = None
            context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=scale)
        return self.out(context.transpose(1, 2).flatten(2)), weights


class FastBertFeedForward(nn.Module):
    """gelu(x W) W2, or geglu: (gelu(x W) * x V) W2, with W and V in one matrix (arXiv 2002.05202)."""

    def __init__(self, config):
        super().__init__()
        self.gated = config.feed_forward == "geglu"
        inner = config.intermediate_size
        self.up = nn.Linear(config.hidden_size, 2 * inner if self.gated else inner, bias=config.bias)
        self.down = nn.Linear(inner, config.hidden_size, bias=config.bias)

    def forward(self, x):
        inner = self.up(x)
        if not self.gated:
            return self.down(F.gelu(inner))
        inner, gate = inner.chunk(2, dim=-1)
        return self.down(F.gelu(inner) * gate)


class FastBertBlock(GradientCheckpointingLayer):
    def __init__(self, config):
        super().__init__()
        self.pre = config.norm == "pre"
        self.attention = FastBertAttention(config)
        self.attention_norm = layer_norm(config)
        self.feed_forward = FastBertFeedForward(config)
        self.feed_forward_norm = layer_norm(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x, scale, bias, rotation):
        """Hidden states [B, T, D], and attention weights as in `FastBertAttention`."""
        y, weights = self.attention(self.attention_norm(x) if self.pre else x, scale, bias, rotation)
        x = x + self.dropout(y)
        if self.pre:
            return x + self.dropout(self.feed_forward(self.feed_forward_norm(x))), weights
        x = self.attention_norm(x)
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x))), weights


class FastBertPreTrainedModel(PreTrainedModel):
    """Base class for loading and saving. New weights, such as those of a classifier, are initialized as in BERT."""

    config_class = FastBertConfig
    base_model_prefix = "encoder"
    _no_split_modules = ["FastBertBlock"]  # noqa: RUF012
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    # The losses here do not use the `num_items_in_batch` of transformers' Trainer. Without this line the Trainer would
    # assume so, because `forward` has **kwargs, and would not divide by the number of gradient accumulation steps.
    accepts_loss_kwargs = False

    def __init__(self, config, *inputs, **kwargs):
        config.check()  # again, because `from_pretrained` changes a configuration after its constructor
        if config.position != POSITION_NAME:
            raise ValueError(f"this file has the code of position encoding {POSITION_NAME}, not of {config.position}")
        if config.head_size % Position.head_multiple:
            raise ValueError(
                f"position encoding {POSITION_NAME} needs a head size that is a multiple of {Position.head_multiple}"
            )
        super().__init__(config, *inputs, **kwargs)

    @classmethod
    def _can_set_attn_implementation(cls):
        return True  # transformers searches the source for its own attention functions, which are not used here

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, Position):  # transformers does not initialize buffers that are not in the file
            saved = module.state_dict()
            for name, buffer in Position(self.config).named_buffers():
                if name not in saved:
                    module.get_buffer(name).copy_(buffer)


class FastBertModel(FastBertPreTrainedModel):
    """The encoder without a head: token ids to hidden states. It has no pooler; the classifier below has its own."""

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.types = nn.Embedding(config.type_vocab_size, config.hidden_size) if config.type_vocab_size else None
        self.positions = Position(config)
        self.embedding_norm = layer_norm(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.blocks = nn.ModuleList(FastBertBlock(config) for _ in range(config.num_hidden_layers))
        self.final_norm = layer_norm(config) if config.norm == "pre" else None
        self.post_init()

    def get_input_embeddings(self):
        return self.words

    def set_input_embeddings(self, value):
        self.words = value

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        output_attentions=None,
        output_hidden_states=None,
        **kwargs,
    ):
        """Hidden states [B, T, D].

        Args:
            input_ids: integer [B, T]. The first token of a row is [CLS], so padding must be on the right.
            attention_mask: [B, T], 1 for tokens, 0 for padding; or [B, 1 or H, T, T], either bool, true where a query
                (row) attends to a key (column), or floating-point, added to the attention scores. None: no padding.
            token_type_ids: integer [B, T], segments of a pair, 0 if None; ignored by an encoder without token types.
            position_ids: integer [1 or B, T], 0 to T - 1 if None; each below T or `max_position_embeddings`.
            inputs_embeds: [B, T, D], word embeddings instead of `input_ids`.
            output_attentions: also return the attention weights of every block, [B, H, T, T]. This needs
                attn_implementation "eager"; otherwise the tuple is empty.
            output_hidden_states: also return the hidden states of the embeddings and of every block.
            kwargs: ignored, as in transformers' BERT: other outputs of a tokenizer.

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds` are given; a row is longer than the
                positions, and the position encoding does not extrapolate; the attention mask has another shape.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.words(input_ids) if inputs_embeds is None else inputs_embeds
        length = x.shape[1]
        if not Position.extrapolates and length > (limit := self.config.max_position_embeddings):
            raise ValueError(
                f"a sequence of {length} tokens is longer than the {limit} positions, and position encoding "
                f"{POSITION_NAME} defines none beyond; truncate the text, or use a model with another position encoding"
            )
        positions, bias, rotation = self.positions(length, position_ids)
        if positions is not None:
            x = x + positions
        if self.types is not None:
            x = x + self.types(x.new_zeros((1, 1), dtype=torch.long) if token_type_ids is None else token_type_ids)
        x = self.dropout(self.embedding_norm(x))

        if attention_mask is not None:
            bias = with_mask(x.new_zeros(()) if bias is None else bias, attention_mask)
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_attentions and self.config._attn_implementation != "eager":
            logger.warning_once('output_attentions needs `attn_implementation="eager"`; none are returned')
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden_states, attentions = [x], []
        for block in self.blocks:
            x, weights = block(x, self.positions.score_scale, bias, rotation)
            if output_hidden_states:
                hidden_states.append(x)
            if output_attentions and weights is not None:
                attentions.append(weights)
        if self.final_norm is not None:
            hidden_states[-1] = x = self.final_norm(x)
        return BaseModelOutput(
            last_hidden_state=x,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )


# ---------------------------------------------------------------------------------------------------------------------
# Heads: masked language modeling, replaced token detection, sequence and token classification, question answering.


class FastBertWithHead(FastBertPreTrainedModel):
    """Encoder with a head. A subclass has `output_class`, `logits(hidden)` and `loss(logits, labels, mask)`."""

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        **kwargs,
    ):
        """Logits, and with `labels` the mean loss; other arguments as for `FastBertModel.forward`."""
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        outputs = self.encoder(*inputs, **kwargs, return_dict=True)
        logits = self.logits(outputs.last_hidden_state)
        return self.output_class(
            loss=None if labels is None else self.loss(logits, labels, attention_mask),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class FastBertMLMHead(nn.Module):
    """Dense, GELU, LayerNorm, then the tied word embedding and a bias for each word."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)
        self.norm = layer_norm(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden):
        return self.decoder(self.norm(F.gelu(self.dense(hidden))))


class FastBertForMaskedLM(FastBertWithHead):
    """Masked language model: logits [B, T, V]; labels integer [B, T], -100 for tokens without a loss."""

    _tied_weights_keys = {"head.decoder.weight": "encoder.words.weight"}  # noqa: RUF012
    output_class = MaskedLMOutput

    def __init__(self, config):
        super().__init__(config)
        self.encoder = FastBertModel(config)
        self.head = FastBertMLMHead(config)
        self.post_init()

    def get_output_embeddings(self):
        return self.head.decoder

    def set_output_embeddings(self, value):
        self.head.decoder = value

    def logits(self, hidden):
        return self.head(hidden)

    def loss(self, logits, labels, attention_mask):
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class FastBertReplacedHead(nn.Module):
    """Dense, GELU, dense: one logit for each token, positive for a replaced one."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)
        self.output = nn.Linear(config.hidden_size, 1)

    def forward(self, hidden):
        return self.output(F.gelu(self.dense(hidden)))[..., 0]


class FastBertForPreTraining(FastBertWithHead):
    """ELECTRA's discriminator (arXiv 2003.10555), which detects replaced tokens: logits [B, T]; labels [B, T], 1 for
    replaced tokens, 0 for original ones, -100 for tokens without a loss."""

    output_class = TokenClassifierOutput

    def __init__(self, config):
        super().__init__(config)
        self.encoder = FastBertModel(config)
        self.discriminator = FastBertReplacedHead(config)  # not `head`, the name of the MLM head
        self.post_init()

    def logits(self, hidden):
        return self.discriminator(hidden)

    def loss(self, logits, labels, attention_mask):
        """Mean binary cross-entropy over the tokens that are not padding and have a label."""
        real = labels != -100
        if attention_mask is not None and attention_mask.dim() == 2:
            real = real & (attention_mask != 0)
        return F.binary_cross_entropy_with_logits(logits[real], labels[real].to(logits.dtype))


class FastBertForSequenceClassification(FastBertWithHead):
    """BERT's classifier: [CLS] -> dense, tanh (the pooler) -> dropout -> dense, logits [B, L]."""

    output_class = SequenceClassifierOutput

    def __init__(self, config):
        super().__init__(config)
        self.encoder = FastBertModel(config)
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
        p = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = nn.Dropout(p)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def logits(self, hidden):
        return self.classifier(self.dropout(torch.tanh(self.pooler(hidden[:, 0]))))

    def loss(self, logits, labels, attention_mask):
        """Mean squared error if L is 1 or `config.problem_type` is regression; cross-entropy for integer labels [B];
        binary cross-entropy for floating-point labels [B, L]."""
        problem = self.config.problem_type
        if problem is None:
            if self.config.num_labels == 1:
                problem = "regression"
            else:
                problem = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
        if problem == "regression":
            return F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype).view_as(logits.squeeze(-1)))
        if problem == "single_label_classification":
            return F.cross_entropy(logits, labels.flatten())
        return F.binary_cross_entropy_with_logits(logits, labels)


class FastBertForTokenClassification(FastBertWithHead):
    """Token classification: dropout -> dense, logits [B, T, L]; labels integer [B, T], -100 for tokens without a
    loss."""

    output_class = TokenClassifierOutput

    def __init__(self, config):
        super().__init__(config)
        self.encoder = FastBertModel(config)
        p = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = nn.Dropout(p)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def logits(self, hidden):
        return self.classifier(self.dropout(hidden))

    def loss(self, logits, labels, attention_mask):
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class FastBertForQuestionAnswering(FastBertPreTrainedModel):
    """Extractive question answering: logits of the first and of the last token of the answer, each [B, T]."""

    def __init__(self, config):
        super().__init__(config)
        self.encoder = FastBertModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        start_positions=None,
        end_positions=None,
        **kwargs,
    ):
        """Logits, and with both positions, integer [B], the loss: the mean of the two cross-entropies over the tokens.
        Positions outside the T tokens, such as those of a truncated answer, are ignored."""
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        outputs = self.encoder(*inputs, **kwargs, return_dict=True)
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            length = start_logits.shape[1]
            losses = [
                F.cross_entropy(logits, positions.flatten().clamp(0, length), ignore_index=length)
                for logits, positions in ((start_logits, start_positions), (end_logits, end_positions))
            ]
            loss = sum(losses) / 2
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
