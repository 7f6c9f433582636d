"""Every position encoding against its equations, written out in float64 with loops, values and gradients."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.bloom.modeling_bloom import _get_alibi_slopes
from transformers.models.t5.modeling_t5 import T5Attention

from fastbert.errors import UserError
from fastbert.model.config import EncoderConfig, check_length
from fastbert.model.encoder import Encoder, initialize
from fastbert.model.positions import POSITIONS
from fastbert.model.positions.alibi import Alibi
from fastbert.model.positions.encoding import rotate
from fastbert.model.positions.relative import relative_bucket
from fastbert.model.positions.rotary import Rotary

P, T, H, D = 12, 9, 2, 8  # P positions
d = D // H


def config(position: str, **changes) -> EncoderConfig:
    values = {
        "vocab_size": 30,
        "layers": 2,
        "width": D,
        "heads": H,
        "ffn": 16,
        "max_positions": P,
        "position": position,
        "type_vocab_size": 0,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "norm_eps": 1e-12,
    }
    return EncoderConfig(**(values | changes))


def build(position: str, **changes) -> Encoder:
    encoder = Encoder(config(position, **changes)).double()
    initialize(encoder, seed=1, std=0.3)
    with torch.no_grad():  # biases and LayerNorms away from their neutral values
        for number, parameter in enumerate(encoder.parameters()):
            if parameter.dim() == 1:
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
                parameter.add_(0.1 * noise.double())
    return encoder


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (16, 64)])
def test_buckets_equal_t5s(buckets: int, distance: int) -> None:
    offsets = torch.arange(-600, 601)
    theirs = T5Attention._relative_position_bucket(offsets, True, buckets, distance)
    torch.testing.assert_close(relative_bucket(offsets, buckets, distance), theirs)
    assert buckets // 2 not in theirs


def test_buckets_by_hand() -> None:
    offsets = torch.tensor([0, -1, -7, -8, -127, -128, -10_000, 1, 7, 8, 10_000])
    assert relative_bucket(offsets).tolist() == [0, 1, 7, 8, 15, 15, 15, 17, 23, 24, 31]


def relative_by_hand(table: torch.Tensor, i: int, j: int) -> torch.Tensor:
    n = abs(j - i)
    bucket = n if n < 8 else min(15, 8 + int(math.log(n / 8) / math.log(128 / 8) * 8))
    return table[bucket + (16 if j > i else 0)]


def linear(module, y: torch.Tensor) -> torch.Tensor:
    return y @ module.weight.T + (0 if module.bias is None else module.bias)


def tupe_by_hand(encoding, length: int, cls: str) -> torch.Tensor:
    """reset((p_i Uq)(p_j Uk)^T / sqrt(2d) [+ b]), one entry at a time."""
    p = torch.nn.functional.layer_norm(encoding.table.weight, (D,), encoding.norm.weight, encoding.norm.bias, 1e-5)
    q, k = linear(encoding.query, p), linear(encoding.key, p)
    rows = []
    for h in range(H):
        part = slice(h * d, (h + 1) * d)
        theta1 = q[-2, part] @ k[-2, part] / math.sqrt(2 * d)
        theta2 = q[-1, part] @ k[-1, part] / math.sqrt(2 * d)
        for i in range(length):
            for j in range(length):
                value = q[min(i, P - 1), part] @ k[min(j, P - 1), part] / math.sqrt(2 * d)
                if hasattr(encoding, "relative"):
                    value = value + relative_by_hand(encoding.relative.table.weight, i, j)[h]
                if cls == "untied" and i == 0:
                    value = theta1
                elif cls == "untied" and j == 0:
                    value = theta2
                rows.append(value)
    return torch.stack(rows).view(H, length, length)


def rotated_by_hand(x: torch.Tensor, base: float) -> torch.Tensor:
    """RoPE for one head [T, d], as complex numbers: x_n + i x_(n + d/2) times e^(i p base^(-2n/d))."""
    exponents = torch.arange(d // 2) * (2 / d)
    angles = torch.arange(len(x))[:, None] * base**-exponents
    rotated = torch.complex(x[:, : d // 2], x[:, d // 2 :]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([rotated.real, rotated.imag], -1)


def encoder_by_hand(encoder: Encoder, ids: torch.Tensor) -> torch.Tensor:
    """The whole encoder from its equations, one head at a time."""
    c, layer_norm = encoder.config, torch.nn.functional.layer_norm
    tupe, length = c.position.startswith("tupe"), len(ids)
    x = encoder.words.weight[ids]
    if c.position in ("absolute", "relative"):
        x = x + encoder.positions.table.weight[[min(i, P - 1) for i in range(length)]]
    x = layer_norm(x, (D,), encoder.embedding_norm.weight, encoder.embedding_norm.bias, c.norm_eps)
    bias = torch.zeros(H, length, length, dtype=torch.float64)
    if tupe:
        bias = tupe_by_hand(encoder.positions, length, c.cls_attention)
    elif c.position == "relative":
        table = encoder.positions.relative.table.weight
        bias = torch.stack([torch.stack([relative_by_hand(table, i, j) for j in range(length)]) for i in range(length)])
        bias = bias.permute(2, 0, 1)
    elif c.position == "alibi":
        index = torch.arange(length)
        bias = torch.stack([-(2.0 ** (-8 * (h + 1) / H)) * (index[:, None] - index).abs() for h in range(H)])

    def norm(module, y):
        return layer_norm(y, (D,), module.weight, module.bias, c.norm_eps)

    def attend(block, y):
        q, k, v = linear(block.attention.qkv, y).split(D, -1)
        heads = []
        for h in range(H):
            part = slice(h * d, (h + 1) * d)
            q_, k_ = q[:, part], k[:, part]
            if c.position == "rope":
                q_, k_ = rotated_by_hand(q_, c.rope_base), rotated_by_hand(k_, c.rope_base)
            scores = q_ @ k_.T / math.sqrt(2 * d if tupe else d) + bias[h]
            heads.append(scores.softmax(-1) @ v[:, part])
        return linear(block.attention.out, torch.cat(heads, -1))

    def feed(block, y):
        inner = linear(block.feed_forward.up, y)
        inner, gate = inner.split(c.ffn, -1) if c.feed_forward == "geglu" else (inner, 1)
        return linear(block.feed_forward.down, inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2))) * gate)

    for block in encoder.blocks:
        if c.norm == "pre":
            x = x + attend(block, norm(block.attention_norm, x))
            x = x + feed(block, norm(block.feed_forward_norm, x))
        else:
            x = norm(block.attention_norm, x + attend(block, x))
            x = norm(block.feed_forward_norm, x + feed(block, x))
    return norm(encoder.final_norm, x) if c.norm == "pre" else x


VARIANTS = [{"position": p, "norm": n} for p in POSITIONS for n in ("post", "pre")]
VARIANTS += [{"position": "tupe-a", "cls_attention": "tied"}, {"position": "tupe-r", "cls_attention": "tied"}]
VARIANTS += [{"position": p, "feed_forward": "geglu", "bias": False, "rope_base": 50.0} for p in POSITIONS]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(map(str, variant.values())))
def test_encoder_equals_its_equations(variant: dict) -> None:
    """Beyond the 12 positions too, except for absolute ones."""
    encoder = build(**variant)
    length = T if variant["position"] == "absolute" else P + 3
    ids = torch.randint(0, 30, (2, length), generator=torch.Generator().manual_seed(3))
    ours = encoder(ids)
    theirs = torch.stack([encoder_by_hand(encoder, row) for row in ids])
    close = 1e-10 if encoder.config.position != "rope" else 1e-5  # its angles are float32
    torch.testing.assert_close(ours, theirs, rtol=close, atol=close)
    direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    names, parameters = zip(*encoder.named_parameters(), strict=True)
    mine = torch.autograd.grad((ours * direction).sum(), parameters, allow_unused=True)
    by_hand = torch.autograd.grad((theirs * direction).sum(), parameters, allow_unused=True)
    for name, a, b in zip(names, mine, by_hand, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(
                a, b, rtol=10 * close, atol=10 * close, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_reset_rows_and_columns() -> None:
    bias = build("tupe-r").positions.bias(T, None)[0]
    assert (bias[:, 0] == bias[:, 0, :1]).all()
    assert (bias[:, 1:, 0] == bias[:, 1:2, 0]).all()
    assert (bias[:, 0, 0] != bias[:, 1, 0]).all()


@pytest.mark.parametrize(("position", "cls_attention"), [("tupe-a", "untied"), ("tupe-a", "tied")])
def test_tupe_a_is_low_rank(position: str, cls_attention: str) -> None:
    """methods/tupe: the bias is an inner product of d + 2 numbers, so its rank is at most that."""
    wide = build(position, cls_attention=cls_attention, max_positions=40)
    bias = wide.positions.bias(40, None)[0]
    assert (torch.linalg.matrix_rank(bias) <= d + 2).all()


@pytest.mark.parametrize("power", [1, 2, 4, 8, 16])
def test_slopes_of_alibi(power: int) -> None:
    """As bloom has them, for all head counts up to the next power of two; and as in the paper where it is one."""
    for heads in range(power, 2 * power):
        found = Alibi(config("alibi", heads=heads, width=heads)).slopes()
        torch.testing.assert_close(found, _get_alibi_slopes(heads, torch.device("cpu")), rtol=1e-6, atol=0)
        if heads == power:
            assert found.tolist() == pytest.approx([2 ** (-8 * (h + 1) / heads) for h in range(heads)])


def test_alibi_counts_steps_between_positions() -> None:
    encoding = Alibi(config("alibi"))
    whole, restarted = encoding.bias(4, None), encoding.bias(4, torch.tensor([[0, 1, 2, 1], [0, 1, 2, 3]]))
    assert whole.shape == (1, H, 4, 4) and restarted.shape == (2, H, 4, 4) and not whole.requires_grad
    assert torch.equal(restarted[1], whole[0])
    assert restarted[0, 0, 0].tolist() == [0, -1 / 16, -2 / 16, -1 / 16]
    assert restarted[0, 1, 3].tolist() == [-1 / 256, 0, -1 / 256, 0]


@pytest.mark.parametrize("position", ["relative", "tupe-a", "tupe-r", "alibi"])
def test_a_bias_is_that_of_the_positions(position: str) -> None:
    encoding, positions = build(position).positions, torch.tensor([[0, 1, 2, 1], [3, 0, 9, 4]])
    whole = encoding.bias(12, None)[0]
    for bias, row in zip(encoding.bias(4, positions), positions, strict=True):
        torch.testing.assert_close(bias, whole[:, row[:, None], row])


@given(st.integers(0, 300), st.integers(0, 300), st.integers(0, 300), st.sampled_from([2.0, 1e4, 1.6e5]))
def test_scores_of_rope_depend_on_the_distance_alone(i: int, j: int, shift: int, base: float) -> None:
    encoding, generator = Rotary(config("rope", width=16, rope_base=base)), torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 2, 1, 8, generator=generator).double()

    def score(i: int, j: int) -> torch.Tensor:
        turn_q, turn_k = (encoding.rotation(1, torch.tensor([[index]])) for index in (i, j))
        return (rotate(q, turn_q) * rotate(k, turn_k)).sum(-1)

    torch.testing.assert_close(score(i, j), score(i + shift, j + shift), rtol=0, atol=5e-4)  # angles to 600 in float32
    if i == j:
        torch.testing.assert_close(score(i, j), (q * k).sum(-1), rtol=0, atol=1e-5)
    elif abs(i - j) < 100:
        assert ((score(i, j) - (q * k).sum(-1)).abs() > 1e-4).all()


def test_schemes_without_a_table_have_no_weights() -> None:
    assert [name for name in POSITIONS if not config(name).has_position_table()] == ["rope", "alibi"]
    for position in ("rope", "alibi"):
        encoding = build(position).positions
        assert encoding.state_dict() == {} and not list(encoding.parameters())


def with_longer_table(encoder: Encoder, positions: int) -> Encoder:
    """The same encoder with `positions`, whose table of positions is padded with copies of its last row."""
    added, weights = positions - encoder.config.max_positions, encoder.state_dict()
    if (table := weights.get("positions.table.weight")) is not None:
        last = encoder.config.max_positions - 1
        rows = [table[: last + 1], table[last].expand(added, -1), table[last + 1 :]]
        weights["positions.table.weight"] = torch.cat(rows)  # after the positions, rows of [CLS] in TUPE
    longer = Encoder(replace(encoder.config, max_positions=positions)).double()
    longer.load_state_dict(weights)
    return longer


BEYOND = [{"position": position} for position in POSITIONS if position != "absolute"]
BEYOND += [{"position": "tupe-a", "cls_attention": "tied"}, {"position": "tupe-r", "cls_attention": "tied"}]


@pytest.mark.parametrize("variant", BEYOND, ids=lambda variant: "-".join(variant.values()))
def test_positions_beyond_the_table_have_its_last_row(variant: dict) -> None:
    """12 positions: 19 tokens equal those of an encoder with a longer table. With 8 buckets and distances to 16, the
    largest distance is in the last bucket, but that of 12 tokens is not."""
    encoder = build(**variant, relative_buckets=8, relative_max_distance=16)
    longer = with_longer_table(encoder, 30)
    ids = torch.randint(0, 30, (2, 19), generator=torch.Generator().manual_seed(6))
    index = torch.arange(19)
    padding = {"attention_mask": (index < torch.tensor([[19], [14]])).long()}
    packing = {"position_ids": torch.stack([index, torch.where(index < 4, index, index - 4)])}
    for options in ({}, padding, packing):
        torch.testing.assert_close(encoder(ids, **options), longer(ids, **options), rtol=1e-12, atol=1e-12)
    alone, padded = encoder(ids[1:, :14]), encoder(ids, **padding)[1:, :14]
    torch.testing.assert_close(padded, alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("position", list(POSITIONS))
def test_positions_of_one_row_are_those_of_all(position: str) -> None:
    """With an offset, which only moves [CLS] away where scores depend on distances alone."""
    encoder, ids = build(position), torch.randint(0, 30, (3, 7), generator=torch.Generator().manual_seed(7))
    moved = torch.tensor([[0, *range(5, 11)]])
    torch.testing.assert_close(encoder(ids, position_ids=moved), encoder(ids, position_ids=moved.expand(3, 7)))
    assert not torch.allclose(encoder(ids, position_ids=moved), encoder(ids))


def test_lengths_that_an_encoder_can_read() -> None:
    for position in POSITIONS:
        assert check_length(config(position), 12, "length 12") is None
        if position == "absolute":
            with pytest.raises(UserError, match=r"length 13 is longer than the 12 positions .* absolute defines none"):
                check_length(config(position), 13, "length 13")
            with pytest.raises(ValueError, match=r"13 tokens is longer than the 12 positions, and .* absolute defines"):
                build(position)(torch.zeros(1, 13, dtype=torch.long))
        else:
            warning = check_length(config(position), 13, "text 1")
            assert "text 1 is longer than the 12 positions" in warning and f"{position} extrapolates" in warning


@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_no_cast_rounds_angles_and_slopes(position: str) -> None:
    encodings = POSITIONS[position](config(position)), POSITIONS[position](config(position)).to(torch.bfloat16)
    parts = [encoding.rotation(T, None) if position == "rope" else (encoding.bias(T, None),) for encoding in encodings]
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(*parts, strict=True))


@pytest.mark.parametrize("position", list(POSITIONS))
def test_padded_packed_and_alone_are_the_same(position: str) -> None:
    encoder = build(position)
    generator = torch.Generator().manual_seed(5)
    a, b = (torch.randint(0, 30, (1, n), generator=generator) for n in (4, 6))
    alone = encoder(a), encoder(b)
    pad = torch.zeros(1, 2, dtype=torch.long)
    padded = encoder(torch.cat([torch.cat([a, pad], 1), b]), attention_mask=torch.tensor([[1] * 4 + [0] * 2, [1] * 6]))
    torch.testing.assert_close(padded[:1, :4], alone[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(padded[1:], alone[1], rtol=1e-12, atol=1e-12)
    packed = encoder(
        torch.cat([a, b], 1),
        document_ids=torch.tensor([[0] * 4 + [1] * 6]),
        position_ids=torch.tensor([[*range(4), *range(6)]]),
    )
    torch.testing.assert_close(packed[:, :4], alone[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(packed[:, 4:], alone[1], rtol=1e-12, atol=1e-12)


def test_positions_make_a_difference() -> None:
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    for position in POSITIONS:
        encoder = build(position)
        swapped = encoder(ids[:, [0, 2, 1, 3, 4]])[:, [0, 2, 1, 3, 4]]
        assert (swapped - encoder(ids)).abs().max() > 1e-3, position
