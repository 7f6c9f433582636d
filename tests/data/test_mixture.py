"""Several sources: their order, their fractions in every part, where a mixture ends, and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastbert.data.prepare import PrepareOptions, prepare
from fastbert.data.sources import open_source
from fastbert.data.sources.combined import Mixture, parse_weights
from fastbert.data.sources.source import Chunk, Source
from fastbert.errors import UserError


def memory(name: str, texts: list[str]) -> Source:
    sizes = [len(text.encode()) for text in texts]
    chunk = Chunk(sum(sizes), lambda: ((sum(sizes[: n + 1]), t) for n, t in enumerate(texts)))
    return Source(name, name, {"kind": name}, sum(sizes), [chunk])


@st.composite
def mixtures(sample: st.DrawFn) -> tuple[list[list[str]], list[float]]:
    count = sample(st.integers(2, 4))
    letters = "abcé"
    texts = [[letters[n] * size for size in sample(st.lists(st.integers(1, 40), min_size=1))] for n in range(count)]
    raw = [sample(st.integers(1, 20)) for _ in range(count)]
    return texts, [weight / sum(raw) for weight in raw]


@settings(max_examples=200)
@given(mixtures())
def test_fractions_hold_in_every_prefix_and_order_is_retained(given_: tuple[list[list[str]], list[float]]) -> None:
    texts, weights = given_
    mixture = Mixture("all", [memory(str(n), part) for n, part in enumerate(texts)], weights)
    given, total, longest = [0] * len(texts), 0, max(len(text.encode()) for part in texts for text in part)
    found: list[list[str]] = [[] for _ in texts]
    for text in mixture.documents():
        found[mixture.part].append(text)
        given[mixture.part] += len(text.encode())
        total += len(text.encode())
        assert 0 <= mixture.position <= mixture.size
        for given_bytes, weight in zip(given, weights, strict=True):
            assert weight * (total - longest * len(texts)) - 1e-6 <= given_bytes <= weight * total + longest + 1e-6
    assert all(part[: len(got)] == got for part, got in zip(texts, found, strict=True))
    assert mixture.ended_by is not None and found[mixture.ended_by] == texts[mixture.ended_by]
    assert list(mixture.documents()) == list(mixture.documents())


def test_a_mixture_ends_where_a_source_does(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join("aaaa" for _ in range(100)))
    (tmp_path / "b.txt").write_text("\n\n".join("bbbb" for _ in range(10)))
    mixture = open_source(f"{tmp_path}/a.txt,{tmp_path}/b.txt", weights="0.75, 0.25")
    documents = list(mixture.documents())
    assert documents.count("bbbb") == 10 and documents.count("aaaa") == 31 and mixture.ended_by == 1
    assert mixture.name == "a+b"


def test_dropped_duplicates_that_change_the_fractions_are_reported(tmp_path: Path, capsys) -> None:
    documents = [f"{chr(97 + n % 26) * 40} {n}" for n in range(60)]
    (tmp_path / "a.txt").write_text("\n\n".join(documents))
    (tmp_path / "b.txt").write_text("\n\n".join(documents[:40] + [f"{n} {'z' * 40}" for n in range(20)]))
    source = f"{tmp_path}/a.txt,{tmp_path}/b.txt"
    options = PrepareOptions(source, str(tmp_path / "out"), vocab_size=256, weights="0.5,0.5", workers=1)
    for drop in (False, True):
        prepare(replace(options, drop_duplicates=drop, out=f"{options.out}-{drop}"))
        printed = capsys.readouterr().err
        assert ("a.txt has 75.1% of the bytes, not 50.0%" in printed) == drop, printed


def test_a_list_is_read_one_after_the_other(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("1\n\n2")
    (tmp_path / "b.jsonl").write_text('{"body": "3"}\n{"body": "4"}')
    found = open_source(f"{tmp_path}/a.txt,{tmp_path}/b.jsonl", column="text,body")
    assert [(found.part, text) for text in found.documents()] == [(0, "1"), (0, "2"), (1, "3"), (1, "4")]
    assert found.position == found.size and found.ended_by is None
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(UserError, match=r"a.txt' has no text"):
        list(open_source(f"{tmp_path}/a.txt,{tmp_path}/b.jsonl", column="body").documents())
    with pytest.raises(UserError, match="3 columns for 2 sources"):
        open_source(f"{tmp_path}/a.txt,{tmp_path}/b.jsonl", column="a,b,c")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("0.7", "1 weight for 2 sources; give --weights one number for each"),
        ("0.2,0.3,0.5", "3 weights for 2 sources"),
        ("1.2,-0.2", "weight -0.2 is not greater than 0; leave out sources"),
        ("1,0", "weight 0 is not greater than 0"),
        ("nan,1", "weight nan is not greater than 0"),
        ("inf,1", "weight inf is not greater than 0"),
        ("7,3", "the weights 7,3 sum to 10, not to 1; for these proportions write 0.7,0.3"),
        ("0.7;0.3", "weights '0.7;0.3' are not comma-separated numbers"),
        ("", "are not comma-separated numbers"),
    ],
)
def test_invalid_weights(tmp_path: Path, weights: str, message: str) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    with pytest.raises(UserError) as caught:
        open_source(f"{tmp_path}/a.txt,{tmp_path}/b.txt", weights=weights)
    assert message in str(caught.value)


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=12))
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_the_proposed_weights_are_accepted(raw: list[int]) -> None:
    text = ",".join(map(str, raw))
    try:
        weights = parse_weights(text, len(raw))
    except UserError as error:
        weights = parse_weights(str(error).rpartition(" ")[2], len(raw))
    assert weights == pytest.approx([weight / sum(raw) for weight in raw], rel=1e-5)


def test_weights_belong_to_the_identity(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    spec = f"{tmp_path}/a.txt,{tmp_path}/b.txt"
    identities = [open_source(spec, weights=weights).identity for weights in (None, "0.5,0.5", "0.50, .5", "0.4,0.6")]
    assert identities[1] == identities[2]
    assert len({str(identity) for identity in identities}) == 3
