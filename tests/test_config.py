from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert import config
from fastbert.errors import UserError
from fastbert.flags import parse
from fastbert.pretraining.options import PretrainOptions, science
from tests.small_options import Inner, Lifted, Outer, write


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nam: y", "x.yaml: unknown option 'nam'; did you mean 'name'"),
        ("rate: 1", "x.yaml: unknown option 'rate'; it belongs under inner or speed"),
        ("inner:\n  rat: 1", "inner: unknown option 'rat'; did you mean 'rate'"),
        ("layers: three", r"layers must be a whole number, found text \('three'\)"),
        ("layers: 3.5", r"layers must be a whole number, found a number \(3.5\)"),
        ("fast: 1", r"fast must be true or false, found a whole number \(1\)"),
        ("name: 3", "name must be text"),
        ("name: [a]", "name must be text, found a list"),
        ("inner: 3", "expected a mapping of options"),
        ("- name", "expected a mapping of options, found a list"),
        ("name: [", "is not valid YAML"),
    ],
)
def test_yaml_that_does_not_fit(tmp_path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config.load_yaml(Outer, write(tmp_path, text))


def test_files_that_are_no_yaml(tmp_path) -> None:
    with pytest.raises(UserError, match="configuration file"):
        config.load_yaml(Outer, tmp_path / "none.yaml")
    with pytest.raises(UserError, match="is a folder"):
        config.load_yaml(Outer, tmp_path)
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UserError, match="not UTF-8 text"):
        config.load_yaml(Outer, tmp_path / "b.yaml")


@pytest.mark.parametrize("number", ["inf", "-inf", "nan"])
def test_numbers_are_finite(number: str, tmp_path) -> None:
    """An infinity is above any least value, and would end as Infinity in JSON."""
    with pytest.raises(UserError, match=rf"--optimizer.clip-norm must be a finite number, not '{number}'"):
        parse(PretrainOptions, [f"--optimizer.clip-norm={number}"], "pretrain")
    path = write(tmp_path, f"optimizer: {{clip_norm: {number.replace('inf', '.inf').replace('nan', '.nan')}}}")
    with pytest.raises(UserError, match=rf"optimizer: clip_norm must be a finite number, not {number}"):
        config.load_yaml(PretrainOptions, path)


def test_round_trip_through_yaml(tmp_path) -> None:
    options = parse(PretrainOptions, ["--steps", "5", "--mlm.whole-word", "--optimizer.eps", "1e-7"], "pretrain")
    path = write(tmp_path, config.to_yaml(options))
    assert config.load_yaml(PretrainOptions, path) == options


@settings(max_examples=50)
@given(
    st.floats(1e-30, 1e30) | st.floats(-1e30, -1e-30) | st.just(0.0),
    st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1, max_size=60).filter(str.strip),
    st.booleans(),
)
def test_any_value_survives_yaml(rate: float, name: str, fast: bool) -> None:
    options = Outer(name, Inner(rate), Lifted(None, fast))
    assert config.from_dict(Outer, yaml.safe_load(config.to_yaml(options)), "x") == options


def test_leaves_have_roles_and_flat_names() -> None:
    roles = {leaf.name: leaf.role for leaf in config.leaves(Outer())}
    assert roles == {
        "name": "science",
        "long_name": "science",
        "inner.rate": "science",
        "layers": "science",
        "fast": "science",
        "speed.rate": "machine",
    }


def options(*flags: str) -> PretrainOptions:
    absolute = () if "--position" in flags else ("--position", "absolute")
    return parse(PretrainOptions, ["--steps", "10", *absolute, *flags], "pretrain")


@pytest.mark.parametrize(
    ("flags", "same"),
    [
        (["--seed", "1"], False),
        (["--position", "tupe-r"], False),
        (["--mlm.mask-rate", "0.3"], False),
        (["--optimizer.learning-rate", "2e-4"], False),
        (["--batch-size", "8"], False),
        (["--machine.micro-batch-size", "8"], True),
        (["--machine.threads", "1"], True),
        (["--eval-every", "3"], True),
        (["--checkpoint-every", "3"], True),
        (["--feed-forward", "geglu"], False),
        (["--no-bias"], False),
        (["--cls-attention", "tied"], True),  # without TUPE it has no effect
        (["--rope-base", "500"], True),  # nor this without rope
        (["--schedule.decay", "0.5"], True),  # nor this without wsd
    ],
)
def test_the_experiments_hash(flags: list[str], same: bool) -> None:
    before = config.digest(science(options(), "data"))
    assert (config.digest(science(options(*flags), "data")) == before) == same
    assert config.digest(science(options(), "other data")) != before


def test_cls_counts_with_tupe() -> None:
    a, b = (options("--position", "tupe-a", "--cls-attention", cls) for cls in ("tied", "untied"))
    assert config.digest(science(a, "")) != config.digest(science(b, ""))


def test_berts_experiments_keep_their_names() -> None:
    """Options that came later count only where they are used, so that runs from before them can be resumed."""
    later = {
        "feed_forward",
        "bias",
        "rope_base",
        "first_length",
        "first_fraction",
        "first_offset",
        "initial_batch_size",
        "batch_warmup",
    }
    assert not {*later, "optimizer.momentum"} & science(options(), "").keys()


def test_the_base_counts_with_rope() -> None:
    a, b = (options("--position", "rope", "--rope-base", base) for base in ("10000", "160000"))
    assert config.digest(science(a, "")) != config.digest(science(b, ""))


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[1] / "configs" / "pretrain").glob("*.yaml")), ids=lambda path: path.stem
)
def test_the_configurations_that_are_shipped(path: Path) -> None:
    shipped = config.load_yaml(PretrainOptions, path)
    # The sentences of BLiMP have up to 47 tokens with 8,192 words; the ablations of study.yaml leave out longer pairs.
    longest = 32 if path.stem == "study" else 64
    assert shipped.encoder.resolve(shipped.vocab_size, shipped.length).max_positions >= longest
    assert sum(budget is not None for budget in (shipped.steps, shipped.tokens, shipped.minutes)) == 1
