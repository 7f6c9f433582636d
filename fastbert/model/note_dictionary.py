"""Notes for rare words (Wu et al. 2020, "Taking Notes on the Fly", arXiv 2008.01466): a dictionary of contexts.

For a rare word w at tokens s..t, with c_j the encoder's output at token j, k the half window, e the word embedding:

    Note(w, x)  = mean of c_j over j in [s-k, t+k], within the row and the document
    NoteDict(w) = (1 - gamma) NoteDict(w) + gamma (mean of Note(w, x) over the global batch)    once an optimizer step
    input_i     = (1 - lambda) e_i + lambda |e_i| / |NoteDict(w)| NoteDict(w)                   for i in s..t

A note is a mean of hidden states, whose norm is about sqrt(D) where they leave a LayerNorm and far from that of an
embedding. What is read has therefore the note's direction and the norm |e_i| of the embedding it is mixed with, piece
by piece and without a gradient through the norm. The dictionary itself holds hidden states as they are.

Shapes: B rows, T tokens, D width, W words in the dictionary; of a batch U words, R occurrences, P pieces.
"""

import hashlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert.data.note_words import Occurrences
from fastbert.model.options import NoteDictionaryOptions
from fastbert.training.world import ONE_PROCESS, World


class NoteDictionary(nn.Module):
    """The dictionary: buffers, saved and restored with the weights, that no optimizer sees.

    A step touches the rows of its own words only, whatever W is. In an objective:

        draw        noted = NoteTokens(notes, batch.noted, places, valid, length)
        forward     hidden = encoder(..., edit_words=noted.edit); if training: noted.collect(hidden)
        after_step  return notes.write([part.noted for part in drawn], updated)
    """

    def __init__(
        self,
        options: NoteDictionaryOptions,
        words: int,
        width: int,
        seed: int,
        occurrences_per_token: float = 0.0,
        pieces_per_token: float = 0.0,
    ) -> None:
        """
        Args:
            words: W.
            width: D.
            seed: of the experiment.
            occurrences_per_token, pieces_per_token: of words with notes in the training text, for `flops`.
        """
        super().__init__()
        self.options = options
        self.occurrences_per_token, self.pieces_per_token = occurrences_per_token, pieces_per_token
        digest = hashlib.sha256(f"{seed}/notes".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        table = torch.zeros(words, width)
        if options.initial_std:
            table.normal_(0.0, options.initial_std, generator=generator)
        self.register_buffer("table", table)
        self.register_buffer("writes", torch.zeros(words, dtype=torch.int32))  # of each note
        self.register_buffer("written", torch.zeros((), dtype=torch.int64))  # notes written at least once

    def flops(self, tokens: int) -> int:
        """Of a step over so many tokens, on the average over the corpus: a multiply and an add for each number of the
        hidden states in the windows, three for each of a piece that reads a note, two for each that is written."""
        windows = self.occurrences_per_token * 2 * self.options.half_window + self.pieces_per_token
        numbers = windows + 3 * self.pieces_per_token + 2 * self.occurrences_per_token
        return round(tokens * 2 * self.table.shape[1] * numbers)

    @torch.no_grad()
    def write(self, taken: Sequence["NoteTokens"], updated: Tensor, world: World = ONE_PROCESS) -> dict[str, Tensor]:
        """Writes the notes of a step's words, each once, from all their occurrences.

        The sums [U, D] stand in the order of the global batch's words, which every rank knows, as it knows their
        counts.

        Args:
            taken: of all micro-batches of the step, their hidden states collected.
            updated: bool [], whether the optimizer made its update; if not, nothing is written.

        Returns:
            For the log: the share of the dictionary's words met so far, the share of the step's tokens that got a note,
            and of the notes of the step's words the mean norm and the mean norm of their change.
        """
        where = taken[0].where
        sums = self.table.new_zeros(len(where.words), self.table.shape[1])
        for part in taken:
            add_rows(sums, part.where.slots, part.contexts)
        sums = world.sum(sums)
        noted = world.sum(sum(part.tokens for part in taken))
        tokens = world.sum(torch.full_like(noted, sum(part.size for part in taken)))
        wrote = (where.counts > 0) & updated
        old = self.table.index_select(0, where.words)
        contexts = sums / where.counts.clamp(min=1)[:, None]
        change = torch.where(wrote[:, None], self.options.gamma * (contexts - old), 0.0)
        self.table.index_add_(0, where.words, change)  # each word stands there once; padding adds zeros
        first = wrote & (self.writes.index_select(0, where.words) == 0)
        self.written += first.sum()
        self.writes.index_add_(0, where.words, wrote.to(self.writes.dtype))
        real = (where.counts > 0).to(change.dtype)
        return {
            "notes_words": self.written / len(self.table),
            "notes_tokens": noted / tokens,
            "notes_norm": (real * (old + change).norm(dim=1)).sum() / real.sum().clamp(min=1),
            "notes_drift": change.norm(dim=1).sum() / real.sum().clamp(min=1),
        }


class NoteTokens:
    """The notes of one micro-batch: what its words read, and the contexts to be written after the step."""

    def __init__(self, notes: NoteDictionary, where: Occurrences, places: Tensor, valid: Tensor, length: int) -> None:
        """
        Args:
            where: the words with notes of the micro-batch.
            places: int64 [B, M], the masked positions of each row; a word with one of them gets no note there.
            valid: bool [B, M], which of them are used.
            length: T.
        """
        self.notes, self.where, self.contexts = notes, where, None
        shown = where.lengths > 0
        if not notes.options.leak:
            masked = torch.zeros(len(places), length, dtype=torch.int64, device=places.device)
            masked.scatter_(1, places, valid.long())
            before = F.pad(masked.flatten().cumsum(0), (1, 0))  # masked places before each place of the batch
            shown = shown & (before[where.firsts + where.lengths] == before[where.firsts])
        self.shown = shown.index_select(0, where.owners)[:, None]
        """bool [P, 1]: pieces that get a note."""
        self.size = len(places) * length
        """B T."""

    @property
    def tokens(self) -> Tensor:
        """How many tokens get a note."""
        return self.shown.sum()

    def edit(self, words_BTD: Tensor) -> Tensor:
        """Word embeddings [B, T, D] with the notes mixed in; no gradient flows into these."""
        where, notes = self.where, self.notes
        flat = words_BTD.flatten(0, 1)
        pieces = flat.index_select(0, where.tokens)
        rows = where.words.index_select(0, where.slots).index_select(0, where.owners)
        note = notes.table.index_select(0, rows)
        note = F.normalize(note, dim=1) * pieces.detach().norm(dim=1, keepdim=True)
        # A difference that is added, and not a place that is overwritten: padding adds zero to the first [CLS].
        share = self.shown.to(note.dtype) * notes.options.mix
        return flat.index_add(0, where.tokens, (share * (note - pieces)).to(flat.dtype)).view_as(words_BTD)

    @torch.no_grad()
    def collect(self, hidden_BTD: Tensor) -> None:
        """Keeps the mean of the hidden states [B, T, D] in the window of each occurrence."""
        where = self.where
        flat = hidden_BTD.flatten(0, 1).to(self.notes.table.dtype)
        offset = torch.arange(where.longest_window, device=flat.device)
        inside = offset < where.window_lengths[:, None]
        tokens = where.window_firsts[:, None] + torch.where(inside, offset, 0)
        sums = F.embedding_bag(tokens, flat, mode="sum", per_sample_weights=inside.to(flat.dtype))
        self.contexts = sums / where.window_lengths.clamp(min=1)[:, None]


def add_rows(into: Tensor, index: Tensor, rows: Tensor) -> None:
    """into[index] += rows, always in the same order: on a GPU index_add_ would not keep one, on a CPU index_put_."""
    if into.is_cuda:
        into.index_put_((index,), rows, accumulate=True)
    else:
        into.index_add_(0, index, rows)
