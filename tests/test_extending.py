"""The examples of docs/extending.md, each registered by one line: they train, resume, export, open in transformers,
evaluate and fine-tune."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastbert.errors import UserError
from fastbert.flags import parse
from fastbert.hub.load import load_pretrained
from fastbert.model.positions import POSITIONS
from fastbert.objectives import OBJECTIVES
from fastbert.pretraining.options import PretrainOptions
from fastbert.pretraining.pretrain import pretrain
from fastbert.registry import Variant
from fastbert.training.options import OPTIMIZERS
from tests.flags import main
from tests.pretrained import build_encoder

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
IDS = [[2, *range(5, 44)], [2, *range(50, 89)]]  # beyond the 32 positions
# Opens a model as a user without fastbert does, in a process that cannot import it, and saves its hidden states.
OPEN = f"""
import sys
sys.modules["fastbert"] = sys.modules["fastbert_kernels"] = None
import torch
from safetensors.torch import save_file
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
with torch.no_grad():
    save_file({{"hidden": model(torch.tensor({IDS})).last_hidden_state}}, sys.argv[2])
"""


def example(path: str) -> str:
    """The Python code on the page under the sentence that ends with `path`."""
    found = re.search(rf"`{re.escape(path)}`:\n\n```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found, f"docs/extending.md has no code for {path}"
    return found[1]


@pytest.fixture
def modules(tmp_path, monkeypatch) -> Path:
    """A folder whose modules can be imported during a test."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(folder)):
            del sys.modules[name]


def learned(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "step-00000004" / "model.safetensors")


def lives(flags: list[str], corpus: Path, folder: Path, evaluated: str = "export") -> None:
    """Trains with `flags`, resumes to the same bits, exports, opens in transformers, evaluates (the export or the run)
    and fine-tunes. The position encoding must extrapolate."""
    run, resumed = folder / "run", folder / "resumed"
    short = ["--steps", "4", "--checkpoint-every", "2", "--eval-every", "4", "--eval-sequences", "8"]
    assert main(["pretrain", *flags, *short, "--out", str(run)]) == 0
    shutil.copytree(run, resumed)
    for rest in ("checkpoints/step-00000004", "model"):
        shutil.rmtree(resumed / rest)
    assert main(["pretrain", "--resume", str(resumed)]) == 0
    weights = learned(run)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in learned(resumed).items())
    assert main(["export", str(resumed), "--out", str(folder / "export")]) == 0
    opened_without_fastbert(folder / "export", folder)
    assert main(["evaluate", "--model", str(folder / evaluated), "--source", str(corpus), "--length", "32"]) == 0
    (folder / "task.tsv").write_text("text\tlabel\nthe state\tgood\nof the union\tbad\n" * 8)
    own = ["--custom.train", str(folder / "task.tsv"), "--custom.dev", str(folder / "task.tsv")]
    tuned = ["--out", str(folder / "tuned"), "--seeds", "1", "--epochs", "1", "--machine.threads", "1"]
    assert main(["finetune", "--model", str(folder / "export"), "--task", "toy", *own, *tuned]) == 0


