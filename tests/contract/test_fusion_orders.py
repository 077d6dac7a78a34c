"""The order of the modalities in a release is no information: models that treat them alike give the same with any (spec 1.4, 4.3).

Parameters and dropout of a modality go with it. Left out are models that read modalities one after the other (HEALNet), and those
whose head takes what they say side by side (`concat`, `early`): there a modality is its columns.
"""

import re
from typing import Any

import pytest
import torch
from fusion_members import MEMBERS, SMALL, moved, name_of
from model_inputs import pass_keys, small_batch, small_schema
from torch import Tensor, nn

from draf_dist.models.build import build_model
from draf_dist.models.mc import MCDropout
from draf_dist.schema.batch import Batch
from draf_dist.schema.modality import DataSchema

SCHEMA = small_schema()
ORDER = (2, 0, 1)
IN_TURN = {"healnet", "concat", "early"}
CONFIGS = [
    config for member in SMALL.values() for config in member.configs if getattr(config, "fusion", config).kind not in IN_TURN
]
# One module a modality, by its place.
PLACES = re.compile(r"((?:^|\.)(?:mifa\.local|branches)\.|^dropouts\.)(\d)\b")
# Parameters and buffers with an axis of modalities, counted from the last where their other axes may differ.
AXES = {
    r"(modality_heads|corruption_head|evidence|gates|distinct_heads)\.(weight|bias)": 0,
    r"(mean|log_variance)\.\d\.(weight|bias)": 0,
    r"modality_nodes\.weight": 0,
    r"mifa\.gain": 0,
    r"(bits|rejected)\.linear\.weight": 1,
    r"gate\.offsets": 1,
    r"weights\.(prior|running_u|running_weight)": 0,
}


def other_place(name: str) -> str:
    """Where the parameters of a module stand once the modalities are in the other order."""
    return PLACES.sub(lambda found: found[1] + str(ORDER.index(int(found[2]))), name)


def other_schema() -> DataSchema:
    return SCHEMA.model_copy(update={"modalities": tuple(SCHEMA.modalities[index] for index in ORDER)})


def other_batch(batch: Batch) -> Batch:
    named = {name: getattr(batch, name)[:, ORDER] for name in ("present", "corrupted", "severity", "quality", "quality_known")}
    return Batch(**(vars(batch) | named | {"modalities": other_schema().names}))


def other_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same parameters, those of every modality in its new place."""
    found = {}
    for name, value in state.items():
        axis = next((axis for pattern, axis in AXES.items() if re.search(rf"(^|\.){pattern}$", name)), None)
        if name == "head.weight" and value.dim() == 2:
            # DRIFA-Net's, of pooled maps side by side.
            found[name] = value.view(len(value), len(ORDER), -1)[:, ORDER].flatten(1)
        else:
            found[other_place(name)] = value if axis is None else value.index_select(axis, torch.tensor(ORDER))
    return found


def in_other_order(model: nn.Module, config: Any) -> nn.Module:
    other = build_model(config, other_schema(), seed=4).eval()
    # Severity and score are not fitted here: what they hold is that of a new model.
    fitted = tuple(name for name in other.state_dict() if name.startswith(("severity.", "cross_modal.")))
    state = {name: value for name, value in other_state(model.state_dict()).items() if name not in fitted}
    missing, unexpected = other.load_state_dict(state, strict=False)
    assert set(missing) == set(fitted)
    assert not unexpected
    dropouts = {other_place(name): part.stream for name, part in model.named_modules() if isinstance(part, MCDropout)}
    for name, part in other.named_modules():
        if isinstance(part, MCDropout):
            part.stream = dropouts[name]
    return other


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_modalities_in_another_order_give_the_same(config: Any) -> None:
    batch = small_batch(SCHEMA)
    keys = pass_keys(batch)
    model = moved(build_model(config, SCHEMA, seed=3)).eval()
    expected, found = model(batch, keys), in_other_order(model, config)(other_batch(batch), keys)
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found.logits, expected.logits, **close)
    torch.testing.assert_close(found.reliability, expected.reliability[:, ORDER], **close)
    torch.testing.assert_close(found.features, expected.features[:, ORDER], **close)
    for name, value in expected.uncertainty.items():
        torch.testing.assert_close(found.uncertainty[name], value[:, ORDER], **close, msg=lambda text, name=name: f"{name}: {text}")


def test_every_model_is_either_asked_or_left_out_for_a_reason() -> None:
    assert {member.model_fields["kind"].default for member in MEMBERS} > IN_TURN
    assert {config.kind for config in CONFIGS} | IN_TURN == {member.model_fields["kind"].default for member in MEMBERS}
