"""Parts of `fastbert active`: queries, replay of SDS2, memory, seeds, files of rounds, curves."""

from types import SimpleNamespace

import numpy as np
import pytest

from fastbert.errors import UserError
from fastbert.finetuning.continual.memory import Memory, read_memory, write_memory
from fastbert.finetuning.continual.options import ReplayOptions
from fastbert.finetuning.continual.outputs import Outputs
from fastbert.finetuning.continual.tuner import Cost
from fastbert.finetuning.kinds.classes import Classes
from fastbert.studies.active.acquire import acquire
from fastbert.studies.active.curves import Curves, area
from fastbert.studies.active.options import round_files
from fastbert.studies.active.pool import permuted, round_seed
from fastbert.studies.active.submodular import submodular


def test_areas_and_costs_by_hand() -> None:
    assert area([10, 20, 40], [0.0, 1.0, 1.0]) == pytest.approx((10 * 0.5 + 20) / 30)
    assert area([10], [0.7]) == 0.7

    def row(model: str, seed: int, number: int, score: float, **cost: int) -> dict:
        figures = {"dev": {"matched": {"accuracy": score - 0.1}, "mismatched": {"accuracy": score + 0.1}}}
        return {
            **{"model": model, "seed": seed, "round": number, "labels": 10 * number, "metrics": ["accuracy"]},
            **{"cost": Cost(**cost).to_dict(), "seconds_training": 1.0, "seconds_query": 0.5, **figures},
        }

    rows = [row("a", seed, number, 0.5 + 0.1 * number, gradients=30, pool=3) for seed in (0, 1) for number in (2, 1)]
    rows += [row("b", 0, 1, 0.9, trials=3, forwards=3), row("b", 0, 2, 0.7), row("b", 1, 1, 0.9)]
    curves = Curves.of(rows, [], ["a", "b"], [10, 20])
    assert {name: list(chains) for name, chains in curves.chains.items()} == {"a": [0, 1], "b": [0]}
    assert curves.means("a", "score") == pytest.approx([0.6, 0.7])
    assert curves.means("a", "training") == [30, 60] and curves.means("a", "total") == [31, 62]
    assert curves.means("a", "seconds_total") == [1.5, 3.0]
    assert curves.means("b", "training") == [4, 4]
    (compared,) = curves.compared
    assert (compared.other, compared.result.n, compared.verdict) == ("b", 1, "undecided")
    assert compared.result.mean == pytest.approx(0.8 - 0.65)
    assert curves.cost_to_reach("b", 0.85) == (10, 4, 4) and curves.cost_to_reach("a", 0.85) is None


def test_files_of_rounds_are_in_the_order_of_their_numbers(tmp_path) -> None:
    for name in ("round-10.jsonl", "round-9.csv.gz", "2-labels.jsonl"):
        (tmp_path / name).write_text("")
    (tmp_path / ".round-1.jsonl.swp").write_text("")
    assert [path.name for path in round_files(tmp_path)] == ["2-labels.jsonl", "round-9.csv.gz", "round-10.jsonl"]


STATES = np.array([[0, 0], [0, 1], [9, 9], [9, 8], [0, 9]], np.float32)
LOGITS = np.array([[3, 0], [1, 0], [0, 0.5], [0, 0.6], [0.1, 0]], np.float32)
"""Two clusters and a text apart; texts 4, 2 and 3 are those with the highest entropy."""


def test_each_query() -> None:
    """Texts in the order of their selection; text 1 is labelled."""
    asked: list[list[int]] = []

    def outputs(rows: np.ndarray) -> Outputs:
        asked.append(rows.tolist())
        return Outputs(LOGITS[rows], STATES[rows])

    def found(query: str, count: int) -> list[int]:
        asked.clear()
        kind = Classes(("bad", "good"))
        return acquire(query, kind, np.array([3, 0, 4, 1, 2]), np.array([1]), count, outputs)[0].tolist()

    assert found("random", 3) == [3, 0, 4] and asked == []
    for query in ("entropy", "margin", "least-confidence"):
        assert found(query, 3) == [4, 2, 3] and asked == [[3, 0, 4, 2]]
    assert found("k-centre", 2) == [2, 4] and asked == [[3, 0, 4, 2], [1]]
    assert found("facility-location", 4)[0] in (2, 3) and sorted(found("facility-location", 4)) == [0, 2, 3, 4]


@pytest.mark.parametrize(
    ("settings", "chosen"),
    [
        ({}, {4, 2, 1}),
        ({"entropy_weight": 0.0}, {0, 2, 4}),
        ({"entropy_weight": 100.0}, {2, 3, 4}),
        ({"width": 100.0}, {2, 3, 4}),
    ],
)
def test_replay_of_sds2(settings, chosen) -> None:
    """One text of each cluster and the one apart, where entropies decide which one of a cluster; with a large weight,
    or a kernel in which all texts are alike, those with the highest entropies."""
    state = {"replay": 3, "candidates": 5, "old": 5, "seed": 0, "progress": SimpleNamespace(step=2)}
    kinds = SimpleNamespace(module=SimpleNamespace(kinds={"t": Classes(("bad", "good"))}))
    used = ReplayOptions(candidates=5).used("sds2", 3) | {"width": 2.0} | settings
    tuner = SimpleNamespace(
        **state, settings=used, updater=kinds, outputs=lambda rows: Outputs(LOGITS[rows], STATES[rows])
    )
    found = submodular(tuner, SimpleNamespace(head="t"))
    assert len(found) == 3
    if settings.get("entropy_weight") == 0.0:  # both texts of a cluster are equally near to each other
        assert len({0, 1} & set(found)) == len({2, 3} & set(found)) == 1 and 4 in found
    else:
        assert set(found) == chosen


def test_a_damaged_memory_is_refused(tmp_path) -> None:
    path, memory = tmp_path / "memory.safetensors", Memory(np.array([3, 0]), np.zeros((2, 2), np.float32))
    write_memory(path, memory)
    assert (read_memory(path, 4, 2).rows == [3, 0]).all()
    for texts, outputs, message in ((3, 2, "rows of other texts"), (4, 3, "does not hold rows and their 3 logits")):
        with pytest.raises(UserError, match=message):
            read_memory(path, texts, outputs)
    write_memory(path, Memory(np.array([3, 3]), memory.logits))
    with pytest.raises(UserError, match="does not hold rows"):
        read_memory(path, 4, 2)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"damaged .* remove .* to train its round again"):
        read_memory(path, 4, 2)


def test_seeds_of_rounds() -> None:
    """The first round has the seed itself, so that it equals a fine-tuning; all are in the range of seeds."""
    assert round_seed(5, 1) == 5
    seeds = {round_seed(seed, number) for seed in (0, 1, 2**63 - 1) for number in range(1, 50)}
    assert len(seeds) == 3 * 49 and min(seeds) >= 0 and max(seeds) < 2**63
    assert sorted(permuted(9, 0)) == list(range(9)) and list(permuted(9, 0)) != list(permuted(9, 1))
