"""YAML files that inherit: what is merged, where paths start from, what is refused; and the files in configs/."""

from pathlib import Path

import pytest
import yaml

from fastbert.cli import main
from fastbert.config import load_yaml, to_dict
from fastbert.errors import UserError
from fastbert.finetuning.options import FinetuneOptions
from fastbert.finetuning.tasks import CustomTaskOptions
from fastbert.finetuning.weak.functions import Reader
from fastbert.inheritance import LONGEST_CHAIN, merged, read_yaml
from fastbert.pretraining.options import PretrainOptions
from fastbert.studies.ablate.options import load_ablation
from fastbert.studies.active.options import load_active
from fastbert.studies.pipelines.load import load_pipeline
from fastbert.studies.sweep.options import load_sweep

CONFIGS = Path(__file__).parents[1] / "configs"


def write(folder: Path, files: dict[str, dict]) -> Path:
    """Writes YAML files; returns the first."""
    for name, values in files.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(yaml.safe_dump(values, sort_keys=False))
    return folder / next(iter(files))


def test_mappings_are_merged_and_the_rest_is_replaced(tmp_path, monkeypatch) -> None:
    """Through a chain of files in other folders, at the top and inside, also inside lists."""
    files = {
        "a.yaml": {
            "inherits": "sub/b.yaml",
            "list": [3],
            "group": {"x": 1, "deep": {"y": None}},
            "inner": {"inherits": "sub/c.yaml", "own": 1},
            "entries": [{"inherits": "sub/c.yaml"}, 2],
            "from-c": 4,
        },
        "sub/b.yaml": {"inherits": "c.yaml", "list": [1, 2], "group": {"z": 2, "deep": {"y": 5, "w": 6}}},
        "sub/c.yaml": {"from_c": 7, "last": True},
    }
    path = write(tmp_path, files)
    monkeypatch.chdir(tmp_path.parent)
    values, where = read_yaml(path)
    assert values == {
        "from_c": 4,  # the same option with - and _
        "last": True,
        "list": [3],
        "group": {"z": 2, "deep": {"y": None, "w": 6}, "x": 1},
        "inner": {"from_c": 7, "last": True, "own": 1},
        "entries": [{"from_c": 7, "last": True}, 2],
    }
    assert where == f"{path}, which inherits {tmp_path}/sub/b.yaml, {tmp_path}/sub/c.yaml"
    assert merged({"a_b": 1}, {"a-b": 2, "a_b": 3}) == {"a_b": 3, "a-b": 2}  # given twice, which is refused later


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as error:
        read_yaml(path)
    return str(error.value)


def test_what_cannot_be_inherited(tmp_path) -> None:
    a, b, c = (tmp_path / f"{name}.yaml" for name in "abc")
    write(tmp_path, {"a.yaml": {"inherits": "b.yaml"}, "b.yaml": {"inherits": "a.yaml"}})
    assert refusal(a).startswith(f"{a} inherits {b} inherits {a}: the files inherit each other in a cycle")
    write(tmp_path, {"b.yaml": {"inner": {"inherits": "c.yaml"}}})
    assert refusal(a).startswith(f"{a} inherits {b}: configuration file {c} does not exist")
    c.write_text("x: [")
    assert refusal(a).startswith(f"{a} inherits {b}: {c} is not valid YAML")
    c.write_text("- x")
    assert f"{a} inherits {b} inherits {c}: the inherited file must be a mapping" in refusal(a)
    for name in (["b.yaml"], 3, None, ""):
        write(tmp_path, {"a.yaml": {"inherits": name}})
        assert f"{a}: inherits must be the path of one YAML file, found {name!r}" in refusal(a)
    # Each level twice the files of the one below.
    levels = {f"{n}.yaml": {key: {"inherits": f"{n + 1}.yaml"} for key in "xy"} for n in range(12)}
    assert "too many files; at most 64" in refusal(write(tmp_path, levels | {"12.yaml": {"x": 1}}))
    chain = {f"{n}.yaml": {"inherits": f"{n + 1}.yaml"} for n in range(LONGEST_CHAIN + 1)}
    assert "16 of them in a chain" in refusal(write(tmp_path, chain | {"17.yaml": {"x": 1}}))
    assert read_yaml(tmp_path / "2.yaml")[0] == {"x": 1}


def test_the_files_of_fastbert_are_inherited_from_any_folder(tmp_path) -> None:
    path = write(tmp_path, {"a.yaml": {"inherits": "configs/pretrain/tiny.yaml", "width": 64}})
    assert load_yaml(PretrainOptions, path) == load_yaml(
        PretrainOptions, write(tmp_path, {"b.yaml": {"inherits": str(CONFIGS / "pretrain" / "tiny.yaml"), "width": 64}})
    )
    for name in ("configs/../setup.yaml", "configs/pretrain/no.yaml", "pretrain/tiny.yaml"):
        write(tmp_path, {"a.yaml": {"inherits": name}})
        assert f"configuration file {tmp_path / name} does not exist" in refusal(path)
    own = write(tmp_path, {"configs/pretrain/tiny.yaml": {"x": 1}})  # a file that exists comes first
    write(tmp_path, {"a.yaml": {"inherits": "configs/pretrain/tiny.yaml"}})
    assert own.is_file() and read_yaml(path)[0] == {"x": 1}


def test_every_job_reads_them(tmp_path, capsys) -> None:
    write(tmp_path, {"base.yaml": {"layers": 3, "optimizer": {"eps": 1e-7}, "steps": 4}})
    path = write(tmp_path, {"run.yaml": {"inherits": "base.yaml", "steps": None, "optimizer": {"beta2": 0.9}}})
    options = load_yaml(PretrainOptions, path)
    assert (options.encoder.layers, options.optimizer.eps, options.optimizer.beta2) == (3, 1e-7, 0.9)
    assert options.steps is None
    write(tmp_path, {"base.yaml": {"learning-rate": 1e-3, "task": "cola", "lables": "x"}})
    assert main(["finetune", str(write(tmp_path, {"tune.yaml": {"inherits": "base.yaml", "seeds": 2}}))]) == 2
    assert f"tune.yaml, which inherits {tmp_path}/base.yaml: unknown option 'lables'" in capsys.readouterr().err


LOADERS = {
    "pretrain": lambda path: load_yaml(PretrainOptions, path),
    "finetune": lambda path: load_yaml(FinetuneOptions, path),
    "tasks": lambda path: load_yaml(CustomTaskOptions, path),
    "sweep": load_sweep,
    "ablate": load_ablation,
    "active": load_active,
    "pipelines": load_pipeline,
    "weak": lambda path: [
        Reader(name, spec, ("0", "1"), path.parent) for name, spec in read_yaml(path)[0]["functions"].items()
    ],
}


def test_all_configs_load() -> None:
    found = sorted(CONFIGS.rglob("*.yaml"))
    assert {path.parts[-2] for path in found} == set(LOADERS)
    loaded = {str(path.relative_to(CONFIGS)): LOADERS[path.parts[-2]](path) for path in found}
    tiny, electra = (to_dict(loaded[f"pretrain/{name}.yaml"]) for name in ("tiny", "tiny-electra"))
    assert {name for name in tiny if tiny[name] != electra[name]} == {"objective", "electra", "optimizer"}
    (muon, _), (adamw, _) = (loaded[f"ablate/{name}.yaml"] for name in ("study", "study-adamw"))
    assert (muon.budget, muon.points, muon.seeds) == (adamw.budget, adamw.points, adamw.seeds)
    assert muon.grid.evaluate == adamw.grid.evaluate and muon.variants[0].name == adamw.variants[0].name
