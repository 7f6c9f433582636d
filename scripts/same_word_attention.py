"""How much an encoder's heads look from a word at the same word in the other sentence of a pair:

    python scripts/same_word_attention.py stsb --glue-dir glue MODEL...

MODEL is a run, a checkpoint of one, or an export; the pairs are of the task's dev split, as fine-tuning reads them. For
every token of the second sentence that stands in the first too, it is the attention to its first place there, times the
length of the input, so that 1 is a head which looks everywhere alike; the mean over all such tokens, for each head.
"""

import argparse
import sys
from dataclasses import replace

import torch
from fastbert_kernels import attention_reference
from torch import Tensor

from fastbert.data.tokenizer import load_tokenizer
from fastbert.errors import UserError
from fastbert.finetuning.tasks import open_task
from fastbert.hub.load import build_encoder, load_pretrained
from fastbert.model.encoder import Encoder


def same_words(ids: list[int], second: int, special: set[int]) -> list[tuple[int, int]]:
    """Places (in the second sentence, in the first) of equal tokens; the second sentence begins at `second`."""
    first: dict[int, int] = {}
    for place, word in enumerate(ids[:second]):
        first.setdefault(word, place)
    return [(p, first[w]) for p, w in enumerate(ids) if p >= second and w not in special and w in first]


@torch.no_grad()
def attentions(encoder: Encoder, ids: list[int], types: list[int]) -> Tensor:
    """[layers, heads, T, T], the probabilities of one sequence: what comes out where the values are one-hot places."""
    found: list[Tensor] = []
    function = encoder.kernels.attention

    def shown(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, **given) -> Tensor:
        places = torch.eye(len(ids)).expand(*q.shape[:2], -1, -1)
        found.append(attention_reference(q, k, places, bias, scale=given["scale"])[0])
        return function(q, k, v, bias, **given)

    kernels, encoder.kernels = encoder.kernels, replace(encoder.kernels, attention=shown)
    try:
        encoder(torch.tensor([ids]), token_type_ids=torch.tensor([types]))
    finally:
        encoder.kernels = kernels
    return torch.stack(found)


def same_word_attention(encoder: Encoder, pairs: list[tuple[list[int], int]], special: set[int]) -> Tensor:
    """[layers, heads]; pairs are ids and the place where the second sentence begins."""
    found = []
    for ids, second in pairs:
        if twins := same_words(ids, second, special):
            types = [0] * second + [1] * (len(ids) - second)
            rows, columns = (torch.tensor(places) for places in zip(*twins, strict=True))
            found.append(len(ids) * attentions(encoder, ids, types)[:, :, rows, columns])
    if not found:
        raise UserError("no pair that fits into the model's positions has a word in common; try more --pairs")
    return torch.cat(found, dim=-1).mean(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", help="a GLUE task of pairs, or the YAML file of one's own")
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--glue-dir", help="folder of the official GLUE archive, or of Parquet files")
    parser.add_argument("--pairs", type=int, default=500, help="how many of the dev split, from its start (500)")
    given = parser.parse_args()
    task = open_task(given.task, glue_dir=given.glue_dir)
    if not task.is_pair:
        raise UserError(f"{given.task} has single sentences; name a task of pairs, such as stsb")
    examples = task.examples("dev")[: given.pairs]
    for model in given.models:
        pretrained = load_pretrained(model)
        encoder, _ = build_encoder(pretrained)
        vocabulary = load_tokenizer(pretrained.tokenizer)
        tokenizer = vocabulary.build()
        encoded = [tokenizer.encode(example.text, example.pair) for example in examples]
        room = encoder.config.max_positions
        pairs = [(pair.ids, pair.type_ids.index(1)) for pair in encoded if len(pair.ids) <= room]
        table = same_word_attention(encoder.eval(), pairs, set(vocabulary.special_ids))
        print(f"{model}: highest {table.max():.1f}")
        for layer, heads in enumerate(table.tolist(), 1):
            print(f"  layer {layer}: " + "  ".join(f"{value:.1f}" for value in heads))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
