"""Multiple choice with a meta controller (MC-BERT: Xu et al., arXiv 2006.05744).

    L = L_MLM(controller) + 20 L_choice
    L_choice = mean over all tokens i of the cross-entropy of the correct one among k candidates

The encoder reads x^R. Its candidates at i are words sampled without replacement from the meta controller's distribution
there, never x_i itself and never a special token, and [NOTA], "none of the above":

    where x^R_i = x_i     k - 1 such words and [NOTA]; [NOTA] is right
    where it differs      k - 2 such words, x_i and [NOTA]; x_i is right

    score(c) = <h_i, embedding(c)> + bias(c), with h = LayerNorm(GELU(dense(hidden))); [NOTA] has a row of its own

Both networks use the same word embedding E. A learned matrix W projects it from D to S for the meta controller, whose
logits are h (E W)^T + b. Shapes as in `replacement`; k choices.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from fastbert_kernels import candidate_scores
from fastbert_kernels.sampling.reference import BLOCK
from torch import Tensor, nn

from fastbert.errors import UserError
from fastbert.model.config import EncoderConfig
from fastbert.model.flops import TRAINING, encoder_flops
from fastbert.model.heads import WordTransform
from fastbert.model.shared_embeddings import SharedWords
from fastbert.objectives.replacement import CANDIDATES, CorruptedInputs, Replacement


class ChoiceHead(WordTransform):
    """Scores of candidate words and of [NOTA]: `transform`, then the dot product with each embedding, and a bias."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.none = nn.Linear(config.width, 1)

    def forward(self, hidden: Tensor, words: Tensor, ids: Tensor) -> Tensor:
        """Hidden states [N, D], the embedding [V, D] and candidates [N, k - 1] -> scores [N, k], that of [NOTA]
        last."""
        hidden = self.transform(hidden)
        scores = candidate_scores(hidden, words, ids) + F.embedding(ids, self.bias[:, None])[..., 0]
        return torch.cat([scores, self.none(hidden).to(scores.dtype)], dim=1)


class ControllerHead(WordTransform):
    """`transform` at the width of the meta controller, and a bias for each word; the embedding is a shared one."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))


class MultipleChoice(Replacement):
    """A meta controller that fills masks and proposes candidates, and the encoder, which chooses among them at every
    token."""

    main = "choice"
    second_network = "meta controller"
    score_names = ("multiple-choice", "choice")
    parts: ClassVar = {"head": ("head.",), second_network: ("small.", "small_head.")}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Raises a UserError if there are more choices than words in the vocabulary."""
        super().__init__(*args, **kwargs)
        choices = self.options.choices
        if choices > (words := len(self.masker.ordinary_ids)):
            raise UserError(
                f"multiple_choice.choices {choices} is more than the {words} words of the vocabulary; lower it"
            )
        self.head = ChoiceHead(self.config)
        self.small = SharedWords(self.generator_config, self.encoder)
        self.small_head = ControllerHead(self.generator_config)

    def word_logits(self, hidden: Tensor) -> Tensor:
        """Logits of the meta controller: [..., S] -> [..., V]."""
        return F.linear(self.small_head.transform(hidden), self.small.vocabulary(), self.small_head.bias)

    def main_loss(self, inputs: CorruptedInputs, filled: Tensor, generator_hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the cross-entropies; bool [B, T], true where the choice is correct."""
        ids, answers = self.candidates(inputs, filled, generator_hidden)
        scores = self.scores(inputs, filled, ids)
        loss = F.cross_entropy(scores, answers, reduction="sum")
        return loss, (scores.detach().argmax(-1) == answers).view_as(filled)

    def predict(self, inputs: CorruptedInputs, filled: Tensor, generator_hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Log-odds of the other candidates against [NOTA], [B, T], and the most probable of them, int64 [B, T]."""
        ids, _ = self.candidates(inputs, filled, generator_hidden)
        scores = self.scores(inputs, filled, ids)
        best = ids.gather(1, scores[:, :-1].argmax(1, keepdim=True))
        return (scores[:, :-1].logsumexp(1) - scores[:, -1]).view_as(filled), best.view_as(filled)

    def scores(self, inputs: CorruptedInputs, filled: Tensor, ids: Tensor) -> Tensor:
        """Scores [B T, k] of the candidates [B T, k - 1] and of [NOTA], in at least float32."""
        hidden = self.encode(inputs, filled).flatten(0, 1)
        return self.head(hidden, self.encoder.words.weight, ids)

    @torch.no_grad()
    def candidates(self, inputs: CorruptedInputs, filled: Tensor, generator_hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Samples the choices at every token.

        Args:
            filled: [B, T], x^R.
            generator_hidden: [B, T, S], hidden states of the meta controller.

        Returns:
            ids, int64 [B T, k - 1]: words in the order sampled; where x_i was replaced, x_i is in the last column;
            answers, int64 [B T]: k - 1, [NOTA], or where x_i was replaced k - 2.
        """
        original, choices = inputs.original.flatten(), self.options.choices
        ids, _ = self.encoder.kernels.sample_candidates(
            self.small_head.transform(generator_hidden.flatten(0, 1)),
            self.small.vocabulary(),
            choices - 1,
            keys=inputs.token_keys(CANDIDATES).flatten(),
            bias=self.small_head.bias,
            forbidden=self.masker.special_ids,
            excluded=original,
        )
        replaced = filled.flatten() != original
        ids[:, -1] = torch.where(replaced, original, ids[:, -1])
        return ids, torch.where(replaced, choices - 2, choices - 1)

    def flops(self, batch: int, length: int) -> int:
        """FLOPs of one training step over [B, T]: both networks, their heads, and the forward pass that proposes
        candidates (the vocabulary padded to whole blocks, as it is sampled)."""
        config, tokens = self.config, batch * length
        d, s, v = config.width, self.generator_config.width, config.vocab_size
        masked = batch * self.masker.count(length)
        main = encoder_flops(config, batch, length) + 2 * tokens * (d * d + self.options.choices * d)
        small = SharedWords.flops(self.generator_config, config, batch, length) + 2 * masked * (s * s + s * v)
        vocabulary = 2 * v * d * s if s != d else 0
        candidates = vocabulary + 2 * tokens * (s * s + s * -(-v // BLOCK) * BLOCK)
        notes = self.notes.flops(tokens) if self.notes is not None else 0
        return TRAINING * (main + small) + candidates + notes
