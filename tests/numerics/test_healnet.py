"""HEALNet: the published counts, the equations written out as loops, and what an absent modality must not do (spec 4.5, O14)."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from draf_dist import noise
from draf_dist.losses.survival import survival_nll
from draf_dist.models.latent_attention import (
    Attention,
    CrossStep,
    FeedForwardStep,
    FourierCode,
    LatentAttention,
    LatentAttentionConfig,
    SingleTokenStep,
    Tokens,
    TokenSpec,
)
from draf_dist.models.link import Link
from draf_dist.models.mc import name_streams

KEYS = noise.hash64(0, torch.arange(3)).unsqueeze(0)
CODE = FourierCode()


def parameters_of(tokens: Sequence[TokenSpec], num_outputs: int, **options: Any) -> int:
    with torch.device("meta"):
        model = LatentAttention(tokens, num_outputs, LatentAttentionConfig(**options))
    return sum(parameter.numel() for parameter in model.parameters())


def grids(*modalities: tuple[int, int]) -> list[TokenSpec]:
    """Of (channels, axes)."""
    return [TokenSpec(CODE.width(channels, axes)) for channels, axes in modalities]


@pytest.mark.parametrize(
    ("modalities", "options", "count"),
    [
        (((2000, 1), (3, 2), (3, 3)), {}, 10_630_844),
        (((2189, 1), (100, 2)), {}, 10_467_332),
        (((2000, 1), (3, 2), (3, 3)), {"weight_tie_layers": True}, 6_696_916),
    ],
)
def test_parameter_counts_are_the_published_ones(modalities: Any, options: dict[str, Any], count: int) -> None:
    assert parameters_of(grids(*modalities), 4, **options) == count


@pytest.mark.parametrize(
    ("omics", "sizes", "count"),
    [
        (2191, {"depth": 2, "latents": 25, "width": 119, "head_width": 16}, 994_249),
        (2922, {"depth": 2, "latents": 17, "width": 126, "head_width": 63}, 2_110_390),
        (1587, {"depth": 5, "latents": 17, "width": 62, "head_width": 27}, 1_525_470),
        (1421, {"depth": 2, "latents": 16, "width": 65, "head_width": 103}, 1_708_698),
    ],
    ids=["blca", "brca", "kirp", "ucec"],
)
def test_parameter_counts_are_those_of_the_tcga_models(omics: int, sizes: dict[str, int], count: int) -> None:
    """Omics and a bag of 2048-d patches, one head, no self-attention: the depth and head width follow from the count alone."""
    assert parameters_of(grids((omics, 1), (2048, 1)), 4, heads=1, self_per_cross_attn=0, **sizes) == count


def test_a_single_token_saves_the_queries_and_keys_that_could_never_learn() -> None:
    sizes = {"depth": 2, "width": 12, "heads": 2, "head_width": 5}
    many, single = (parameters_of([TokenSpec(9, number)], 3, **sizes) for number in (None, 1))
    assert many - single == 2 * (12 * 10 + 9 * 10 + 2 * 12)


def test_the_code_of_a_place_is_that_of_the_paper() -> None:
    coded = FourierCode(bands=2, max_freq=10.0).beside(torch.zeros(1, 6, 1), (2, 3))
    assert coded.shape == (1, 6, 1 + 2 * 5)
    x, y = 1.0, 0.0  # the second row, the middle column
    expected = [
        0.0,
        *(math.sin(math.pi * s * x) for s in (1, 5)),
        *(math.cos(math.pi * s * x) for s in (1, 5)),
        x,
        *(math.sin(math.pi * s * y) for s in (1, 5)),
        *(math.cos(math.pi * s * y) for s in (1, 5)),
        y,
    ]
    assert coded[0, 4].tolist() == pytest.approx(expected, abs=1e-6)


# The equations again, one number at a time: no tensor operation but indexing.


def numbers(tensor: Tensor) -> Any:
    return tensor.detach().tolist()


def norm(row: list[float], layer: nn.LayerNorm) -> list[float]:
    mean = sum(row) / len(row)
    spread = math.sqrt(sum((x - mean) ** 2 for x in row) / len(row) + layer.eps)
    return [(x - mean) / spread * w + b for x, w, b in zip(row, numbers(layer.weight), numbers(layer.bias), strict=True)]


def linear(row: list[float], layer: nn.Linear) -> list[float]:
    bias = [0.0] * layer.out_features if layer.bias is None else numbers(layer.bias)
    return [
        sum(w * x for w, x in zip(weights, row, strict=True)) + b for weights, b in zip(numbers(layer.weight), bias, strict=True)
    ]


def attend(latents: list[list[float]], tokens: list[list[float]], layer: Attention) -> list[list[float]]:
    queries = [linear(row, layer.queries) for row in latents]
    both = [linear(row, layer.keys_values) for row in tokens]
    inner = len(both[0]) // 2
    width = inner // layer.heads
    found = []
    for query in queries:
        mixed = []
        for head in range(layer.heads):
            places = range(head * width, (head + 1) * width)
            scores = [sum(query[p] * row[p] for p in places) / math.sqrt(width) / 0.5 for row in both]
            shares = [math.exp(score - max(scores)) for score in scores]
            mixed += [sum(s * row[inner + p] for s, row in zip(shares, both, strict=True)) / sum(shares) for p in places]
        found.append([x if x > 0 else 0.01 * x for x in linear(mixed, layer.output)])
    return found


def selu(x: float) -> float:
    return 1.0507009873554805 * (x if x > 0 else 1.6732632423543772 * (math.exp(x) - 1))


def gelu(x: float) -> float:
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


def feed_forward(row: list[float], step: FeedForwardStep, snn: bool) -> list[float]:
    wide = linear(norm(row, step.norm), step.expand)
    half = len(wide) // 2
    gate = selu if snn else gelu
    return linear([a * gate(b) for a, b in zip(wide[:half], wide[half:], strict=True)], step.contract)


def added(state: list[list[float]], change: list[list[float]]) -> list[list[float]]:
    return [[x + y for x, y in zip(row, more, strict=True)] for row, more in zip(state, change, strict=True)]


def reference(model: LatentAttention, config: LatentAttentionConfig, tokens: list[list[list[float]] | None]) -> list[float]:
    """Logits of one study: the tokens of each modality that are there, None for one that is absent."""
    state = numbers(model.start)
    for index in range(config.depth):
        layer: Any = model.layers[min(index, 1) if config.weight_tie_layers else index]
        for axis, read in enumerate(tokens):
            if read is None:
                continue
            step, mlp = layer.cross[axis], layer.cross_mlp[0 if config.weight_tie_layers and index else axis]
            seen = [norm(row, step.token_norm) for row in read]
            state = added(state, attend([norm(row, step.norm) for row in state], seen, step.attention))
            state = added(state, [feed_forward(row, mlp, config.snn) for row in state])
            for own, own_mlp in zip(layer.within, layer.within_mlp, strict=True):
                normed = [norm(row, own.norm) for row in state]
                state = added(state, attend(normed, normed, own.attention))
                state = added(state, [feed_forward(row, own_mlp, config.snn) for row in state])
    mean = [sum(column) / len(state) for column in zip(*state, strict=True)]
    return linear(norm(mean, model.norm), model.output)


def small(specs: Sequence[TokenSpec], config: LatentAttentionConfig, num_outputs: int = 3) -> LatentAttention:
    """A model in f64 whose norms and biases are moved too."""
    torch.manual_seed(1)
    model = LatentAttention(specs, num_outputs, config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    name_streams(model)
    return model


def logits_of(model: LatentAttention, tokens: Sequence[Tokens], present: Tensor, keys: Tensor = KEYS) -> Tensor:
    return model.classify(model(tokens, present, keys).state.mean(2))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_tie_layers": True, "depth": 3},
        {"snn": False, "self_per_cross_attn": 2},
        {"self_per_cross_attn": 0, "depth": 1},
    ],
    ids=str,
)
def test_the_forward_is_that_of_the_equations(options: dict[str, Any]) -> None:
    config = LatentAttentionConfig(
        **({"depth": 2, "latents": 3, "width": 4, "heads": 2, "head_width": 3, "dropout": 0.0} | options)
    )
    model = small([TokenSpec(5), TokenSpec(6)], config)
    first, second = torch.randn(3, 4, 5, dtype=torch.float64), torch.randn(3, 3, 6, dtype=torch.float64)
    attended = torch.tensor([[True, False, True, True], [True, True, False, False], [True] * 4])
    present = torch.tensor([[True, True], [True, False], [False, True]])
    found = logits_of(model, [Tokens(first, attended), Tokens(second)], present)
    for row in range(3):
        there: list[Any] = [numbers(first[row, attended[row]]), numbers(second[row])]
        read = [tokens if here else None for tokens, here in zip(there, present[row].tolist(), strict=True)]
        assert found[0, row].tolist() == pytest.approx(reference(model, config, read), abs=1e-9)


CONFIG = LatentAttentionConfig(depth=2, latents=4, width=8, heads=2, head_width=4)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("self_per_cross_attn", [0, 1])
def test_an_absent_modality_leaves_what_a_model_without_it_gives(tied: bool, self_per_cross_attn: int) -> None:
    """The published code applied self-attention and a feed-forward step all the same (spec 4.5 a)."""
    config = CONFIG.model_copy(update={"weight_tie_layers": tied, "self_per_cross_attn": self_per_cross_attn, "dropout": 0.0})
    whole, without = small([TokenSpec(5), TokenSpec(6)], config), small([TokenSpec(5)], config)
    # Those of the first modality stand at the same places in both.
    without.load_state_dict({name: value for name, value in whole.state_dict().items() if name in without.state_dict()})
    tokens = Tokens(torch.randn(3, 4, 5).double())
    filler = Tokens(torch.randn(3, 7, 6).double())
    absent = torch.tensor([[True, False]]).expand(3, -1)
    found = logits_of(whole, [tokens, filler], absent)
    assert torch.equal(found, logits_of(without, [tokens], absent[:, :1]))
    assert not torch.allclose(found, logits_of(whole, [tokens, filler], torch.ones(3, 2, dtype=torch.bool)))


def test_a_study_with_one_modality_still_depends_on_it() -> None:
    """With the published evaluation of one missing modality the output was the same for all inputs (spec 4.5 b)."""
    model = small([TokenSpec(5), TokenSpec(6)], CONFIG)
    tokens = [Tokens(torch.randn(3, 4, 5).double()), Tokens(torch.randn(3, 4, 6).double())]
    same = KEYS[:, :1].expand(1, 3)
    for axis in (0, 1):
        logits = logits_of(model, tokens, torch.eye(2, dtype=torch.bool)[axis].expand(3, -1), same)
        assert (logits[0].std(0) > 1e-3).all()


def test_mixed_presence_equals_studies_one_by_one() -> None:
    model = small([TokenSpec(5), TokenSpec(6)], CONFIG)
    tokens = [torch.randn(3, 4, 5).double(), torch.randn(3, 4, 6).double()]
    present = torch.tensor([[True, True], [True, False], [False, True]])
    whole = logits_of(model, [Tokens(values) for values in tokens], present)
    for row in range(3):
        one = slice(row, row + 1)
        alone = logits_of(model, [Tokens(values[one]) for values in tokens], present[one], KEYS[:, one])
        torch.testing.assert_close(whole[:, one], alone)


def test_padded_tokens_are_no_tokens() -> None:
    model = small([TokenSpec(5)], CONFIG)
    values = torch.randn(3, 6, 5).double()
    present = torch.ones(3, 1, dtype=torch.bool)
    attended = (torch.arange(6) < 4).expand(3, -1)
    torch.testing.assert_close(
        logits_of(model, [Tokens(values, attended)], present), logits_of(model, [Tokens(values[:, :4])], present)
    )
    empty = logits_of(model, [Tokens(values, torch.zeros_like(attended))], present)
    assert empty.isfinite().all()


def test_attention_to_a_single_token_does_not_ask() -> None:
    torch.manual_seed(0)
    cross, single = CrossStep(5, CONFIG), SingleTokenStep(5, CONFIG)
    with torch.no_grad():
        single.values.weight.copy_(cross.attention.keys_values.weight.chunk(2)[1])
    single.output.load_state_dict(cross.attention.output.state_dict())
    state, tokens = torch.randn(2, 3, 4, 8), torch.randn(3, 1, 5)
    torch.testing.assert_close(cross(state, tokens, None), single(state, tokens, None))


def test_without_dropout_all_passes_agree_and_with_it_none() -> None:
    keys = torch.stack([noise.hash64(index, torch.arange(3)) for index in range(3)])
    present = torch.ones(3, 1, dtype=torch.bool)
    tokens = [Tokens(torch.randn(3, 4, 5).double())]
    still = logits_of(small([TokenSpec(5)], CONFIG.model_copy(update={"dropout": 0.0})), tokens, present, keys)
    assert still.shape == (3, 3, 3)
    assert torch.equal(still[0], still[1])
    moved = logits_of(small([TokenSpec(5)], CONFIG), tokens, present, keys)
    assert not torch.isclose(moved[0], moved[1]).any()


def test_entropy_is_that_of_equal_attention_where_nothing_is_asked() -> None:
    model = small([TokenSpec(5), TokenSpec(6, 1)], CONFIG)
    last: Any = model.layers[-1]
    tokens = [
        Tokens(torch.randn(3, 4, 5).double(), torch.arange(4) < torch.tensor([[4], [2], [1]])),
        Tokens(torch.ones(3, 1, 6).double()),
    ]
    present = torch.tensor([[True, True], [True, True], [True, False]])
    before = model(tokens, present, KEYS)
    assert (before.entropy[:2, 0] < before.most[:2, 0]).all()
    nn.init.zeros_(last.cross[0].attention.queries.weight)
    after = model(tokens, present, KEYS)
    torch.testing.assert_close(after.entropy[:, 0], torch.tensor([4.0, 2.0, 1.0]).double().log())
    torch.testing.assert_close(after.entropy, after.most.double())
    assert (before.change[present] > 0).all()
    assert (before.change[~present] == 0).all()


def test_survival_oracle() -> None:
    """O14: hazards .1, .2, .3, .4."""
    link = Link(exclusive=False)
    logits = torch.logit(torch.tensor([[[0.1, 0.2, 0.3, 0.4]]], dtype=torch.float64))
    survival = (1 - link.probability(logits)).cumprod(-1)
    assert survival.flatten().tolist() == pytest.approx([0.9, 0.72, 0.504, 0.3024], abs=1e-12)
    assert -survival.sum().item() == pytest.approx(-2.4264, abs=1e-12)
    for event, expected in ((True, 1.5324769), (False, 0.4111074)):
        assert survival_nll(logits, torch.tensor([2]), torch.tensor([event])).item() == pytest.approx(expected, abs=1e-6)
