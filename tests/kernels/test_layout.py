"""`kernels/` must not be importable under that name: transformers probes for a package called `kernels`."""

import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]


def test_kernels_is_not_a_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_transformers_builds_a_bert_from_the_root() -> None:
    code = (
        "import transformers\n"
        "config = transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=10)\n"
        "print(type(transformers.BertModel(config)).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "BertModel", done.stderr


def test_importing_the_kernels_loads_neither_triton_nor_a_compiler() -> None:
    code = "import sys, fastbert_kernels; print({'triton', 'torch._dynamo', 'matplotlib'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "set()", done.stderr


def test_every_package_is_installed(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path("setup.py")
    folders = [path.parent for top in ("fastbert", "kernels") for path in (ROOT / top).rglob("__init__.py")]
    names = {".".join(path.relative_to(ROOT).parts).removeprefix("kernels.") for path in folders}
    configs = {
        ".".join(("fastbert", *path.parent.relative_to(ROOT).parts)) for path in (ROOT / "configs").rglob("*.yaml")
    }
    assert set(setup.call_args.kwargs["packages"]) == names | configs | {"fastbert.configs"}
