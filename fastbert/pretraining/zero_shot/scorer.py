"""A model that scores sentences, and its tokenizer.

Three scores of a token x_i in a sentence x exist, of which a model has one or more:

    words       log p(x_i | x without x_i), by the network that predicts masked words
    log-odds    log P(x_i is original | x) / P(x_i was replaced | x), by ELECTRA's discriminator, or by the encoder of
                multiple choice, for which it is the log-odds of [NOTA]
    objective   log p(x_i | x without x_i), by both networks of ELECTRA or of multiple choice together

The last inverts the way in which the two networks were trained. With the mask rate m, the generator's probability q of
x_i and the true probability p, a token is x_i and original with probability p (1 - m + m q), and x_i and replaced with
probability (1 - p) m q. So an optimal discriminator's odds are o = p (1 - m + m q) / ((1 - p) m q), and

    p / (1 - p) = o m q / (1 - m + m q)

With a fraction f of the tokens without a mask in the training of multiple choice, whose scores are corrected for f, the
last m q is m q / f, because no token with a mask is skipped.

(Electric, Clark et al. 2020, arXiv 2012.08561, derives a similar score for a network trained for it.)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor, nn

from fastbert.data.tokenizer import WordPiece
from fastbert.data.tokenizer_check import quiet_transformers
from fastbert.errors import UserError, abbreviated, brief
from fastbert.hub.folders import check_model_folder
from fastbert.hub.load import BERT_ONLY, LARGEST_CONFIG, Pretrained, load_pretrained, tokenizer_of
from fastbert.hub.names import head_of
from fastbert.model.config import check_length
from fastbert.model.encoder import Encoder
from fastbert.model.heads import ReplacedHead
from fastbert.objectives.objective import Objective
from fastbert.objectives.replacement import Replacement
from fastbert.pretraining.evaluate_options import EvaluateOptions
from fastbert.pretraining.held_out import find_checkpoint, trained_objective
from fastbert.progress import progress
from fastbert.records import read_json
from fastbert.training.hardware import resolve_device, resolve_precision, setup_machine

UNREADABLE = (StrictDataclassError, SafetensorError, UnpicklingError)
"""Exceptions of transformers for a configuration or weights that are damaged, or a pickle of other things than
weights."""
PLL, DISCRIMINATOR = "pll", "discriminator"


@dataclass(frozen=True)
class Scorer:
    """A model on its device in evaluation mode, as functions of token ids."""

    source: str
    """Path of the model, for messages."""
    tokenizer: Tokenizer
    """Reads "[MASK]" and other special tokens in a text as ordinary text."""
    mask_id: int
    unk_id: int | None
    positions: int
    """Length of the longest sequence without extrapolation, in tokens."""
    check_length: Callable[[int, str], str | None]
    """`fastbert.model.config.check_length` for this model."""
    device: torch.device
    precision: str
    word_logits: Callable[[Tensor, Tensor], Tensor] | None = None
    """Maps rows, int64 [B, T], and one masked position of each, int64 [B], to logits [B, V]."""
    log_odds: Callable[[Tensor], Tensor] | None = None
    """Maps rows [B, T] to the log-odds [B, T] that their tokens are original."""
    mask_rate: float | None = None
    """Mask rate of the training, where both functions exist."""
    unmasked_fraction: float = 1.0
    """Fraction of the tokens without a mask that `log_odds` was trained with."""
    names: tuple[str, ...] = (PLL,)
    """Names of the scores, the main one first: that of `word_logits`; that of `log_odds`; or those of both together, of
    `log_odds` and of `word_logits`."""

    def combined(self, log_q: np.ndarray, log_odds: np.ndarray) -> np.ndarray:
        """log p from the generator's log q and the encoder's log-odds (see the module's docstring)."""
        masked = math.log(self.mask_rate) + log_q
        odds = log_odds + masked - np.log(1 - self.mask_rate + np.exp(masked) / self.unmasked_fraction)
        return -np.logaddexp(0, -odds)


def open_scorer(options: EvaluateOptions) -> Scorer:
    """Opens the model of `options`.

    Raises:
        UserError: there is no model, it has no tokenizer, or it can score no token.
    """
    device = resolve_device(options.machine.device)
    precision, _ = resolve_precision(options.machine.precision, device)
    setup_machine(options.machine, device)
    on = {"source": options.model, "device": device, "precision": precision}
    if is_foreign(Path(options.model)):
        return open_foreign(options.model, on)
    pretrained = load_pretrained(options.model)
    vocabulary = tokenizer_of(pretrained)
    on |= _wordpiece(pretrained, vocabulary)
    checkpoint = None if (Path(options.model) / "config.json").is_file() else find_checkpoint(Path(options.model))
    if head_of(pretrained.weights) == "replaced" and checkpoint is None:
        return Scorer(
            **on, log_odds=_discriminator(pretrained, options.machine.kernels, device), names=(DISCRIMINATOR,)
        )
    objective = trained_objective(options.model, pretrained, vocabulary, options.machine.kernels, None)
    return Scorer(**on, **_of_objective(objective.to(device).eval()))


def _wordpiece(pretrained: Pretrained, vocabulary: WordPiece) -> dict[str, Any]:
    tokenizer = vocabulary.build()
    tokenizer.encode_special_tokens = True
    return {
        "tokenizer": tokenizer,
        "mask_id": vocabulary.ids["[MASK]"],
        "unk_id": vocabulary.ids["[UNK]"],
        "positions": pretrained.config.max_positions,
        "check_length": partial(check_length, pretrained.config),
    }


def _of_objective(objective: Objective) -> dict[str, Any]:
    """Fields of `Scorer` from an objective with its trained networks."""
    network = objective.word_network
    if network is None:
        raise UserError(f"the objective {type(objective).__name__} predicts no words; give a model with an MLM head")

    def word_logits(ids: Tensor, positions: Tensor) -> Tensor:
        return objective.word_logits(network(ids, only=positions[:, None])[:, 0])

    if not isinstance(objective, Replacement):
        return {"word_logits": word_logits}
    return {
        "word_logits": word_logits,
        "log_odds": objective.original_log_odds,
        "mask_rate": objective.options.mask_rate,
        "unmasked_fraction": objective.options.unmasked_fraction,
        "names": (*objective.score_names, objective.second_network),
    }


def _discriminator(pretrained: Pretrained, kernels: str, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The log-odds of an ELECTRA without its generator."""
    encoder, head = Encoder(pretrained.config, kernels), ReplacedHead(pretrained.config)
    for prefix, module in (("encoder.", encoder), ("head.", head)):
        found = {name.removeprefix(prefix): w for name, w in pretrained.weights.items() if name.startswith(prefix)}
        module.load_state_dict(found)
        module.to(device).eval()
    return lambda ids: -head(encoder(ids)).float()


# --- other models of transformers


def is_foreign(folder: Path) -> bool:
    """True for a masked language model of transformers that `load_pretrained` does not read: another architecture than
    BERT, a BERT with another activation or position encoding, or an ELECTRA's generator."""
    path = check_model_folder(folder) / "config.json"
    if not path.is_file():
        return False
    settings = read_json(path, "model configuration", dict, LARGEST_CONFIG)
    architectures, family = settings.get("architectures"), settings.get("model_type", "")
    if not isinstance(family, str):
        raise UserError(f"{path}: model_type must be a name, not {brief(family)}")
    generator = isinstance(architectures, list) and "ElectraForMaskedLM" in architectures
    unusual = any(settings.get(name, value) != value for name, value in BERT_ONLY.items())
    return family not in ("bert", "electra", "fastbert") or generator or (family == "bert" and unusual)


@progress("reading the model")
def open_foreign(folder: str, on: dict[str, Any]) -> Scorer:
    """Opens a model with transformers; no code of the folder is executed.

    Args:
        on: source, device and precision of the `Scorer`.

    Raises:
        UserError: it is damaged, or no masked language model, or has no tokenizer with a mask.
    """
    from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

    strict = {"local_files_only": True, "trust_remote_code": False}
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(folder, **strict)
            tokenizer = AutoTokenizer.from_pretrained(folder, **strict)
            model, report = AutoModelForMaskedLM.from_pretrained(
                folder,
                config=config,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below
                dtype=torch.float32,
                **strict,
            )
    except (OSError, ValueError, KeyError, *UNREADABLE) as error:
        # Only the first sentence: for a pickle the next ones advise loading it with any code in it.
        reason = brief(str(error).strip().partition("\n")[0].split(". ")[0].rstrip(": "), str)
        lacking = "it lacks " if isinstance(error, KeyError) else ""
        hint = "" if (Path(folder) / "tokenizer.json").is_file() else "; it has no tokenizer.json"
        raise UserError(
            f"transformers cannot open {folder} as a masked language model: {lacking}{reason}{hint}"
        ) from None
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"{folder} has no masked head: its weights lack {abbreviated(missing)}; give a model that was saved as "
            f"{type(model).__name__}"
        )
    if mismatched := sorted(name for name, *_ in report["mismatched_keys"]):
        raise UserError(f"the weights in {folder} have other shapes than its config.json: {abbreviated(mismatched)}")
    if not tokenizer.is_fast or tokenizer.mask_token_id is None:
        raise UserError(f"the tokenizer in {folder} needs a tokenizer.json and a mask token; save it again with both")
    backend = tokenizer.backend_tokenizer
    if set(backend.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise UserError(f"{folder} has no tokenizer: its vocabulary has only special tokens; save it with the model")
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    # RoBERTa and its relatives number positions from padding_idx + 1.
    unused = getattr(getattr(model.base_model, "embeddings", None), "padding_idx", -1) + 1
    longest = min(tokenizer.model_max_length, (getattr(config, "max_position_embeddings", None) or 512) - unused)
    model.to(on["device"]).eval()

    def check(length: int, what: str) -> None:
        if length > longest:
            raise UserError(f"{what} is longer than the {longest} positions of {folder}; shorten it")

    return Scorer(
        **on,
        tokenizer=backend,
        mask_id=tokenizer.mask_token_id,
        unk_id=tokenizer.unk_token_id,
        positions=longest,
        check_length=check,
        word_logits=partial(masked_logits, model),
    )


def masked_logits(model: nn.Module, ids: Tensor, positions: Tensor) -> Tensor:
    """Logits [B, V] of a model of transformers at one position of each row, int64 [B].

    The matrix of the vocabulary is multiplied at these positions alone, which bounds the memory, if the model has it as
    a module (all families that we tried but MobileBERT).
    """
    rows = torch.arange(len(ids), device=ids.device)
    decoder = model.get_output_embeddings()
    hook = decoder.register_forward_pre_hook(lambda _, inputs: inputs[0][rows, positions][:, None])
    try:
        logits = model(input_ids=ids).logits
    finally:
        hook.remove()
    return logits[:, 0] if logits.shape[1] == 1 else logits[rows, positions]