def opened_without_fastbert(model: Path, folder: Path) -> None:
    """Compares the hidden states in transformers, without fastbert, with those of our encoder."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", OPEN, str(model), str(folder / "hidden.safetensors")]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    encoder, _ = build_encoder(load_pretrained(model))
    with torch.no_grad():
        ours = encoder.eval()(torch.tensor(IDS))
    torch.testing.assert_close(load_file(folder / "hidden.safetensors")["hidden"], ours, rtol=1e-5, atol=1e-5)


def test_a_position_scheme_is_one_file_and_one_line(modules, flags, corpus, tmp_path, monkeypatch) -> None:
    (modules / "toy_scheme.py").write_text(example("fastbert/model/positions/kerple.py"))
    monkeypatch.setitem(POSITIONS.lines, "toy", Variant("toy_scheme:Kerple"))
    lives([*flags, "--position", "toy"], corpus, tmp_path)
    assert learned(tmp_path / "run")["encoder.positions.numbers"].shape == (2, 2)


# An objective's options are flags from the start of a process.
LIVE = """
import sys
from pathlib import Path
from fastbert.objectives import OBJECTIVES
from fastbert.registry import Variant
folder, corpus, *flags = sys.argv[1:]
sys.path.insert(0, f"{folder}/modules")
OBJECTIVES.register("random-substitution", Variant("toy_objective:Substitution", "toy_objective:SubstitutionOptions"))
from tests.test_extending import lives
lives(flags, Path(corpus), Path(folder), evaluated="run")
"""


def test_an_objective_is_one_file_and_one_line(modules, flags, corpus, tmp_path) -> None:
    """With notes, so that these are written too. Its head is one of transformers': that of ELECTRA."""
    (modules / "toy_objective.py").write_text(example("fastbert/objectives/substitution.py"))
    own = ["--objective", "random-substitution", "--random-substitution.replaced-weight", "5"]
    notes = ["--notes.enabled"]
    command = [sys.executable, "-c", LIVE, str(tmp_path), str(corpus), *flags, *own, *notes]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert learned(tmp_path / "run")["notes.writes"].any()
    science = json.loads((tmp_path / "run" / "manifest.json").read_text())["science"]
    assert science["random_substitution.replaced_weight"] == 5.0 and "mlm.mask_rate" not in science
    architectures = json.loads((tmp_path / "export" / "config.json").read_text())["architectures"]
    assert architectures == ["FastBertForPreTraining"]
    assert re.search(r"Held-out documents\n.*\n  loss +[0-9.]+\n  accuracy +0\.[0-9]+\n\nModel", done.stdout)
    assert re.search(r"\[UNK\].*\n  loss +[0-9.]+\n  accuracy +0\.[0-9]+\n", done.stdout)


def test_an_optimizer_is_one_file_and_one_line(modules, flags, corpus, tmp_path, monkeypatch) -> None:
    (modules / "toy_optimizer.py").write_text(example("fastbert/training/lion.py"))
    monkeypatch.setitem(OPTIMIZERS.lines, "toy", Variant("toy_optimizer:build_lion"))
    lives([*flags, "--optimizer.name", "toy", "--optimizer.learning-rate", "1e-4"], corpus, tmp_path)
    state = load_file(tmp_path / "run" / "checkpoints" / "step-00000004" / "optimizer.safetensors")
    assert any(name.endswith("momentum") and tensor.any() for name, tensor in state.items())


