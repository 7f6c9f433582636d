"""fastbert's encoder for transformers, from the word embeddings to a classifier, in one file and in reading order.

It is BERT (arXiv 1810.04805) except for five choices of the configuration: how word order enters (`position`), whether
[CLS] has attention values of its own (`cls_attention`), where the LayerNorms stand (`norm`), what the feed-forward
layers compute (`feed_forward`), and whether there are biases (`bias`). Weights bear the names they had in pretraining,
so nothing is translated.

Shapes: B batch, T tokens, D width, H heads, K head size, V vocabulary, L labels.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils import can_return_tuple

from .configuration_fastbert import FastBertConfig

# Added to the scores of padding. Its exponential is 0 in every floating-point type, and unlike the least number of
# float32 it is still finite after a cast to float16 (autocast does that): a row of padding alone gives no NaN.
PADDING_SCORE = -3e4


def layer_norm(config):
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=config.bias)


# ---------------------------------------------------------------------------------------------------------------------
# Positions: what tells the encoder where a word stands.


def relative_bucket(distance, buckets, max_distance):
    """T5's bucket of a distance j - i (arXiv 1910.10683): half the buckets for either direction, and of each half the
    first half for one distance each, the second for logarithmically growing ranges up to `max_distance`."""
    side = buckets // 2
    exact = side // 2
    steps = distance.abs()
    ratio = torch.log(steps.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (ratio * (side - exact)).long()).clamp(max=side - 1)
    return torch.where(steps < exact, steps, far) + side * (distance > 0)


class FastBertRelativeBias(nn.Module):
    """A learned number for each bucket of distances and each head."""

    def __init__(self, config):
        super().__init__()
        self.buckets, self.max_distance = config.relative_buckets, config.relative_max_distance
        self.table = nn.Embedding(config.relative_buckets, config.num_attention_heads)

    def forward(self, length):
        """[H, T, T] for the positions 0 to T - 1."""
        distance = torch.arange(1 - length, length, device=self.table.weight.device)
        by_distance = self.table(relative_bucket(distance, self.buckets, self.max_distance)).T  # [H, 2T - 1]
        # Row i holds the distances -i .. T-1-i: windows of the diagonal values, the last window first.
        return by_distance.unfold(-1, length, 1).flip(1)


def alibi_slopes(heads, device):
    """[H]: with m heads, a power of two, 2^(-8/m), 2^(-16/m), ..., 2^-8. Other numbers of heads take those of the power
    of two below and then every second one of the power above, from the first."""
    m = 2 ** (heads.bit_length() - 1)
    steps = [*range(2, 2 * m + 1, 2), *range(1, 2 * m, 2)][:heads]
    return torch.exp2(torch.tensor(steps, device=device).float() * (-4 / m))


def rotate(x, rotation):
    """x [B, H, T, K], in which the numbers n and n + K/2 are a point in a plane, turned by its angle."""
    cos, sin = rotation
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class FastBertPositions(nn.Module):
    """Position vectors that are added to the words, or a bias that is added to the attention scores, or both; or angles
    by which queries and keys are rotated.

    absolute   a vector for each position, added to the word embeddings.
    relative   the same, and a bias b for the distance of two tokens.
    tupe-a     words and positions do not mix (arXiv 2006.15595): with x the words, p the positions, d the head size,
               scores_ij = (x_i Wq)(x_j Wk)^T / sqrt(2d) + (p_i Uq)(p_j Uk)^T / sqrt(2d).
    tupe-r     the same, and the bias b.
    rope       each pair of numbers n, n + d/2 of a query or key at position p is turned by p base^(-2n/d), so that
               scores depend on the distance (arXiv 2104.09864).
    alibi      -slope_h |i - j| is added to the scores of head h (arXiv 2108.12409).

    In TUPE, `cls_attention: untied` replaces all of the bias in the row of [CLS] by theta1 and in its column by theta2,
    one number each for a head, since [CLS] stands for the whole text and has no place in it.
    """

    def __init__(self, config):
        super().__init__()
        width, rows = config.hidden_size, config.max_position_embeddings
        self.heads, self.max_positions = config.num_attention_heads, rows
        self.position, self.rope_base = config.position, config.rope_base
        self.tupe = config.position in ("tupe-a", "tupe-r")
        self.reset_cls = self.tupe and config.cls_attention == "untied"
        self.head_size = width // config.num_attention_heads
        self.score_scale = (2 * self.head_size if self.tupe else self.head_size) ** -0.5
        if config.position not in ("rope", "alibi"):
            self.table = nn.Embedding(rows + 2 * self.reset_cls, width)  # the last two rows make theta1 and theta2
        if self.tupe:
            self.norm = nn.LayerNorm(width, eps=1e-5, bias=config.bias)
            self.query = nn.Linear(width, width, bias=config.bias)
            self.key = nn.Linear(width, width, bias=config.bias)
        self.relative = FastBertRelativeBias(config) if config.position in ("relative", "tupe-r") else None

    def embed(self, length, position_ids):
        """[1 or B, T, D] to add to the word embeddings, or None."""
        if self.position not in ("absolute", "relative"):
            return None
        return self.table.weight[None, :length] if position_ids is None else self.table(position_ids)

    def rotation(self, length, position_ids, device):
        """cos and sin, each [1 or B, 1, T, K / 2] in float32, to rotate queries and keys of every layer by; or None."""
        if self.position != "rope":
            return None
        places = torch.arange(length, device=device)[None] if position_ids is None else position_ids
        evens = torch.arange(0, self.head_size, 2, device=device)
        frequencies = 1.0 / self.rope_base ** (evens.float() / self.head_size)
        angles = (places.float()[..., None] * frequencies)[:, None]
        return angles.cos(), angles.sin()

    def bias(self, length, position_ids, device):
        """[1 or B, H, T, T] to add to the scores of every layer, or None."""
        if self.position == "alibi":
            places = torch.arange(length, device=device)[None] if position_ids is None else position_ids
            distances = (places[:, None, :, None] - places[:, None, None, :]).abs()
            return -alibi_slopes(self.heads, device)[:, None, None] * distances
        if position_ids is None:
            bias = self._bias(length)
            return None if bias is None else bias[None]
        bias = self._bias(self.max_positions)
        return None if bias is None else bias[:, position_ids[:, :, None], position_ids[:, None, :]].transpose(0, 1)

    def _bias(self, length):
        """[H, T, T] for the positions 0 to T - 1, or None."""
        relative = None if self.relative is None else self.relative(length)
        if not self.tupe:
            return relative
        rows = self.table.weight[:length]
        if self.reset_cls:
            rows = torch.cat([rows, self.table.weight[-2:]])
        p = self.norm(rows)
        q = self.query(p).unflatten(-1, (self.heads, -1)).transpose(0, 1) * self.score_scale  # [H, T or T + 2, K]
        k = self.key(p).unflatten(-1, (self.heads, -1)).transpose(0, 1)
        bias = q[:, :length] @ k[:, :length].transpose(-1, -2)
        if relative is not None:
            bias = bias + relative
        if not self.reset_cls:
            return bias
        theta1, theta2 = (q[:, length:] * k[:, length:]).sum(-1).to(bias.dtype).T  # [H] each
        first = torch.arange(length, device=bias.device) == 0
        bias = torch.where(first, theta2[:, None, None], bias)
        return torch.where(first[:, None], theta1[:, None, None], bias)


# ---------------------------------------------------------------------------------------------------------------------
# The encoder: blocks of attention and feed-forward layers.


class FastBertAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.dropout_p = config.num_attention_heads, config.attention_probs_dropout_prob
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.bias)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)

    def forward(self, x, scale, bias, rotation):
        """softmax(scale q k^T + bias) v, for x [B, T, D] and bias [1 or B, 1 or H, 1 or T, T] or None."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, H, T, K]
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        mask = None if bias is None else bias.to(q.dtype).expand(-1, -1, x.shape[1], -1)
        dropout_p = self.dropout_p if self.training else 0.0
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=scale)
        return self.out(context.transpose(1, 2).flatten(2))


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


class FastBertBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.pre = config.norm == "pre"
        self.attention = FastBertAttention(config)
        self.attention_norm = layer_norm(config)
        self.feed_forward = FastBertFeedForward(config)
        self.feed_forward_norm = layer_norm(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x, scale, bias, rotation):
        if self.pre:
            x = x + self.dropout(self.attention(self.attention_norm(x), scale, bias, rotation))
            return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        x = self.attention_norm(x + self.dropout(self.attention(x, scale, bias, rotation)))
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))


class FastBertPreTrainedModel(PreTrainedModel):
    """Loading and saving. New weights (of a classifier, say) are drawn as BERT's are: the base class does that."""

    config_class = FastBertConfig
    base_model_prefix = "encoder"
    _no_split_modules = ["FastBertBlock"]  # noqa: RUF012
    _supports_sdpa = True


class FastBertModel(FastBertPreTrainedModel):
    """The bare encoder: from word ids to hidden states. It has no pooler; the classifier below brings its own."""

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.types = nn.Embedding(config.type_vocab_size, config.hidden_size) if config.type_vocab_size else None
        self.positions = FastBertPositions(config)
        self.embedding_norm = layer_norm(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.blocks = nn.ModuleList(FastBertBlock(config) for _ in range(config.num_hidden_layers))
        self.final_norm = layer_norm(config) if config.norm == "pre" else None
        self.post_init()

    def get_input_embeddings(self):
        return self.words

    def set_input_embeddings(self, value):
        self.words = value

    # There is no **kwargs: where a model takes them, transformers' Trainer believes that it scales its loss by their
    # `num_items_in_batch`, and no longer divides by the steps of gradient accumulation.
    @can_return_tuple
    def forward(
        self, input_ids, attention_mask=None, token_type_ids=None, position_ids=None, output_hidden_states=None
    ):
        """Hidden states [B, T, D].

        Args:
            input_ids: integer [B, T]. The first token of a row is its [CLS]: padding stands on the right.
            attention_mask: [B, T], 1 for tokens, 0 for padding; no padding if None.
            token_type_ids: integer [B, T], the segment of a pair, 0 if None; ignored by an encoder without types.
            position_ids: integer [1 or B, T], 0 to T - 1 if None.
            output_hidden_states: also give those of the embeddings and of every block.

        Raises:
            ValueError: a row is longer than the positions.
        """
        length = input_ids.shape[1]
        if length > self.config.max_position_embeddings:
            limit = self.config.max_position_embeddings
            raise ValueError(f"a sequence of {length} tokens is longer than the {limit} positions; truncate the text")
        x = self.words(input_ids)
        places = self.positions.embed(length, position_ids)
        if places is not None:
            x = x + places
        if self.types is not None:
            x = x + (self.types.weight[0] if token_type_ids is None else self.types(token_type_ids))
        x = self.dropout(self.embedding_norm(x))

        bias = self.positions.bias(length, position_ids, x.device)
        rotation = self.positions.rotation(length, position_ids, x.device)
        if attention_mask is not None:
            padding = (attention_mask == 0)[:, None, None, :]
            bias = x.new_zeros(()) if bias is None else bias
            bias = bias.masked_fill(padding, PADDING_SCORE)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden_states = [x]
        for block in self.blocks:
            x = block(x, self.positions.score_scale, bias, rotation)
            if output_hidden_states:
                hidden_states.append(x)
        if self.final_norm is not None:
            hidden_states[-1] = x = self.final_norm(x)
        return BaseModelOutput(
            last_hidden_state=x, hidden_states=tuple(hidden_states) if output_hidden_states else None
        )


# ---------------------------------------------------------------------------------------------------------------------
# Heads: words for masked places, whether tokens were replaced, labels for texts.


class FastBertMLMHead(nn.Module):
    """dense, GELU, LayerNorm, then the embedding of the words (tied) and a bias for each word."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)
        self.norm = layer_norm(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden):
        return self.decoder(self.norm(F.gelu(self.dense(hidden))))


class FastBertForMaskedLM(FastBertPreTrainedModel):
    _tied_weights_keys = {"head.decoder.weight": "encoder.words.weight"}  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.encoder = FastBertModel(config)
        self.head = FastBertMLMHead(config)
        self.post_init()

    def get_output_embeddings(self):
        return self.head.decoder

    def set_output_embeddings(self, value):
        self.head.decoder = value

    @can_return_tuple
    def forward(
        self,
        input_ids,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        labels=None,
        output_hidden_states=None,
    ):
        """Logits [B, T, V]; with `labels` (integer [B, T], -100 where nothing is predicted) their mean cross-entropy.

        The other arguments are those of `FastBertModel.forward`.
        """
        outputs = self.encoder(
            input_ids, attention_mask, token_type_ids, position_ids, output_hidden_states, return_dict=True
        )
        logits = self.head(outputs[0])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


class FastBertReplacedHead(nn.Module):
    """dense, GELU, one number: how likely a token was replaced."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)
        self.output = nn.Linear(config.hidden_size, 1)

    def forward(self, hidden):
        return self.output(F.gelu(self.dense(hidden)))[..., 0]


class FastBertForPreTraining(FastBertPreTrainedModel):
    """ELECTRA's discriminator (arXiv 2003.10555): which tokens of a text are not its own."""

    def __init__(self, config):
        super().__init__(config)
        self.encoder = FastBertModel(config)
        self.head = FastBertReplacedHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        labels=None,
        output_hidden_states=None,
    ):
        """Logits [B, T] of "replaced"; with `labels` ([B, T], 1 where a token was replaced, else 0) their mean binary
        cross-entropy over the tokens that are not padding.

        The other arguments are those of `FastBertModel.forward`.
        """
        outputs = self.encoder(
            input_ids, attention_mask, token_type_ids, position_ids, output_hidden_states, return_dict=True
        )
        logits = self.head(outputs[0])
        loss = None
        if labels is not None:
            real = ... if attention_mask is None else attention_mask == 1
            loss = F.binary_cross_entropy_with_logits(logits[real], labels[real].to(logits.dtype))
        return TokenClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


class FastBertForSequenceClassification(FastBertPreTrainedModel):
    """BERT's classifier: [CLS] -> dense, tanh (the pooler) -> dropout -> labels."""

    def __init__(self, config):
        super().__init__(config)
        self.encoder = FastBertModel(config)
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
        p = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = nn.Dropout(p)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        labels=None,
        output_hidden_states=None,
    ):
        """Logits [B, L], and with `labels` their loss: squared error where L is 1 or `config.problem_type` is
        regression, cross-entropy for integer labels [B], binary cross-entropy for other labels [B, L].

        The other arguments are those of `FastBertModel.forward`.
        """
        outputs = self.encoder(
            input_ids, attention_mask, token_type_ids, position_ids, output_hidden_states, return_dict=True
        )
        pooled = torch.tanh(self.pooler(outputs[0][:, 0]))
        logits = self.classifier(self.dropout(pooled))
        loss = None if labels is None else self._loss(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)

    def _loss(self, logits, labels):
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
