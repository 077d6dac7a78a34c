"""O18 and what makes a mask a pure function of its key."""

import pytest
import torch
from torch import nn

from draf_dist import noise
from draf_dist.errors import SpecError
from draf_dist.models.mc import MCDropout, check_sampling, name_streams


def keys_of(passes: int, rows: int) -> torch.Tensor:
    return noise.sample_keys(0, "model", None, torch.arange(rows), passes)


def layer(probability: float, *, channels: bool = False) -> MCDropout:
    dropout = MCDropout(probability, channels=channels)
    name_streams(nn.Sequential(dropout))
    return dropout


def test_variance_of_a_linear_unit_is_that_of_the_closed_form() -> None:
    # Var(w . dropout(x)) = p / (1 - p) * sum (w_i x_i)^2 = 5 for p = .5 and w * x = (1, 2)
    passes = 200_000
    outputs = layer(0.5)(torch.tensor([[[1.0, 2.0]]]), keys_of(passes, 1)).sum(-1)
    assert outputs.var().item() == pytest.approx(5, rel=0.01)
    assert outputs.mean().item() == pytest.approx(3, abs=4 * (5 / passes) ** 0.5)


@pytest.mark.parametrize("probability", [0.1, 0.2, 0.9])
def test_mean_is_kept_and_the_share_of_zeros_is_p(probability: float) -> None:
    dropped = layer(probability)(torch.ones(1, 100, 400), keys_of(5, 100))
    share = (dropped == 0).float().mean().item()
    assert share == pytest.approx(probability, abs=4 * (probability * (1 - probability) / dropped.numel()) ** 0.5)
    survivors = dropped[dropped != 0]
    torch.testing.assert_close(survivors, torch.full_like(survivors, 1 / (1 - probability)))


def test_evaluation_mode_changes_nothing() -> None:
    dropout, values, keys = layer(0.5), torch.ones(1, 4, 10), keys_of(3, 4)
    assert torch.equal(dropout.eval()(values, keys), dropout.train()(values, keys))


def test_a_mask_does_not_depend_on_the_batch_around_it() -> None:
    dropout, values, keys = layer(0.5), torch.ones(1, 6, 10), keys_of(3, 6)
    assert torch.equal(dropout(values, keys)[1:2, 2:3], dropout(values[:, 2:3], keys[1:2, 2:3]))


def test_a_pass_repeats_its_input_once_and_later_layers_keep_it() -> None:
    dropout, keys = layer(0.5), keys_of(3, 6)
    assert dropout(torch.ones(1, 6, 10), keys).shape == (3, 6, 10)
    assert dropout(torch.ones(3, 6, 10), keys).shape == (3, 6, 10)


def test_channel_dropout_drops_whole_channels() -> None:
    dropped = layer(0.5, channels=True)(torch.ones(1, 20, 8, 3, 3), keys_of(2, 20))
    per_channel = dropped.flatten(-2)
    assert (per_channel == per_channel[..., :1]).all()
    assert 0.3 < (dropped == 0).float().mean() < 0.7


def test_layers_of_other_names_draw_other_masks() -> None:
    model = nn.ModuleDict({"image": MCDropout(0.5), "series": MCDropout(0.5)})
    name_streams(model)
    values, keys = torch.ones(1, 4, 50), keys_of(2, 4)
    assert not torch.equal(model["image"](values, keys), model["series"](values, keys))


def test_recomputation_under_checkpointing_gives_the_same_gradients() -> None:
    dropout, linear, keys = layer(0.5), nn.Linear(10, 10), keys_of(3, 4)
    values = torch.randn(1, 4, 10)

    def output() -> torch.Tensor:
        return dropout(linear(values), keys)

    plain = torch.autograd.grad(output().square().sum(), linear.weight)[0]
    recomputed = torch.utils.checkpoint.checkpoint(output, use_reentrant=False)
    assert torch.equal(plain, torch.autograd.grad(recomputed.square().sum(), linear.weight)[0])


class Silent(nn.Module):
    """Owns an MC dropout and does not use it: what the guard is for."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = MCDropout(0.5)
        self.linear = nn.Linear(3, 3)

    def forward(self, values: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.linear(values).expand(keys.shape[0], -1, -1)
        return result


def test_the_guard_names_the_modality_whose_passes_agree() -> None:
    with pytest.raises(SpecError, match="encoder of cxr: expected Monte-Carlo passes that differ"):
        check_sampling([("cxr", Silent())], {"cxr": torch.ones(2, 3)})
