import dataclasses
import itertools
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel

from fastbert.errors import UserError
from fastbert.model.config import SIZES, EncoderConfig
from fastbert.model.encoder import Encoder, SiteDropout, Windows, initialize
from fastbert.model.flops import encoder_flops, encoder_parameters, mlm_head_flops
from fastbert.model.heads import MLMHead, ReplacedHead
from fastbert.model.kernel_choice import KERNELS
from fastbert.model.options import EncoderOptions
from fastbert.model.positions import POSITIONS
from fastbert.randomness import row_keys

SMALL = EncoderOptions(layers=2, width=32, heads=4, dropout=0.0, attention_dropout=0.0)


SHAPES = [
    {"position": position, "norm": norm, "cls_attention": cls, "feed_forward": feed_forward, "bias": bias}
    for position in POSITIONS
    for norm in ("post", "pre")
    for cls in (("untied", "tied") if position.startswith("tupe") else ("untied",))
    for feed_forward, bias in (("gelu", True), ("geglu", False))
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape.values())))
def test_closed_forms_equal_modules_and_torchs_flop_counter(shape: dict) -> None:
    config = dataclasses.replace(SMALL, **shape).resolve(50, 16)
    encoder = Encoder(config, "reference")
    head = MLMHead(config, encoder.words)
    assert sum(p.numel() for p in encoder.parameters()) == encoder_parameters(config)
    ids = torch.randint(0, 50, (3, 16))
    with FlopCounterMode(display=False) as counter:
        hidden = encoder(ids)
    assert counter.get_total_flops() == encoder_flops(config, 3, 16)
    with FlopCounterMode(display=False) as counter:
        encoder(ids, only=torch.tensor([[1, 4, 5]] * 3))
    assert counter.get_total_flops() == encoder_flops(config, 3, 16, last=3) < encoder_flops(config, 3, 16)
    with FlopCounterMode(display=False) as counter:
        logits = head(hidden[:, :5])
    assert counter.get_total_flops() == mlm_head_flops(config, 15)
    with FlopCounterMode(display=False) as counter:
        logits.sum().backward()
    assert counter.get_total_flops() == 2 * (encoder_flops(config, 3, 16) + mlm_head_flops(config, 15))


@pytest.mark.parametrize("width", [*range(8, 256, 8), 512, 768, 1024])
def test_geglu_has_about_as_many_weights_as_gelu(width: int) -> None:
    gelu, geglu = (
        EncoderOptions(width=width, heads=1, feed_forward=name).resolve(50, 16) for name in ("gelu", "geglu")
    )
    assert gelu.ffn == 4 * width and geglu.ffn % (64 if width >= 64 else 8) == 0
    assert 0 <= 3 * geglu.ffn - 2 * gelu.ffn < 3 * (64 if width >= 64 else 8)
    assert EncoderOptions(width=width, heads=1, feed_forward="geglu", ffn=40).resolve(50, 16).ffn == 40


def test_without_biases_only_the_outputs_of_heads_have_one() -> None:
    for position in POSITIONS:
        config = dataclasses.replace(SMALL, position=position, norm="pre", bias=False).resolve(50, 16)
        encoder = Encoder(config)
        heads = torch.nn.ModuleDict({"mlm": MLMHead(config, encoder.words), "replaced": ReplacedHead(config)})
        assert not [name for name, _ in encoder.named_parameters() if name.endswith("bias")], position
        named = [name for name, _ in heads.named_parameters() if name.endswith("bias")]
        assert named == ["mlm.decoder.bias", "replaced.output.bias"]


def test_a_second_network_of_rope_has_heads_of_even_size() -> None:
    config = dataclasses.replace(SMALL, position="rope", width=48, heads=8).resolve(50, 16)
    assert config.scaled(24).head_size == 6 and config.scaled(10).head_size in (2, 10)
    with pytest.raises(UserError, match="multiple of 2, and width 9 with heads 1 gives 9"):
        config.scaled(9)


def test_presets_are_berts() -> None:
    """Parameter counts of the released checkpoints, without their poolers: Devlin et al. 2019, Turc et al. 2019."""
    published = {"tiny": 4.4e6, "mini": 11.3e6, "small": 29.1e6, "base": 110.1e6, "large": 340e6}
    for size in SIZES:
        config = EncoderOptions(size=size, position="absolute").resolve(30522, 512)
        assert abs(encoder_parameters(config) / published[size] - 1) < 0.03, size
    bert = BertModel(BertConfig(), add_pooling_layer=False)
    base = EncoderOptions(size="base", position="absolute").resolve(30522, 512)
    assert sum(p.numel() for p in bert.parameters()) == encoder_parameters(base)


def test_token_types_have_an_effect_if_present() -> None:
    ids, types = torch.tensor([[1, 2, 3]]), torch.tensor([[0, 0, 1]])
    for position, expected in (("absolute", True), ("tupe-r", False)):
        encoder = Encoder(dataclasses.replace(SMALL, position=position).resolve(50, 8))
        initialize(encoder, 0, 0.2)
        assert bool((encoder(ids) != encoder(ids, token_type_ids=types)).any()) == expected
    with_types = Encoder(dataclasses.replace(SMALL, position="tupe-r", type_vocab_size=2).resolve(50, 8))
    initialize(with_types, 0, 0.2)
    assert (with_types(ids) != with_types(ids, token_type_ids=types)).any()