REFUSED = {
    "another package": ("import numpy\n", "", r"toy_scheme\.py, line 1, is `import numpy`"),
    "more of fastbert": ("from fastbert.errors import UserError\n", "", "is `from fastbert.errors import UserError`"),
    "later": ("", "from fastbert.model.positions.alibi import Alibi", "is `from fastbert.model.positions.alibi"),
    "as": (
        "from fastbert_kernels.hashing import combine as c\n",
        "",
        "is `from fastbert_kernels.hashing import combine as c`",
    ),
    "methods of EncoderConfig": ("", "config.scaled(8)", "fails with `.* no attribute 'scaled'`"),
    "EncoderConfig": ("", "print(EncoderConfig)", "fails with `name 'EncoderConfig' is not defined`"),
    "with positions alone": (
        "",
        "bias = self.bias\n        self.bias = lambda length, ids: bias(length, ids) if ids is None else EncoderConfig",
        "fails with `name 'EncoderConfig' is not defined`",
    ),
    "a name of the model": (
        "def layer_norm():\n    pass\n",
        "",
        r"both modeling_fastbert\.py .* define layer_norm",
    ),
    "a hidden buffer": (
        "",
        "self.inner = torch.nn.Module()\n        self.inner.register_buffer('x', torch.ones(1), persistent=False)",
        r"its buffer inner\.x is not saved and belongs to a submodule",
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_scheme_that_no_export_can_carry_is_refused_before_training(
    why, modules, flags, tmp_path, monkeypatch, capsys
):
    top, inside, message = REFUSED[why]
    source = example("fastbert/model/positions/kerple.py").partition('"""\n\n')[2]
    built = "super().__init__(config)\n"
    assert built in source
    (modules / "toy_scheme.py").write_text(top + source.replace(built, f"{built}        {inside}\n"))
    monkeypatch.setitem(POSITIONS.lines, "toy", Variant("toy_scheme:Kerple"))
    assert main(["pretrain", *flags, "--position", "toy", "--out", str(tmp_path / "run")]) == 2
    assert re.search(f"position toy cannot be exported: .*{message}", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


FAULTY = """
import torch
from fastbert.objectives.mlm import MLM


class Toy(MLM):
    def __init__(self, config, *arguments):
        super().__init__(config, *arguments)
        {built}

    {method}


def descent(groups, options, device, world):
    return torch.optim.SGD(groups, lr=0.1)
"""
METRICS = "def metrics(self, measured): return "
EXAMPLES = "def examples(self, *_): return "
# A line of the constructor or a method of an objective, and how it is refused.
ERRORS = {
    "metrics that fail": (METRICS + "measured['nothing']", KeyError, "nothing"),
    "metrics without None": (METRICS + "[] if 2 * measured['loss'] else []", TypeError, "NoneType"),
    "metrics of another type": (METRICS + "[('loss', 1.0)]", AttributeError, "'tuple' object has no attribute"),
    "examples without a heading": (EXAMPLES + "None", TypeError, "cannot unpack"),
    "examples that are no text": (EXAMPLES + "('', [self])", TypeError, "not JSON serializable"),
    "no FLOPs": ("def flops(self, *_): return None", TypeError, "unsupported operand"),
    "a head like ELECTRA's": ("self.head.output = torch.nn.Linear(2, 2)", UserError, "do not fit .*: head.output"),
}


@pytest.mark.parametrize("why", ERRORS)
def test_an_objective_that_would_fail_at_the_end_is_refused_before_training(why, modules, flags, tmp_path, monkeypatch):
    code, error, message = ERRORS[why]
    built, method = ("pass", code) if code.startswith("def") else (code, "")
    (modules / "toy_objective.py").write_text(FAULTY.format(built=built, method=method))
    monkeypatch.setitem(OBJECTIVES.lines, "mlm", Variant("toy_objective:Toy"))
    with pytest.raises(error, match=message):
        pretrain(parse(PretrainOptions, [*flags, "--out", str(tmp_path / "run")], "pretrain"), "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["layers", "optimizer", "multiple_choice"])
def test_the_options_of_an_objective_hide_no_others(name: str) -> None:
    code = f"from fastbert.objectives import OBJECTIVES\nOBJECTIVES.register({name!r}, 'toy:Toy')\n"
    code += "import fastbert.pretraining.options"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PAGE.parents[1], capture_output=True, text=True, timeout=300
    )
    assert f"ValueError: the objective {name!r} needs another name" in done.stderr


def test_an_objective_without_options_of_its_own_has_those_of_all() -> None:
    code = "from fastbert.objectives import OBJECTIVES\nOBJECTIVES.register('plain', 'toy:Plain')\n"
    code += "from fastbert.pretraining.options import PretrainOptions\nprint(PretrainOptions().plain)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PAGE.parents[1], capture_output=True, text=True, timeout=300
    )
    assert done.stdout.startswith("ObjectiveOptions("), done.stderr


def test_an_optimizer_that_cannot_skip_is_refused_before_training(modules, flags, tmp_path, monkeypatch) -> None:
    (modules / "toy_objective.py").write_text(FAULTY.format(built="pass", method=""))
    monkeypatch.setitem(OPTIMIZERS.lines, "adamw", Variant("toy_objective:descent"))
    with pytest.raises(TypeError, match="SGD cannot skip"):
        main(["pretrain", *flags, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_scheme_with_an_option_that_does_not_exist_is_refused_before_training(flags, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(POSITIONS.lines, "alibi", POSITIONS.lines["alibi"]._replace(uses=("slope",)))
    with pytest.raises(AttributeError, match="'slope'"):
        main(["pretrain", *flags, "--position", "alibi", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
