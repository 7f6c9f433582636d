"""Note dictionary for rare words (Wu et al., "Taking Notes on the Fly", ICLR 2021, arXiv 2008.01466).

For a rare word w at tokens s..t, with c_j the encoder's output at token j, k the half window, e the word embedding:

    Note(w, x)  = mean of c_j over j in [s-k, t+k], within the row and the document
    NoteDict(w) = (1 - gamma) NoteDict(w) + gamma (mean of Note(w, x) over the global batch)    once per optimizer step
    input_i     = (1 - lambda) e_i + lambda |e_i| / |NoteDict(w)| NoteDict(w)                   for i in s..t

A note is a mean of hidden states. After a LayerNorm their norm is about sqrt(D), far from that of an embedding, so each
piece of a word reads its note with the norm |e_i| of its own embedding; no gradient flows through the norm. The
dictionary itself holds hidden states without scaling.

Shapes: B rows, T tokens, D width, N words in the dictionary; of a batch U words, R occurrences, P pieces, E windows of
W tokens.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert.data.note_words import NoteFrequencies, Occurrences, window_size, window_sizes
from fastbert.model.config import EncoderConfig
from fastbert.model.encoder import Windows
from fastbert.model.flops import block_flops, query_flops
from fastbert.model.options import NoteDictionaryOptions
from fastbert.training.world import ONE_PROCESS, World

UNKNOWN = NoteFrequencies()


class NoteDictionary(nn.Module):
    """The notes, in buffers: saved and restored with the weights, but not updated by the optimizer.

    A step reads and writes the rows of its own words only, so its cost does not depend on N. In an objective:

        sample      note_tokens = NoteTokens(notes, batch.noted, positions, valid, length, size)
        forward     hidden = encoder(..., edit_words=note_tokens.edit, windows=note_tokens.windows in training)
        after_step  return notes.write([part.note_tokens for part in micro_batches], updated)
    """

    def __init__(
        self,
        options: NoteDictionaryOptions,
        words: int,
        width: int,
        seed: int,
        frequencies: NoteFrequencies = UNKNOWN,
    ) -> None:
        """
        Args:
            words: W.
            width: D.
            seed: seed of the experiment.
            frequencies: those of the training text, for `flops`.
        """
        super().__init__()
        self.options, self.frequencies = options, frequencies
        digest = hashlib.sha256(f"{seed}/notes".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        table = torch.zeros(words, width)
        if options.initial_std:
            table.normal_(0.0, options.initial_std, generator=generator)
        self.register_buffer("table", table)
        self.register_buffer("writes", torch.zeros(words, dtype=torch.int32))  # number of updates of each note
        self.register_buffer("written", torch.zeros((), dtype=torch.int64))  # number of notes written at least once

    def flops(self, tokens: int) -> int:
        """FLOPs of the sums of a step over this many tokens, as an average over the corpus: one multiply-add for each
        value of the hidden states in the windows, three for each value of a piece that reads a note, two for each that
        is written."""
        occurrences, pieces = self.frequencies.occurrences, self.frequencies.pieces
        values = occurrences * (2 * self.options.half_window + 2) + 4 * pieces
        return round(tokens * 2 * self.table.shape[1] * values)

    def context_flops(self, config: EncoderConfig, batch: int, length: int) -> int:
        """FLOPs of the last block, forward, for the contexts of a step over [B, T] in one micro-batch, where the
        objective computes it for other tokens only; as an average over the corpus."""
        size = window_size(self.options.half_window, length)
        sizes = window_sizes(self.frequencies, batch, length, size)
        windows = sum(count * fraction for count, fraction in sizes.items()) * query_flops(config, length, size)
        whole_rows = (1 - sum(sizes.values())) * batch * block_flops(config, length, length)
        return round(windows + whole_rows)

    @torch.no_grad()
    def write(
        self, micro_batches: Sequence["NoteTokens"], updated: Tensor, world: World = ONE_PROCESS
    ) -> dict[str, Tensor]:
        """Updates the notes of a step's words, each once, from all their occurrences.

        The sums [U, D] are in the order of the words of the global batch. Every rank knows these words and their
        counts.

        Args:
            micro_batches: words of all micro-batches of the step, with their hidden states collected.
            updated: bool [], false if the optimizer skipped its update; then nothing is written.

        Returns:
            Scalars for the log: the fraction of the dictionary's words that have occurred so far, the fraction of the
            step's tokens that read a note, and for the words of the step the mean norm of their notes and of the
            change.
        """
        where = micro_batches[0].where
        sums = self.table.new_zeros(len(where.words), self.table.shape[1])
        for part in micro_batches:
            add_rows(sums, part.where.windows.slots, part.contexts)
        sums = world.sum(sums)
        reading = sum(part.tokens for part in micro_batches)
        tokens = torch.full_like(reading, sum(part.size for part in micro_batches))
        reading, tokens = world.sums({"reading": reading, "tokens": tokens}).values()
        wrote = (where.counts > 0) & updated
        old = self.table.index_select(0, where.words)
        contexts = sums / where.counts.clamp(min=1)[:, None]
        change = torch.where(wrote[:, None], self.options.gamma * (contexts - old), 0.0)
        self.table.index_add_(0, where.words, change)  # each word occurs once; padding adds zeros
        first = wrote & (self.writes.index_select(0, where.words) == 0)
        self.written += first.sum()
        self.writes.index_add_(0, where.words, wrote.to(self.writes.dtype))
        real = (where.counts > 0).to(change.dtype)
        return {
            "notes_words": self.written / len(self.table),
            "notes_tokens": reading / tokens,
            "notes_norm": (real * (old + change).norm(dim=1)).sum() / real.sum().clamp(min=1),
            "notes_drift": change.norm(dim=1).sum() / real.sum().clamp(min=1),
        }


class NoteTokens:
    """Words with notes in one micro-batch: the notes they read, and the contexts to write after the step."""

    def __init__(
        self, notes: NoteDictionary, where: Occurrences, positions: Tensor, valid: Tensor, length: int, size: int
    ) -> None:
        """
        Args:
            where: occurrences of words with notes in the micro-batch.
            positions: int64 [B, M], masked positions of each row; a word with a masked piece reads no note there.
            valid: bool [B, M], true for positions that are masked.
            length: T.
            size: number of tokens that count, B T or 0.
        """
        self.notes, self.where, self.contexts = notes, where, None
        shown = where.lengths > 0
        if not notes.options.leak:
            masked = torch.zeros(len(positions), length, dtype=torch.int64, device=positions.device)
            masked.scatter_(1, positions, valid.long())
            before = F.pad(masked.flatten().cumsum(0), (1, 0))  # masked positions before each token of the batch
            shown = shown & (before[where.firsts + where.lengths] == before[where.firsts])
        self.shown = shown.index_select(0, where.owners)[:, None]
        """bool [P, 1], true for pieces that read a note."""
        self.length, self.size = length, size

    @property
    def tokens(self) -> Tensor:
        """Number of tokens that read a note."""
        return self.shown.sum()

    def edit(self, words_BTD: Tensor) -> Tensor:
        """Mixes the notes into word embeddings [B, T, D]; no gradient flows into the notes."""
        where, notes = self.where, self.notes
        flat = words_BTD.flatten(0, 1)
        pieces = flat.detach().index_select(0, where.tokens)
        rows = where.words.index_select(0, where.slots).index_select(0, where.owners)
        note = notes.table.index_select(0, rows)
        note = F.normalize(note, dim=1) * pieces.norm(dim=1, keepdim=True)
        weight = self.shown.to(note.dtype) * notes.options.mix
        return Mixture.apply(flat, where.tokens, pieces, note, weight).view_as(words_BTD)

    @property
    def windows(self) -> Windows:
        """The tokens whose hidden states are averaged."""
        where = self.where.windows
        offset = torch.arange(where.size, device=where.firsts.device)
        inside = torch.minimum(offset, (where.lengths - 1).clamp(min=0)[:, None])
        tokens = (where.firsts % self.length)[:, None] + inside
        return Windows(where.firsts // self.length, tokens, where.whole_rows, self.collect)

    @torch.no_grad()
    def collect(self, hidden_EWD: Tensor) -> None:
        """Stores the part of the mean of a context's hidden states that each window [E, W, D] contributes."""
        where = self.where.windows
        inside = torch.arange(where.size, device=hidden_EWD.device) < where.lengths[:, None]
        hidden_EWD = hidden_EWD.to(self.notes.table.dtype)
        self.contexts = (hidden_EWD * inside[:, :, None]).sum(1) / where.totals[:, None]


class Mixture(torch.autograd.Function):
    """(1 - weight) e + weight note at the tokens, e elsewhere. Autograd's own gradient of this has two more passes over
    all embeddings."""

    @staticmethod
    def forward(ctx: Any, words: Tensor, tokens: Tensor, pieces: Tensor, note: Tensor, weight: Tensor) -> Tensor:
        """Embeddings [B T, D], indices [P], embeddings and notes there [P, D], weights [P, 1]."""
        ctx.save_for_backward(tokens, weight)
        # Differences are added, because padding points to the first [CLS]: it adds zero there.
        return words.index_add(0, tokens, (weight * (note - pieces)).to(words.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        tokens, weight = ctx.saved_tensors
        change = weight * gradient.index_select(0, tokens)
        return gradient.index_add(0, tokens, -change.to(gradient.dtype)), None, None, None, None


def add_rows(into: Tensor, index: Tensor, rows: Tensor) -> None:
    """Computes into[index] += rows in a deterministic order: index_add_ is deterministic on a CPU only, index_put_ on a
    GPU."""
    if into.is_cuda:
        into.index_put_((index,), rows, accumulate=True)
    else:
        into.index_add_(0, index, rows)