def test_dropout_depends_on_keys_alone() -> None:
    encoder = Encoder(dataclasses.replace(SMALL, dropout=0.1, attention_dropout=0.1, position="tupe-r").resolve(50, 16))
    initialize(encoder, 0, 0.02)
    ids = torch.randint(0, 50, (4, 16))
    keys = row_keys(0, "dropout", 3, torch.arange(4))
    whole = encoder(ids, row_keys=keys)
    torch.testing.assert_close(whole, encoder(ids, row_keys=keys), rtol=0, atol=0)
    parts = torch.cat([encoder(ids[:1], row_keys=keys[:1]), encoder(ids[1:], row_keys=keys[1:])])
    torch.testing.assert_close(whole, parts)
    assert (whole != encoder(ids, row_keys=row_keys(0, "dropout", 4, torch.arange(4)))).any()
    assert (whole != encoder(ids)).any()


def test_each_dropout_site_has_its_own_mask() -> None:
    """Masks of two sites agree at half of the elements, and each attention gets keys that nothing else uses."""
    encoder = Encoder(dataclasses.replace(SMALL, dropout=0.5, attention_dropout=0.5).resolve(50, 16))
    sites = [module for module in encoder.modules() if isinstance(module, SiteDropout)]
    numbers = [module.site.item() for module in encoder.modules() if hasattr(module, "site")]
    assert len(sites) == 1 + 2 * 2 and len(numbers) == len(set(numbers)) == len(sites) + 2
    ones, keys = torch.ones(2, 16, 32), row_keys(0, "dropout", 0, torch.arange(2))
    masks = [site(ones, keys) for site in sites]
    for one, other in itertools.combinations(masks, 2):
        assert 0.4 < (one == other).double().mean() < 0.6
    given = [keys]

    def attention(*arguments, **named):
        given.append(named["keys"])
        return KERNELS["reference"].attention(*arguments, **named)

    encoder.kernels = dataclasses.replace(KERNELS["reference"], attention=attention)
    encoder(torch.zeros(2, 16, dtype=torch.long), row_keys=keys)
    assert len(given) == 3 and torch.cat(given).unique().numel() == 6


def test_each_dropout_has_its_own_probability() -> None:
    encoder = Encoder(dataclasses.replace(SMALL, dropout=0.3, attention_dropout=0.1).resolve(50, 8))
    assert {module.p for module in encoder.modules() if isinstance(module, SiteDropout)} == {0.3}
    assert {block.attention.dropout_p for block in encoder.blocks} == {0.1}


@pytest.mark.parametrize("position", ["absolute", "tupe-r", "rope"])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_windows_get_the_hidden_states_of_all_tokens(norm: str, position: str) -> None:
    """Also if only a part of the tokens is selected, with dropout and several documents in a row."""
    encoder = Encoder(dataclasses.replace(SMALL, norm=norm, position=position, dropout=0.5).resolve(50, 9)).double()
    initialize(encoder, 0, 0.3)
    given = {
        "input_ids": torch.arange(18).view(2, 9),
        "document_ids": torch.tensor([[0] * 4 + [1] * 5, [0] * 9]),
        "position_ids": torch.tensor([[*range(4), *range(1, 6)], [*range(9)]]),
        "row_keys": torch.tensor([7, 8], dtype=torch.int32),
    }
    expected = encoder(**given)
    rows, tokens, found = torch.tensor([1, 0, 1]), torch.tensor([[2, 3, 4], [0, 8, 5], [7, 7, 7]]), []
    for only in (None, slice(1), torch.tensor([[5], [3]])):
        for whole_rows in (False, True):
            encoder(**given, only=only, windows=Windows(rows, tokens, whole_rows, found.append))
    for hidden in found:
        torch.testing.assert_close(hidden, expected[rows[:, None], tokens], rtol=1e-12, atol=1e-12)
        assert not hidden.requires_grad
    assert len(found) == 6


