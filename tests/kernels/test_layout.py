"""`kernels/` must not be importable under that name: transformers probes for a package called `kernels`."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_kernels_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_transformers_builds_a_bert_from_the_root() -> None:
    code = (
        "import transformers\n"
        "config = transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=10)\n"
        "print(type(transformers.BertModel(config)).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "BertModel", done.stderr


def test_kernels_import_nothing_of_fastbert() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        for line in path.read_text().splitlines():
            assert not line.strip().startswith(("import fastbert ", "from fastbert ", "from fastbert.")), path
