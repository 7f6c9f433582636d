"""The encoder: embeddings, a stack of attention and feed-forward blocks, post- or pre-norm.

Shapes: B batch, T tokens, D width, H heads, K head size, V vocabulary.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from fastbert_kernels import combine, hash_dropout
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastbert.model.config import EncoderConfig
from fastbert.model.kernel_choice import KERNELS
from fastbert.model.positions import POSITIONS
from fastbert.model.positions.encoding import rotate

TokenIndex = Tensor | slice | None
"""Indices of tokens in each row: int64 [B, M], a slice for all rows, or None for all tokens."""


def select(x: Tensor, only: TokenIndex) -> Tensor:
    """Selects the tokens at the indices `only`: [1 or B, T, ...] -> [B, M, ...]."""
    if only is None or isinstance(only, slice):
        return x if only is None else x[:, only]
    batch = torch.arange(len(only), device=x.device)[:, None] if len(x) > 1 else torch.zeros_like(only[:, :1])
    if x.device.type == "cuda":  # the backward pass of its index_select is not deterministic
        return x[batch, only]
    return x.flatten(0, 1).index_select(0, (only + x.shape[1] * batch).flatten()).unflatten(0, only.shape)


class SiteDropout(nn.Module):
    """Dropout at one site of the network, by a hash of the row's key, the site and the token's index in the row."""

    def __init__(self, p: float, site: int) -> None:
        super().__init__()
        self.p = p
        # A tensor, not a number, so that torch.compile uses one program for all blocks.
        self.register_buffer("site", torch.tensor(site, dtype=torch.int32), persistent=False)

    def forward(self, x: Tensor, row_keys: Tensor | None, only: TokenIndex = None) -> Tensor:
        """x [B, T, D], or [B, M, D] of the tokens `only`; row_keys int32 [B] or None (no dropout)."""
        if row_keys is None or self.p == 0:
            return x
        if isinstance(only, Tensor):
            index = only.int()
        else:
            index = torch.arange(x.shape[1], dtype=torch.int32, device=x.device)
        return hash_dropout(x, combine(combine(row_keys, self.site)[:, None], index), self.p)


PROGRAMS = 1024
"""Limit of compiled programs of a block in one process. A network has up to eight for each class of shapes (training
and validation of the last block and of the others, and four sizes of contexts for notes), and a run up to five such
classes (the first shape, other batch sizes, other lengths, and one row of either); a process may train several networks
in sequence."""


def layer_norm(config: EncoderConfig) -> nn.LayerNorm:
    """LayerNorm over the width."""
    return nn.LayerNorm(config.width, eps=config.norm_eps, bias=config.bias)


@dataclass(frozen=True)
class AttentionContext:
    """Inputs of the attention in every block, other than hidden states; computed once per forward pass."""

    function: Callable[..., Tensor]
    """`Kernels.attention`."""
    scale: float
    """Factor of q k^T."""
    bias: Tensor | None
    """[1 or B, H, T, T], added to the scaled scores."""
    rotation: tuple[Tensor, Tensor] | None
    """cos and sin, each [1 or B, 1, T, K / 2], by which queries and keys are rotated."""
    key_padding: Tensor | None
    """bool [B, T], true for real tokens."""
    segments: Tensor | None
    """Integer [B, T]; tokens attend only to tokens of the same segment."""
    row_keys: Tensor | None
    """int32 [B], dropout keys of the rows; None without dropout."""

    def of_queries(self, only: TokenIndex) -> "AttentionContext":
        """Bias and rotation of the queries of the tokens `only`."""

        def of(x: Tensor) -> Tensor:
            return select(x.transpose(1, 2), only).transpose(1, 2)

        bias = None if self.bias is None else of(self.bias)
        return replace(self, bias=bias, rotation=self.rotation and tuple(map(of, self.rotation)))

    def of_windows(self, rows: Tensor, tokens: Tensor) -> "AttentionContext":
        """Inputs of the queries `tokens` [E, W] in the `rows` [E]: their bias [E, H, W, T] and rotation, and the
        rows of everything else."""

        def of_queries(x: Tensor) -> Tensor:
            return x.transpose(1, 2)[rows[:, None] if len(x) > 1 else 0, tokens].transpose(1, 2)

        def of_rows(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.index_select(0, rows)

        return replace(
            self,
            bias=None if self.bias is None else of_queries(self.bias),
            rotation=self.rotation and tuple(map(of_queries, self.rotation)),
            key_padding=of_rows(self.key_padding),
            segments=of_rows(self.segments),
            row_keys=of_rows(self.row_keys),
        )


@dataclass(frozen=True)
class Windows:
    """Tokens whose hidden states are needed without a gradient, in addition to those with one."""

    rows: Tensor
    """int64 [E], the row of each window."""
    tokens: Tensor
    """int64 [E, W], indices of the window's tokens in its row."""
    whole_rows: bool
    """Compute the last block for all tokens of all rows; else for the windows, which is the same but for rounding."""
    collect: Callable[[Tensor], None]
    """Called with their hidden states [E, W, D]."""

    def select(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [E, W, D]."""
        return select_windows(x_BTD, self.rows, self.tokens)


def select_windows(x_BTD: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
    """[B, T, D] -> [E, W, D], the `tokens` [E, W] of each of the `rows` [E]."""
    index = rows[:, None] * x_BTD.shape[1] + tokens
    return x_BTD.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, index.shape)


class Attention(nn.Module):
    def __init__(self, config: EncoderConfig, site: int) -> None:
        super().__init__()
        self.heads, self.dropout_p = config.heads, config.attention_dropout
        self.register_buffer("site", torch.tensor(site, dtype=torch.int32), persistent=False)
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.bias)
        self.out = nn.Linear(config.width, config.width, bias=config.bias)

    def forward(
        self,
        x_BTD: Tensor,
        context: AttentionContext,
        only: TokenIndex = None,
        windows: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Output [B, T, D], or [B, M, D] for the queries of the tokens `only`, which attend to all keys.

        Args:
            windows: rows and tokens of further queries, with `only`; they use the same keys and values, without a
                gradient.

        Returns:
            The output, and that of the windows, [E, W, D], or None.
        """
        if only is None:
            q, k, v = self.qkv(x_BTD).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, H, T, K]
        else:
            parts = [x_BTD.shape[-1], 2 * x_BTD.shape[-1]]
            weights = self.qkv.weight.split(parts)
            biases = (None, None) if self.qkv.bias is None else self.qkv.bias.split(parts)
            q = self.queries(select(x_BTD, only), weights[0], biases[0])
            kv = F.linear(x_BTD, weights[1], biases[1])
            k, v = kv.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if context.rotation is not None:
            k = rotate(k, context.rotation)
        positions = only if isinstance(only, Tensor) else None
        output = self.attend(q, k, v, context if only is None else context.of_queries(only), positions)
        if windows is None:
            return output, None
        with torch.no_grad():
            rows, tokens = windows
            q = self.queries(select_windows(x_BTD, rows, tokens), weights[0], biases[0])
            k, v = k.index_select(0, rows), v.index_select(0, rows)
            return output, self.attend(q, k, v, context.of_windows(rows, tokens), tokens)

    def queries(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[B, M, D] -> [B, H, M, K]."""
        return F.linear(x, weight, bias).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext, positions: Tensor | None) -> Tensor:
        """Output [B, M, D] of the queries [B, H, M, K], not yet rotated, for keys and values [B, H, T, K].

        Args:
            context: inputs of these queries.
            positions: int64 [B, M], indices of the queries in their rows; None if they are the first M.
        """
        options = {"key_padding": context.key_padding, "segments": context.segments}
        if positions is not None:
            options["query_positions"] = positions
        if context.rotation is not None:
            q = rotate(q, context.rotation)
        if context.row_keys is not None and self.dropout_p:
            options |= {"dropout_p": self.dropout_p, "keys": combine(context.row_keys, self.site)}
        values_BHMK = context.function(q, k, v, context.bias, scale=context.scale, **options)
        return self.out(values_BHMK.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """gelu(x W) W2, or GeGLU (Shazeer 2020, arXiv 2002.05202): (gelu(x W) * x V) W2, with W and V in one matrix."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.gated = config.feed_forward == "geglu"
        self.up = nn.Linear(config.width, config.ffn * (2 if self.gated else 1), bias=config.bias)
        self.down = nn.Linear(config.ffn, config.width, bias=config.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        inner = self.up(x_BTD)
        if not self.gated:
            return self.down(F.gelu(inner))
        inner, gate = inner.chunk(2, dim=-1)
        return self.down(F.gelu(inner) * gate)


class Block(nn.Module):
    def __init__(self, config: EncoderConfig, index: int) -> None:
        super().__init__()
        site = 1 + 3 * index
        self.pre = config.norm == "pre"
        self.attention = Attention(config, site)
        self.attention_norm = layer_norm(config)
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = layer_norm(config)
        self.attention_dropout = SiteDropout(config.dropout, site + 1)
        self.feed_forward_dropout = SiteDropout(config.dropout, site + 2)

    def forward(
        self,
        x: Tensor,
        context: AttentionContext,
        only: TokenIndex = None,
        windows: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Output [B, T, D], or [B, M, D] of the tokens `only`; for other tokens only keys and values are computed.
        Dropout is a hash of indices, so both forms drop the same values. Arguments and returned values as in
        `Attention`."""
        y, y_EWD = self.attention(self.attention_norm(x) if self.pre else x, context, only, windows)
        output = self.add_sublayers(select(x, only), y, context.row_keys, only)
        if windows is None:
            return output, None
        with torch.no_grad():  # after the pass with a gradient, because autocast caches the casts of the first
            rows, tokens = windows
            keys = None if context.row_keys is None else context.row_keys.index_select(0, rows)
            return output, self.add_sublayers(select_windows(x, rows, tokens), y_EWD, keys, tokens)

    def add_sublayers(self, x: Tensor, y: Tensor, row_keys: Tensor | None, only: TokenIndex) -> Tensor:
        """Adds the attention's output y and that of the feed-forward layer to x [B, M, D]."""
        if self.pre:
            x = x + self.attention_dropout(y, row_keys, only)
            return x + self.feed_forward_dropout(self.feed_forward(self.feed_forward_norm(x)), row_keys, only)
        x = self.attention_norm(x + self.attention_dropout(y, row_keys, only))
        return self.feed_forward_norm(x + self.feed_forward_dropout(self.feed_forward(x), row_keys, only))


class Encoder(nn.Module):
    """A BERT-class encoder with the position encoding of `config`."""

    def __init__(self, config: EncoderConfig, kernels: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.kernels = KERNELS[kernels]
        self.words = nn.Embedding(config.vocab_size, config.width)
        self.types = nn.Embedding(config.type_vocab_size, config.width) if config.type_vocab_size else None
        self.positions = POSITIONS[config.position](config)
        self.embedding_norm = layer_norm(config)
        self.embedding_dropout = SiteDropout(config.dropout, 0)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.layers))
        self.final_norm = layer_norm(config) if config.norm == "pre" else None
        self.compiled = self.checkpointing = False
        """True if blocks are compiled, and if the backward pass recomputes them (`set_execution`)."""

    def forward(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        row_keys: Tensor | None = None,
        only: TokenIndex = None,
        edit_words: Callable[[Tensor], Tensor] | None = None,
        windows: Windows | None = None,
    ) -> Tensor:
        """Hidden states [B, T, D], or [B, M, D] of the tokens `only`.

        Args:
            input_ids: integer [B, T]; position 0 of a sequence is its [CLS].
            attention_mask: [B, T], nonzero for real tokens, zero for padding.
            document_ids: integer [B, T]; tokens attend only to tokens of the same document.
            position_ids: integer [1 or B, T], 0 to T-1 if None; for packed sequences each starts again at its [CLS].
            token_type_ids: integer [B, T], the segment of a pair, 0 if None; ignored by an encoder without token
                types (TUPE's default).
            row_keys: int32 [B], dropout keys of the rows (`fastbert.randomness.row_keys`); None for no dropout.
            only: tokens whose hidden states are needed, such as slice(1) for [CLS]; the last block computes only those.
            edit_words: maps the word embeddings [B, T, D] to those that are used instead.
            windows: further tokens, whose hidden states are passed to `windows.collect`.

        Raises:
            ValueError: the sequences are longer than `max_positions`, and the position encoding does not extrapolate.
        """
        length = input_ids.shape[1]
        if not self.positions.extrapolates and length > (limit := self.config.max_positions):
            raise ValueError(
                f"a sequence of {length} tokens is longer than the {limit} positions, and position encoding "
                f"{self.config.position} defines none beyond"
            )
        x = self.embed(input_ids, position_ids, token_type_ids, row_keys, edit_words)
        context = AttentionContext(
            function=self.kernels.attention,
            scale=self.positions.score_scale,
            bias=self.positions.bias(length, position_ids),
            rotation=self.positions.rotation(length, position_ids),
            key_padding=None if attention_mask is None else attention_mask.bool(),
            segments=document_ids,
            row_keys=row_keys,
        )
        last = len(self.blocks) - 1
        inside = windows is not None and only is not None and not windows.whole_rows
        for index, block in enumerate(self.blocks):
            run, before = block, x
            if self.checkpointing and torch.is_grad_enabled():
                run = partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)
            further = (only, (windows.rows, windows.tokens) if inside else None) if index == last else ()
            x, in_windows = run(x, context, *further)
        hidden = x if self.final_norm is None else self.final_norm(x)
        if windows is not None:
            with torch.no_grad():
                if not inside:
                    # A sharded block has hooks that gather its weights, which are still there; calling them again would
                    # be one message more than on the other ranks.
                    again = block.forward if block._forward_pre_hooks else block
                    in_windows = windows.select(x if only is None else again(before, context)[0])
                windows.collect(in_windows if self.final_norm is None else self.final_norm(in_windows))
        return hidden

    def embed(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        token_type_ids: Tensor | None,
        row_keys: Tensor | None,
        edit_words: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        """Input of the first block, [B, T, D]; arguments as for `forward`."""
        x = self.embed_words(input_ids, edit_words)
        if (positions := self.positions.embed(input_ids.shape[1], position_ids)) is not None:
            x = x + positions
        if self.types is not None:
            x = x + (self.types.weight[0] if token_type_ids is None else self.types(token_type_ids))
        return self.embedding_dropout(self.embedding_norm(x), row_keys)

    def embed_words(self, input_ids: Tensor, edit_words: Callable[[Tensor], Tensor] | None) -> Tensor:
        """Word embeddings alone, [B, T, D]."""
        x = self.words(input_ids)
        return x if edit_words is None else edit_words(x)


def configure_compilation() -> None:
    """Allows torch.compile PROGRAMS programs of a block (beyond its default limit, 8, it runs further shapes eagerly,
    with a single warning), and one program for a block under DistributedDataParallel, where by default it cuts a whole
    network into programs of about 25 MB of weights; the backward passes of the blocks are separate anyway."""
    import torch._dynamo  # takes a second, and only compiled runs need it

    settings = torch._dynamo.config
    for name in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(settings, name, max(getattr(settings, name), PROGRAMS))
    settings.optimize_ddp = False


def blocks_of(module: nn.Module) -> list[nn.ModuleList]:
    """The blocks of each encoder in `module`."""
    return [encoder.blocks for encoder in module.modules() if isinstance(encoder, Encoder)]


def set_execution(module: nn.Module, compiled: bool, checkpointing: bool) -> None:
    """Turns on compilation of blocks (at their first forward pass) and activation checkpointing (Chen et al. 2016,
    arXiv 1604.06174) for the encoders in `module`. Neither changes results beyond rounding: dropout is a function of
    keys, so a recomputed block gives the same values."""
    for encoder in module.modules():
        if isinstance(encoder, Encoder):
            encoder.compiled, encoder.checkpointing = compiled, checkpointing
            if compiled:
                configure_compilation()
                for block in encoder.blocks:
                    block.compile()


@torch.no_grad()
def initialize(module: nn.Module, seed: int, std: float) -> None:
    """Initializes weights from N(0, std), biases with 0, LayerNorm with 1 and 0.

    The values of a parameter depend on (seed, its name) alone, so variants start from the same values for all
    parameters they have in common.
    """
    norms = {id(p) for m in module.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
    for name, parameter in module.named_parameters():
        if id(parameter) in norms:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
