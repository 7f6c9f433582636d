"""Multiple choice with a meta controller (MC-BERT: Xu et al., arXiv 2006.05744).

    L = L_MLM(controller) + 20 L_choice
    L_choice = mean over all tokens i of the cross-entropy of the correct one among k candidates

The encoder reads x^R. Its candidates at i are words sampled without replacement from the meta controller's distribution
there, never x_i itself and never a special token, and [NOTA], "none of the above":

    where x^R_i = x_i     k - 1 such words and [NOTA]; [NOTA] is right
    where it differs      k - 2 such words, x_i and [NOTA]; x_i is right

    score(c) = <h_i, embedding(c)> + bias(c), with h = LayerNorm(GELU(dense(hidden))); [NOTA] has a row of its own

With w the words among the candidates, the loss at i is the sum of two parts: to detect whether the token was replaced,
by the log-odds of all words against [NOTA], and if so to choose the right word among the words:

    z_i = log sum_w exp score(w) - score([NOTA])
    detection    softplus(-z_i) where x^R_i differs, softplus(z_i) elsewhere
    choosing     log sum_w exp score(w) - score(x_i) where x^R_i differs

Both networks use the same word embedding E. A learned matrix W projects it from D to S for the meta controller, whose
logits are h (E W)^T + b. Shapes as in `replacement`; k choices.
"""

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from fastbert_kernels import candidate_scores, with_replacement
from fastbert_kernels.sampling.reference import BLOCK
from torch import Tensor, nn

from fastbert.errors import UserError
from fastbert.model.config import EncoderConfig
from fastbert.model.encoder import select
from fastbert.model.flops import TRAINING, encoder_flops
from fastbert.model.heads import WordTransform
from fastbert.model.shared_embeddings import SharedWords
from fastbert.objectives.masking import Masks, mask_count
from fastbert.objectives.replacement import (
    CANDIDATES,
    JUDGED,
    CorruptedInputs,
    Replacement,
    binary_entropy,
    token_keys,
)

FIRST = -(1 << 40)  # sorts before every hash


class ChoiceHead(WordTransform):
    """Scores of candidate words and of [NOTA]: `transform`, then the dot product with each embedding, and a bias.

    Args:
        nota_id: row of the embedding and of the bias that is [NOTA]'s; None for a vector and a bias in the head.
    """

    def __init__(self, config: EncoderConfig, nota_id: int | None = None) -> None:
        super().__init__(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.nota_id = nota_id
        self.none = nn.Linear(config.width, 1) if nota_id is None else None

    def forward(self, hidden: Tensor, words: Tensor, ids: Tensor) -> Tensor:
        """Hidden states [N, D], the embedding [V, D] and candidates [N, k - 1] -> scores [N, k], that of [NOTA]
        last."""
        hidden = self.transform(hidden)
        scores = candidate_scores(hidden, words, ids) + F.embedding(ids, self.bias[:, None])[..., 0]
        if self.none is not None:
            nota = self.none(hidden)
        else:
            row = slice(self.nota_id, self.nota_id + 1)
            nota = F.linear(hidden, words[row], self.bias[row])
        return torch.cat([scores, nota.to(scores.dtype)], dim=1)


class ControllerHead(WordTransform):
    """`transform` at the width of the meta controller, and a bias for each word; the embedding is a shared one."""

    def __init__(self, config: EncoderConfig, bias: nn.Parameter | None) -> None:
        super().__init__(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size)) if bias is None else bias