def test_initial_values_depend_on_name_and_seed_alone() -> None:
    tensors = {}
    for position in ("absolute", "tupe-r"):
        encoder = Encoder(dataclasses.replace(SMALL, position=position).resolve(50, 16))
        initialize(encoder, 7, 0.02)
        tensors[position] = encoder.state_dict()
    shared = [name for name in tensors["absolute"] if name in tensors["tupe-r"] and "table" not in name]
    assert len(shared) > 20
    for name in shared:
        torch.testing.assert_close(tensors["absolute"][name], tensors["tupe-r"][name], rtol=0, atol=0)
    weight = tensors["absolute"]["blocks.0.feed_forward.up.weight"]
    assert abs(weight.std().item() - 0.02) < 0.001
    assert (weight != tensors["absolute"]["blocks.1.feed_forward.up.weight"]).any()
    initialize(encoder, 8, 0.02)
    agreement = (encoder.state_dict()["blocks.0.feed_forward.up.weight"] == weight).double().mean()
    assert agreement < 0.01


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": "bass"}, "did you mean 'base'"),
        ({"heads": 5}, "heads 5 do not divide width 32"),
        ({"norm": "middle"}, "unknown norm 'middle'"),
        ({"cls_attention": "tide"}, "did you mean 'tied'"),
        ({"max_positions": 10}, "length 16 is longer than the 10 positions"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"layers": 0}, "layers must be at least 1"),
        ({"feed_forward": "gegl"}, "unknown feed_forward 'gegl'; did you mean 'geglu'"),
        ({"position": "rope", "heads": 32}, "a multiple of 2, and width 32 with heads 32 gives 1; choose another"),
        ({"rope_base": 1.0}, "rope_base must be greater than 1, not 1.0"),
        ({"rope_base": math.nan}, "rope_base must be a finite number, not nan"),
    ],
)
def test_options_that_do_not_fit_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SMALL, **changes).resolve(50, 16)


def test_an_unknown_scheme_is_refused_by_the_encoder() -> None:
    with pytest.raises(UserError, match="unknown position encoding 'tupe-x'; did you mean 'tupe-"):
        Encoder(dataclasses.replace(SMALL, position="tupe-x").resolve(50, 16))


def test_config_round_trip_and_unknown_key() -> None:
    config = dataclasses.replace(SMALL, feed_forward="geglu", bias=False, rope_base=50.0).resolve(50, 16)
    assert EncoderConfig.from_dict(config.to_dict()) == config
    with pytest.raises(UserError, match="did you mean 'width'"):
        EncoderConfig.from_dict(config.to_dict() | {"widht": 3})


@pytest.mark.parametrize("position", list(POSITIONS))
def test_options_like_a_given_encoder_resolve_to_it(position: str) -> None:
    """All that --init-from takes over; where there is a table of positions its length cannot change."""
    shape = {"feed_forward": "geglu", "bias": False, "norm": "pre", "rope_base": 50.0, "type_vocab_size": 3}
    given = dataclasses.replace(SMALL, position=position, **shape).resolve(50, 16)
    plain = EncoderOptions(dropout=0.0, attention_dropout=0.0)
    assert plain.like(given).resolve(50, 16) == given
    for changes, message in (({"rope_base": 70.0}, "rope_base 70.0 does not fit the given weights, which have 50.0"),):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(plain, **changes).like(given)
    longer = dataclasses.replace(plain, max_positions=40)
    if position in ("rope", "alibi"):
        assert longer.like(given).resolve(50, 30) == dataclasses.replace(given, max_positions=40)
    else:
        with pytest.raises(UserError, match="max_positions 40 does not fit the given weights, which have 16"):
            longer.like(given)


SELECTED = {"first": slice(1), "chosen": torch.tensor([[5, 1, 0], [3, 3, 2], [8, 4, 7]])}


@pytest.mark.parametrize(("norm", "bias"), [("post", True), ("pre", False)])
@pytest.mark.parametrize("position", list(POSITIONS))
@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("selected", SELECTED)
def test_selected_tokens_equal_those_of_all(position: str, norm: str, bias: bool, kernels: str, selected) -> None:
    """Values and every gradient, with padding, documents and dropout; that of the attention only where a query keeps
    its number."""
    dropped = 0.3 if selected == "first" else 0.0
    options = dataclasses.replace(
        SMALL, position=position, norm=norm, bias=bias, dropout=0.2, attention_dropout=dropped
    )
    encoder = Encoder(options.resolve(50, 9), kernels).double()
    initialize(encoder, 0, 0.2)
    ids = torch.arange(27).reshape(3, 9)
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[1, 6:] = False
    documents = torch.tensor([[0] * 4 + [1] * 5, [0] * 9, [0] * 9])
    positions = torch.tensor([[0, 1, 2, 3, 1, 2, 3, 4, 5], list(range(9)), list(range(9))])
    keys = row_keys(0, "dropout", 0, torch.arange(3))
    only = SELECTED[selected]
    results = []
    for given in (None, only):
        masks = {"attention_mask": mask, "document_ids": documents, "position_ids": positions, "row_keys": keys}
        hidden = encoder(ids, **masks, only=given)
        if given is None:
            hidden = hidden[:, only] if isinstance(only, slice) else hidden[torch.arange(3)[:, None], only]
        encoder.zero_grad()
        hidden.square().sum().backward()
        gradients = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
        results.append((hidden, gradients))
    (whole, expected), (part, found) = results
    torch.testing.assert_close(part, whole, rtol=1e-12, atol=1e-12)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("position", ["absolute", "tupe-r", "rope"])
def test_selected_tokens_without_masks(position: str) -> None:
    encoder = Encoder(dataclasses.replace(SMALL, position=position).resolve(50, 9)).double()
    ids, only = torch.arange(27).reshape(3, 9), SELECTED["chosen"]
    expected = encoder(ids)[torch.arange(3)[:, None], only]
    torch.testing.assert_close(encoder(ids, only=only), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(encoder(ids[:1], only=only[:1]), expected[:1], rtol=1e-12, atol=1e-12)
