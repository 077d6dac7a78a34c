"""`mc_scope: head`: the trunks run once and are deterministic, and only the dropout of the projections is drawn anew."""

from typing import Any

import pytest
import torch
from model_inputs import SMALL_ENCODERS, pass_keys, small_batch, small_schema, small_stats
from torch import nn

from draf_dist.config.spec import validate_spec
from draf_dist.errors import SpecError
from draf_dist.models.backbones import Backbones, mc_scope
from draf_dist.models.build import build_model
from draf_dist.models.encoders import EncoderChoice
from draf_dist.models.export import load_model, save_model
from draf_dist.models.fusion.draf import DrafConfig
from draf_dist.models.fusion.mean import MeanConfig
from draf_dist.models.mc import MCDropout, name_streams

SCHEMA = small_schema()
BATCH = small_batch(SCHEMA)
HEAD = SMALL_ENCODERS.model_copy(update={"mc_scope": "head"})


def backbones(choice: EncoderChoice) -> Backbones:
    torch.manual_seed(0)
    built = Backbones(choice, SCHEMA, 8)
    name_streams(built)
    return built


def projections(model: Backbones) -> list[nn.Module]:
    return [encoder.projection for encoder in model.encoders.values()]


def without_trunk_dropout(choice: EncoderChoice) -> EncoderChoice:
    still = {kind: getattr(choice, kind).model_copy(update={"dropout": 0.0}) for kind in ("image", "series", "table")}
    return choice.model_copy(update={**still, "mc_scope": "full"})


def calls_of(module: nn.Module) -> list[tuple[int, ...]]:
    """Shapes of the module's first argument, call by call."""
    shapes: list[tuple[int, ...]] = []
    module.register_forward_pre_hook(lambda _module, arguments: shapes.append(tuple(arguments[0].shape)))
    return shapes


def test_the_trunks_run_once_and_the_projections_get_a_single_pass() -> None:
    model, keys = backbones(HEAD), pass_keys(BATCH, passes=40)
    trunk = calls_of(model.encoders["m_cxr"].stem)
    seen = [calls_of(projection) for projection in projections(model)]
    with torch.no_grad():
        features = model(BATCH, keys)
    assert features.shape == (40, 8, 3, 8)
    assert len(trunk) == 1
    assert [[shape[:2] for shape in shapes] for shapes in seen] == [[(1, 8)]] * 3
    assert not torch.equal(features[0], features[1])


def test_full_runs_what_comes_before_the_first_dropout_once() -> None:
    model, keys = backbones(SMALL_ENCODERS), pass_keys(BATCH, passes=30)
    stem, second = calls_of(model.encoders["m_cxr"].stem), calls_of(model.encoders["m_cxr"].blocks[1])
    together = model(BATCH, keys)
    assert (len(stem), [shape[0] for shape in second]) == (1, [30 * 8])
    apart = torch.cat([model(BATCH, keys[index : index + 1]) for index in range(30)])
    torch.testing.assert_close(together, apart, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("grad", [False, True])
def test_head_is_full_with_no_dropout_in_the_trunks(grad: bool) -> None:
    keys = pass_keys(BATCH, passes=40)
    with torch.set_grad_enabled(grad):
        found, expected = (backbones(choice)(BATCH, keys) for choice in (HEAD, without_trunk_dropout(SMALL_ENCODERS)))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_parameters_and_masks_of_the_projections_are_those_of_full() -> None:
    full, head = backbones(SMALL_ENCODERS), backbones(HEAD)
    assert list(full.state_dict()) == list(head.state_dict())
    assert all(torch.equal(left, right) for left, right in zip(full.state_dict().values(), head.state_dict().values(), strict=True))
    keys, values = pass_keys(BATCH), torch.ones(1, 8, 16)
    for left, right in zip(projections(full), projections(head), strict=True):
        masks = [part.dropped(values, keys) for part in (left.dropout, right.dropout) if isinstance(part, MCDropout)]
        assert torch.equal(*masks)
        assert masks[0].any()


def test_what_was_trained_with_one_scope_can_be_evaluated_with_the_other(tmp_path: Any) -> None:
    config = DrafConfig(width=8, encoders=SMALL_ENCODERS)
    model = build_model(config, SCHEMA, seed=3)
    of_head = config.model_copy(update={"encoders": HEAD})
    save_model(tmp_path, model, of_head, SCHEMA, small_stats())
    loaded = load_model(tmp_path)
    assert loaded.config == of_head
    assert (mc_scope(model), mc_scope(loaded.model)) == ("full", "head")
    keys = pass_keys(BATCH, passes=30)
    full, head = (one(BATCH, keys).logits.var(0).mean() for one in (model, loaded.model))
    assert 0 < head < full


def test_training_and_evaluation_agree() -> None:
    model, keys = build_model(DrafConfig(width=8, encoders=HEAD), SCHEMA, seed=3), pass_keys(BATCH)
    assert torch.equal(model.train()(BATCH, keys).logits, model.eval()(BATCH, keys).logits)


def test_draf_on_heads_that_draw_nothing_is_refused_and_a_plain_mean_is_not() -> None:
    table = SMALL_ENCODERS.table.model_copy(update={"projection_dropout": 0.0})
    choice = HEAD.model_copy(update={"table": table})
    with pytest.raises(SpecError, match="encoder of labs: expected MC dropout, found none"):
        DrafConfig(encoders=choice).build(SCHEMA)
    build_model(MeanConfig(encoders=choice), SCHEMA, seed=0)


def test_a_scope_that_does_not_exist_is_refused() -> None:
    with pytest.raises(SpecError, match="mc_scope"):
        validate_spec({"encoders": {"mc_scope": "trunk"}}, DrafConfig, where="job.yaml")
    assert EncoderChoice().mc_scope == "full"