class MultipleChoice(Replacement):
    """A meta controller that fills masks and proposes candidates, and the encoder, which chooses among them at every
    token, in training with `unmasked_fraction` at every masked token and that fraction of the others.

    With `nota_embedding` [NOTA] is the row of [PAD] in the word embedding. Packed rows contain no [PAD], and padding is
    never attended to, so no hidden state ever depends on that row, and an export is the same with it.
    """

    main = "choice"
    second_network = "meta controller"
    score_names = ("multiple-choice", "choice")
    word_rows = ("encoder.words.weight", "head.bias", "small_head.bias")
    parts: ClassVar = {"head": ("head.",), second_network: ("small.", "small_head.")}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Raises a UserError if there are more choices than words in the vocabulary."""
        super().__init__(*args, **kwargs)
        choices = self.options.choices
        if choices > (words := len(self.masker.ordinary_ids)):
            raise UserError(
                f"multiple_choice.choices {choices} is more than the {words} words of the vocabulary; lower it"
            )
        self.head = ChoiceHead(self.config, self.masker.pad_id if self.options.nota_embedding else None)
        self.small = SharedWords(self.generator_config, self.encoder)
        self.small_head = ControllerHead(self.generator_config, self.head.bias if self.options.shared_bias else None)

    def judged_count(self, length: int) -> int:
        """J, the number of tokens of a row at which the encoder chooses in training: all that can be masked, and at
        least one more."""
        masked = mask_count(length, self.options.mask_rate)  # with whole words, the expected number
        judged = masked + round(self.options.unmasked_fraction * (length - masked))
        return min(length, max(judged, self.masker.count(length) + 1))

    @torch.no_grad()
    def judged(self, masks: Masks, keys: Tensor) -> Tensor | None:
        """All masked tokens, and a uniform sample of the others by hashes of the rows' keys. All tokens in validation,
        so that its losses do not depend on `unmasked_fraction`."""
        length = masks.input_ids.shape[1]
        count = self.judged_count(length)
        if count == length or not self.training:
            return None
        order = token_keys(keys, JUDGED, length).long()
        first = torch.where(masks.valid, FIRST, order.gather(1, masks.positions))
        order.scatter_(1, masks.positions, first)
        return torch.topk(order, count, dim=1, largest=False).indices.sort(dim=1).values

    def word_logits(self, hidden: Tensor) -> Tensor:
        """Logits of the meta controller: [..., S] -> [..., V]."""
        return F.linear(self.small_head.transform(hidden), self.small.vocabulary(), self.small_head.bias)

    def main_loss(
        self, inputs: CorruptedInputs, filled: Tensor, generator_hidden: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """Sum of the cross-entropies; bool [B, J], true where the choice is correct; sums and counts of the two parts
        of the loss."""
        ids, answers = self.candidates(inputs, filled, generator_hidden)
        scores = self.scores(inputs, filled, ids)
        if inputs.judged is not None:
            # [NOTA] is right at all skipped tokens; with f, that of each row, the scores fit the odds of all tokens.
            masked = (inputs.targets != -100).sum(1, keepdim=True).to(scores.dtype)
            fraction = (inputs.judged.shape[1] - masked) / (filled.shape[1] - masked)
            scores = torch.cat(
                [scores[:, :-1], scores[:, -1:] + fraction.log().expand_as(inputs.judged).reshape(-1, 1)], 1
            )
        loss = F.cross_entropy(scores, answers, reduction="sum")
        with torch.no_grad():
            right = scores.gather(1, answers[:, None])
            replaced = answers < scores.shape[1] - 1
            count = replaced.sum()
            choosing = ((scores[:, :-1].logsumexp(1) - right[:, 0]) * replaced).sum()
            parts = {
                "detection_loss": (loss - choosing, torch.full_like(count, len(answers))),
                "choosing_loss": (choosing, count),
            }
            words = F.pad(ids, (0, 1), value=-1)  # compared by word: with replacement the right one may occur twice
            correct = words.gather(1, scores.argmax(1, keepdim=True)) == words.gather(1, answers[:, None])
        return loss, correct.view(len(filled), -1), parts

    def predict(self, inputs: CorruptedInputs, filled: Tensor, generator_hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Log-odds of the other candidates against [NOTA], [B, T], and the most probable of them, int64 [B, T]."""
        ids, _ = self.candidates(inputs, filled, generator_hidden)
        scores = self.scores(inputs, filled, ids)
        best = ids.gather(1, scores[:, :-1].argmax(1, keepdim=True))
        return (scores[:, :-1].logsumexp(1) - scores[:, -1]).view_as(filled), best.view_as(filled)

    def scores(self, inputs: CorruptedInputs, filled: Tensor, ids: Tensor) -> Tensor:
        """Scores [B J, k] of the candidates [B J, k - 1] and of [NOTA], in at least float32."""
        hidden = self.encode(inputs, filled, inputs.judged).flatten(0, 1)
        return self.head(hidden, self.encoder.words.weight, ids)

    @torch.no_grad()
    def candidates(self, inputs: CorruptedInputs, filled: Tensor, generator_hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Samples the choices at every judged token.

        Args:
            filled: [B, T], x^R.
            generator_hidden: [B, T, S], hidden states of the meta controller.

        Returns:
            ids, int64 [B J, k - 1]: words in the order sampled; where x_i was replaced, x_i is in the last column;
            answers, int64 [B J]: k - 1, [NOTA], or where x_i was replaced k - 2.
        """
        repeats = self.options.with_replacement
        original, filled, hidden, keys = (
            select(x, inputs.judged).flatten(0, 1)
            for x in (inputs.original, filled, generator_hidden, inputs.token_keys(CANDIDATES))
        )
        ids, log_probabilities = self.encoder.kernels.sample_candidates(
            self.small_head.transform(hidden),
            self.small.vocabulary(),
            self.options.choices - 1,
            keys=keys,
            bias=self.small_head.bias,
            forbidden=self.masker.special_ids,
            excluded=None if repeats else original,
        )
        if repeats:
            ids = with_replacement(ids, log_probabilities, keys)
        replaced = filled != original
        ids[:, -1] = torch.where(replaced, original, ids[:, -1])
        nota = self.options.choices - 1
        return ids, torch.where(replaced, nota - 1, nota)

    def chance(self, replaced: float) -> dict[str, float]:
        detection, choosing = binary_entropy(replaced), math.log(self.options.choices - 1)
        choice = detection + replaced * choosing
        return {"choice_loss": choice, "detection_loss": detection, "choosing_loss": choosing}

    def flops(self, batch: int, length: int) -> int:
        """FLOPs of one training step over [B, T]: both networks, their heads, and the forward pass that proposes
        candidates (the vocabulary padded to whole blocks, as it is sampled)."""
        config, tokens, judged = self.config, batch * length, self.judged_count(length)
        d, s, v = config.width, self.generator_config.width, config.vocab_size
        masked = batch * self.masker.count(length)
        main = encoder_flops(config, batch, length, judged) + 2 * batch * judged * (d * d + self.options.choices * d)
        small = SharedWords.flops(self.generator_config, config, batch, length) + 2 * masked * (s * s + s * v)
        vocabulary = 2 * v * d * s if s != d else 0
        candidates = vocabulary + 2 * batch * judged * (s * s + s * -(-v // BLOCK) * BLOCK)
        notes = 0
        if self.notes is not None:
            contexts = self.notes.context_flops(config, batch, length) if judged < length else 0
            notes = contexts + self.notes.flops(tokens)
        return TRAINING * (main + small) + candidates + notes
