"""BatchNorm over ranks is BatchNorm of one process: in value, in gradient and in what it remembers, however rows are cut."""

import tempfile
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from forked_ranks import run_on_ranks
from torch import Tensor, nn

from draf_dist.models import norm
from draf_dist.models.norm import BatchNorm

WORLD, ROWS = 2, 8
# Rows of each rank: as equal as can be, unequal, and one rank that has none.
CUTS = {"equal": (4, 4), "unequal": (3, 5), "one row": (1, 7), "none": (8, 0), "none first": (0, 8)}
# Padding on one rank in most cuts, and a row that counts half.
WEIGHT = torch.tensor([1.0, 1, 0.5, 1, 1, 1, 0, 0])


class Net(nn.Module):
    """Two norms, so that what one sends back to the other rank goes through the other too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(2, 4, 3), BatchNorm(4)
        self.second, self.norm2 = nn.Conv2d(4, 3, 1), BatchNorm(3)

    def forward(self, images: Tensor, weight: Tensor) -> Tensor:
        hidden = self.norm1(self.first(images), weight).relu()
        return self.norm2(self.second(hidden), weight).square().mean((2, 3)).tanh()


def images() -> Tensor:
    """Rows whose means drift, so that parts of the batch have other statistics than the whole."""
    drawn = torch.randn(ROWS, 2, 6, 5, generator=torch.Generator().manual_seed(0))
    return drawn + torch.arange(ROWS).view(-1, 1, 1, 1)


def step(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of these rows; the gradient of their loss in all parameters; what is remembered."""
    torch.manual_seed(1)
    net = Net()
    for _ in range(2):
        net.zero_grad()
        output = net(images()[rows], WEIGHT[rows])
        (output * WEIGHT[rows].unsqueeze(1) * torch.tensor([1.0, -2.0, 3.0])).sum().backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in net.parameters()])
    buffers = torch.cat([buffer.flatten() for buffer in net.buffers()])
    return output.detach(), gradient, buffers


def run_rank(rank: int, world: int, folder: str) -> None:
    found = {}
    for name, cut in CUTS.items():
        mine = slice(sum(cut[:rank]), sum(cut[: rank + 1]))
        found[name, "global"] = step(mine)
        with patch.object(norm, "sum_over_ranks", lambda values: values):
            found[name, "local"] = step(mine)
    torch.save(found, f"{folder}/{rank}.pt")


Results = dict[tuple[str, str], tuple[Tensor, Tensor, Tensor]]


@pytest.fixture(scope="module")
def over_ranks() -> list[Results]:
    with tempfile.TemporaryDirectory() as folder:
        run_on_ranks(run_rank, WORLD, folder)
        return [torch.load(Path(folder, f"{rank}.pt")) for rank in range(WORLD)]


@pytest.mark.parametrize("cut", CUTS)
def test_two_ranks_are_one_process(cut: str, over_ranks: list[Results]) -> None:
    output, gradient, buffers = step(slice(0, ROWS))
    parts = [found[cut, "global"] for found in over_ranks]
    counted = WEIGHT > 0
    torch.testing.assert_close(torch.cat([part[0] for part in parts])[counted], output[counted], rtol=1e-6, atol=1e-6)
    summed = parts[0][1] + parts[1][1]
    assert float((summed - gradient).norm() / gradient.norm()) < 1e-6
    for part in parts:
        torch.testing.assert_close(part[2], buffers, rtol=1e-6, atol=1e-6)
    assert torch.equal(parts[0][2], parts[1][2])


@pytest.mark.parametrize("cut", ["equal", "unequal"])
def test_statistics_of_one_rank_alone_are_something_else(cut: str, over_ranks: list[Results]) -> None:
    output, gradient, _ = step(slice(0, ROWS))
    parts = [found[cut, "local"] for found in over_ranks]
    counted = WEIGHT > 0
    assert float((torch.cat([part[0] for part in parts]) - output)[counted].abs().max()) > 0.05
    assert float((parts[0][1] + parts[1][1] - gradient).norm() / gradient.norm()) > 0.05
