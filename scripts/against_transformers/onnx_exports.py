"""Converts exports to ONNX with both exporters of torch, and runs them with onnxruntime on batch sizes and lengths
other than the traced ones, also on rows longer than the positions where the encoding extrapolates.

    pip install onnx onnxscript onnxruntime
    python scripts/against_transformers/onnx_exports.py

A small model with random weights for every position encoding is exported, opened by transformers, converted and
compared with itself. Prints a table of the largest differences of the logits, relative to the largest logit; exit code
1 if one exceeds `TOLERANCE`.
"""

import sys
import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path

if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]:
    raise SystemExit(f"missing packages: pip install {' '.join(missing)}")

import onnxruntime
import torch
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, logging

from fastbert.data.tokenizer import WordPiece
from fastbert.hub.export import export_model
from fastbert.model.config import EncoderConfig
from fastbert.model.encoder import Encoder, initialize
from fastbert.model.heads import MLMHead
from fastbert.model.positions import POSITIONS

TOLERANCE = 1e-5
MAX_LENGTH = 72
TRACED = (2, 9)
SHAPES = ((2, 9), (1, 1), (1, 5), (3, 20), (5, MAX_LENGTH))
BEYOND = (2, MAX_LENGTH + 28)
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz")


class Logits(nn.Module):
    """A model with tensors for its inputs and its output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        return self.model(input_ids, attention_mask, token_type_ids=token_type_ids).logits


def new_model(position: str, folder: Path) -> nn.Module:
    """A model of fastbert's own class, loaded from an export. It has pre-norm, because post-norm with absolute
    positions would be transformers' BERT."""
    sizes = {"layers": 2, "width": 32, "heads": 4, "ffn": 64, "max_positions": MAX_LENGTH}
    config = EncoderConfig(vocab_size=len(WORDS), position=position, norm="pre", **sizes)
    encoder = Encoder(config)
    head = MLMHead(config, encoder.words)
    with torch.no_grad():
        initialize(encoder, seed=0, std=0.3)
        initialize(head, seed=0, std=0.3)
    weights = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    weights |= {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
    WordPiece(WORDS).save(folder / "tokenizer")
    export_model(config, weights, folder / "tokenizer", folder / position)
    return Logits(AutoModelForMaskedLM.from_pretrained(folder / position, trust_remote_code=True)).eval()


def batch(rows: int, length: int) -> dict[str, Tensor]:
    """Segments of a pair; each row is three tokens shorter than the one before, but not empty."""
    index = torch.arange(length).expand(rows, -1)
    real = (length - 3 * torch.arange(rows)).clamp(min=1)[:, None]
    words = torch.randint(5, len(WORDS), (rows, length), generator=torch.Generator().manual_seed(length))
    return {
        "input_ids": words,
        "attention_mask": (index < real).long(),
        "token_type_ids": (index >= length // 2).long(),
    }


def convert(model: nn.Module, dynamo: bool, file: Path) -> None:
    """Writes `file` with torch.export's program or, without `dynamo`, TorchScript's."""
    if dynamo:
        axes = dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
        options = {"dynamic_shapes": dict.fromkeys(INPUTS, axes), "verbose": False}
    else:
        options = {"dynamic_axes": {name: {0: "batch", 1: "length"} for name in (*INPUTS, "logits")}}
    names = {"input_names": list(INPUTS), "output_names": ["logits"]}
    torch.onnx.export(model, tuple(batch(*TRACED).values()), file, dynamo=dynamo, **names, **options)


def worst_difference(model: nn.Module, file: Path, shapes: tuple[tuple[int, int], ...]) -> float:
    """The largest difference of a logit over all `shapes`, relative to the largest logit."""
    session = onnxruntime.InferenceSession(file)
    worst = 0.0
    for shape in shapes:
        inputs = batch(*shape)
        expected = model(*inputs.values())
        (found,) = session.run(["logits"], {name: tensor.numpy() for name, tensor in inputs.items()})
        worst = max(worst, ((torch.from_numpy(found) - expected).abs().max() / expected.abs().max()).item())
    return worst


@torch.no_grad()
def main() -> int:
    warnings.simplefilter("ignore")  # the exporters' own
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print("| position encoding | torch.export | TorchScript |\n|---|---|---|")
    failed = False
    for position in POSITIONS:
        with tempfile.TemporaryDirectory() as folder:
            model = new_model(position, Path(folder))
            shapes = (*SHAPES, BEYOND) if POSITIONS[position].extrapolates else SHAPES
            cells = []
            for dynamo in (True, False):
                file = Path(folder) / f"{dynamo}.onnx"
                convert(model, dynamo, file)
                cells.append(worst_difference(model, file, shapes))
        failed = failed or not all(cell <= TOLERANCE for cell in cells)
        print(f"| {position} | {cells[0]:.1e} | {cells[1]:.1e} |", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
