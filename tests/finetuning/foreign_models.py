"""Tiny models of other architectures with random weights, as transformers saves them, and their tokenizers."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

FAMILIES = ("roberta", "xlm-roberta", "distilbert", "modernbert")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
LENGTH = 40


def tiny_tokenizer(family: str, texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with the special tokens of RoBERTa or of ModernBERT; WordPiece for DistilBERT; Unigram for
    XLM-R."""
    if family in ("roberta", "xlm-roberta"):
        specials = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "cls": "<s>", "sep": "</s>"}
        specials["mask"] = "<mask>"
    else:
        specials = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    cls, sep = specials["cls"], specials["sep"]
    names = list(dict.fromkeys(specials.values()))
    settings = {"vocab_size": 300, "special_tokens": names, "show_progress": False}
    if family == "distilbert":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(**settings)
    elif family == "xlm-roberta":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **settings)
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(initial_alphabet=alphabet, **settings)
    tokenizer.train_from_iterator(texts, trainer)
    twice = f"{sep} {sep}" if "roberta" in family else sep
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {twice} $B {sep}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (cls, sep)],
    )
    roles = {f"{role}_token": token for role, token in specials.items()}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=LENGTH, **roles)


def tiny_foreign(folder: Path, family: str, texts: Sequence[str], **settings) -> PreTrainedModel:
    """Saves a masked language model with its tokenizer in `folder`, and returns it."""
    tokenizer = tiny_tokenizer(family, texts)
    tokenizer.save_pretrained(folder)
    sizes = SIZES if family != "distilbert" else {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48}
    special = {"pad_token_id": tokenizer.pad_token_id, "cls_token_id": tokenizer.cls_token_id}
    special |= {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
    special |= {"sep_token_id": tokenizer.sep_token_id} if family == "modernbert" else {}
    positions = LENGTH + (1 + tokenizer.pad_token_id if "roberta" in family else 0)
    more = {"type_vocab_size": 1} if "roberta" in family else {}
    more |= {"local_attention": 8, "global_attn_every_n_layers": 2} if family == "modernbert" else {}
    values = {"vocab_size": len(tokenizer), "max_position_embeddings": positions, "initializer_range": 0.2}
    config = CONFIG_MAPPING[family].from_dict({**values, **sizes, **special, **more, **settings})
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zeros would hide that one is lost
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return model
