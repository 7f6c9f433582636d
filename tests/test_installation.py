"""An installed wheel carries the configurations, which are found by name from any folder."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastbert.errors import UserError
from fastbert.named_configs import config_path, named_configs

ROOT = Path(__file__).parents[1]


def test_a_wheel_carries_the_configurations(tmp_path: Path) -> None:
    source, site, elsewhere = (tmp_path / name for name in ("source", "site", "elsewhere"))
    source.mkdir()
    elsewhere.mkdir()
    for name in ("fastbert", "kernels", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "setup.py", "--quiet", "build", "--build-lib", str(site)]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    for name, suffix in (("fastbert", ".py"), ("fastbert", ".js"), ("configs", ".yaml")):
        built = site / "fastbert" / ("configs" if name == "configs" else "")
        expected = {path.relative_to(ROOT / name): path.read_bytes() for path in (ROOT / name).rglob(f"*{suffix}")}
        assert expected and expected == {
            path.relative_to(built): path.read_bytes() for path in built.rglob(f"*{suffix}")
        }
    code = "from fastbert.cli import main; main(['pretrain', 'tiny', '--help'])"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(site)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert "given: muon" in " ".join(done.stdout.split()) and not list(elsewhere.iterdir())


def test_configurations_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert config_path("pretrain", "tiny") == str(ROOT / "configs" / "pretrain" / "tiny.yaml")
    assert {"base", "modernbert"} <= named_configs("pretrain").keys() and "study" in named_configs("ablate")
    assert config_path("run", "encoder-study") == str(ROOT / "configs" / "pipelines" / "encoder-study.yaml")
    for name in ("new.yaml", "folder/tiny", "./tiny"):  # paths are read as they are
        assert config_path("pretrain", name) == name
    with pytest.raises(UserError, match="no configuration of that name for fastbert pretrain; did you mean tiny"):
        config_path("pretrain", "tny")
    with pytest.raises(UserError, match="known names: base, "):
        config_path("pretrain", "x1")
    monkeypatch.chdir(tmp_path)
    Path("tiny").write_text("steps: 1\n")
    assert config_path("pretrain", "tiny") == "tiny"  # an existing file has precedence
