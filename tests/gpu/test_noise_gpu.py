"""The same bits on a GPU as on the CPU."""

import pytest
import torch

from draf_dist import noise

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SHAPES = [(), (3,), (64,), (130,), (64, 24, 24), (100_003,)]


@pytest.fixture
def keys() -> torch.Tensor:
    extremes = torch.tensor([0, -1, 2**63 - 1, -(2**63)])
    return torch.cat([extremes, noise.sample_keys(0, "gpu", None, torch.arange(12), 1)[0]]).view(4, 4)


def test_hashes_and_keys_are_the_same_bits(keys: torch.Tensor) -> None:
    index = torch.arange(10_000)
    assert torch.equal(noise.hash64(keys[0, 1], index), noise.hash64(keys[0, 1].cuda(), index.cuda()).cpu())
    uid = torch.arange(-1, 500)
    on_gpu = noise.sample_keys(5, "x", uid.cuda(), uid.cuda(), 3)
    assert torch.equal(noise.sample_keys(5, "x", uid, uid, 3), on_gpu.cpu())
    assert torch.equal(noise.chain(1, "a", uid, 4, "b"), noise.chain(1, "a", uid.cuda(), 4, "b").cpu())


def test_hash_is_the_public_splitmix64() -> None:
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [h % 2**64 for h in noise.hash64(0, torch.arange(3, device="cuda")).tolist()] == expected


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_draws_are_the_same_bits(keys: torch.Tensor, shape: tuple[int, ...]) -> None:
    assert torch.equal(noise.uniform(keys, shape), noise.uniform(keys.cuda(), shape).cpu())
    assert torch.equal(noise.normal(keys, shape), noise.normal(keys.cuda(), shape).cpu())
    for probability in (0.0, 1e-5, 0.1, 0.5, 0.9, 1.0):
        on_gpu = noise.bernoulli(keys.cuda(), shape, probability)
        assert torch.equal(noise.bernoulli(keys, shape, probability), on_gpu.cpu())


def test_golden_draws() -> None:
    keys = torch.tensor([noise.chain(1, "golden"), -1], device="cuda")
    assert [[float.hex(v) for v in row] for row in noise.uniform(keys, (3,)).tolist()] == GOLDEN_UNIFORM
    assert [[float.hex(v) for v in row] for row in noise.normal(keys, (3,)).tolist()] == GOLDEN_NORMAL
    assert ["".join("01"[v] for v in row) for row in noise.bernoulli(keys, (16,), 0.25).tolist()] == GOLDEN_MASK


GOLDEN_UNIFORM = [
    ["0x1.dbe2fc0000000p-2", "0x1.66e24c0000000p-1", "0x1.e2a14e0000000p-1"],
    ["0x1.88db780000000p-3", "0x1.6d42380000000p-1", "0x1.d97b0c0000000p-2"],
]
GOLDEN_NORMAL = [
    ["0x1.bc51680000000p-7", "-0x1.b34b1e0000000p+0", "0x1.f07a0c0000000p-3"],
    ["-0x1.bce8a80000000p-1", "-0x1.482bfc0000000p+0", "-0x1.6646380000000p-1"],
]
GOLDEN_MASK = ["0000001101001100", "0100011110000000"]
