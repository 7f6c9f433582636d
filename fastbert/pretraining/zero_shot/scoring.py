"""Scores of the tokens of many sentences: rows of equal length in one batch, without padding; equal rows once.

Shapes: B rows, T tokens of a row with special tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Encoding

from fastbert.pretraining.zero_shot.scorer import Scorer
from fastbert.progress import Progress, progress
from fastbert.training.hardware import autocast

ENCODED = 1 << 18  # characters that are tokenized at once
PIECE = 1 << 20  # tokens of the rows among which equal ones are found; bounds the memory
BATCH = {"cpu": 8192, "cuda": 131072}  # tokens of a forward pass
LOGITS = 1 << 27  # logits of a forward pass


class Sentence(NamedTuple):
    """A sentence, or a part of one, as the input of a model."""

    ids: np.ndarray
    """int32 [T], with special tokens."""
    positions: np.ndarray
    """int64 [n], the tokens that are scored."""
    ends: np.ndarray
    """int64 [n], end of the word of each of them (exclusive)."""


def encoded(scorer: Scorer, texts: Sequence[str]) -> Iterator[Encoding]:
    """Tokenizes the texts."""
    with progress("tokenizing", len(texts), "sentences") as shown:
        part, size = [], 0
        for number, text in enumerate(texts, 1):
            part.append(text)
            size += len(text)
            if size >= ENCODED or number == len(texts):
                yield from scorer.tokenizer.encode_batch(part)
                shown.update(number)
                part, size = [], 0


def sentence(encoding: Encoding) -> Sentence:
    """A whole text, of which all tokens but the special ones are scored."""
    ids = np.array(encoding.ids, dtype=np.int32)
    positions = np.flatnonzero(np.array(encoding.special_tokens_mask) == 0)
    return Sentence(ids, positions, word_ends(encoding)[positions])


def word_ends(encoding: Encoding) -> np.ndarray:
    """End of the word of each token (exclusive), int64 [T]; a word is one of the tokenizer's, such as a run of ##
    pieces."""
    words = encoding.word_ids
    ends = np.arange(1, len(words) + 1)
    for index in range(len(words) - 2, -1, -1):
        if words[index] == words[index + 1]:
            ends[index] = ends[index + 1]
    return ends


@torch.inference_mode()
def log_probabilities(
    scorer: Scorer, sentences: Sequence[Sentence], form: str, rows: int | None = None
) -> list[np.ndarray]:
    """log p of each scored token, float64 [n] for each sentence.

    Args:
        form: "salazar" masks the token alone (Salazar et al. 2020, arXiv 1910.14659), "word-l2r" also the later tokens
            of its word (Kauf and Ivanova 2023, arXiv 2305.10588).
        rows: rows of a forward pass; None: at most BATCH tokens and LOGITS logits.
    """
    found = [np.empty(len(one.positions)) for one in sentences]
    total = sum(len(one.positions) for one in sentences)
    # One context for all batches, because it casts the weights once.
    with progress("scoring", total, "tokens") as shown, autocast(scorer.device, scorer.precision):
        for members in _of_equal_length(sentences):
            parts = [sentences[index] for index in members]
            values = _score(scorer, parts, form, rows, shown)
            for index, value in zip(
                members, np.split(values, np.cumsum([len(p.positions) for p in parts])[:-1]), strict=True
            ):
                found[index] = value
    return found


def _score(scorer: Scorer, sentences: list[Sentence], form: str, rows: int | None, shown: Progress) -> np.ndarray:
    """log p of all scored tokens of sentences of equal length."""
    positions = np.concatenate([one.positions for one in sentences])
    ids = np.stack([one.ids for one in sentences]).repeat([len(one.positions) for one in sentences], axis=0)
    targets = ids[np.arange(len(ids)), positions]
    ends = np.concatenate([one.ends for one in sentences]) if form == "word-l2r" else positions + 1
    index = np.arange(ids.shape[1])
    ids[(index >= positions[:, None]) & (index < ends[:, None])] = scorer.mask_id
    # Two sentences that differ in one word are the same row where that word is masked. The masks tell the position.
    _, first, row = np.unique(ids.view(f"V{ids.itemsize * ids.shape[1]}")[:, 0], return_index=True, return_inverse=True)
    order = np.argsort(row, kind="stable")
    bounds = np.searchsorted(row[order], np.arange(len(first) + 1))
    found = torch.empty(len(ids), device=scorer.device)
    most = min(BATCH[scorer.device.type] // ids.shape[1], LOGITS // scorer.tokenizer.get_vocab_size())
    batch = rows or max(1, most)
    done = shown.done
    for start in range(0, len(first), batch):
        chosen = first[start : start + batch]
        queries = order[bounds[start] : bounds[start + len(chosen)]]
        inputs = [
            torch.from_numpy(array.astype(np.int64)).to(scorer.device) for array in (ids[chosen], positions[chosen])
        ]
        logits = scorer.word_logits(*inputs).float()
        which = torch.from_numpy(row[queries] - start).to(scorer.device)
        target = torch.from_numpy(targets[queries].astype(np.int64)).to(scorer.device)
        found[torch.from_numpy(queries).to(scorer.device)] = logits[which, target] - logits.logsumexp(-1)[which]
        done += len(queries)
        shown.update(done)
    return found.cpu().double().numpy()  # once, so that the loop does not wait for a GPU


@torch.inference_mode()
def log_odds(scorer: Scorer, sentences: Sequence[Sentence], rows: int | None = None) -> list[np.ndarray]:
    """Log-odds that each scored token is original, float64 [n] for each sentence."""
    found = [np.empty(0)] * len(sentences)
    with progress("scoring", len(sentences), "sentences") as shown, autocast(scorer.device, scorer.precision):
        for members in _of_equal_length(sentences):
            ids = np.stack([sentences[index].ids for index in members]).astype(np.int64)
            batch = rows or max(1, BATCH[scorer.device.type] // ids.shape[1])
            for start in range(0, len(members), batch):
                inputs = torch.from_numpy(ids[start : start + batch]).to(scorer.device)
                values = scorer.log_odds(inputs).float().cpu().double().numpy()
                for index, value in zip(members[start : start + batch], values, strict=True):
                    found[index] = value[sentences[index].positions]
                shown.update(shown.done + len(inputs))
    return found


def _of_equal_length(sentences: Sequence[Sentence]) -> Iterator[list[int]]:
    """Indices of sentences of equal length, longest first, in parts whose rows have about PIECE tokens."""
    groups: dict[int, list[int]] = {}
    for index, one in enumerate(sentences):
        groups.setdefault(len(one.ids), []).append(index)
    for length in sorted(groups, reverse=True):
        part, tokens = [], 0
        for index in groups[length]:
            part.append(index)
            tokens += length * len(sentences[index].positions)
            if tokens >= PIECE:
                yield part
                part, tokens = [], 0
        if part:
            yield part
