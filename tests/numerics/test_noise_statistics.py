"""Noise has the distributions it is named after, and no draw tells of another. All draws are pinned: nothing here is random."""

import numpy as np
import pytest
import torch
from scipy import special, stats

from draf_dist import noise
from draf_dist.noise import draws

KEYS = noise.sample_keys(0, "statistics", None, torch.arange(1000), 1)[0]
# Each p-value is uniform if all is well; with some fifty of them the smallest is about 0.02 and below 1e-4 once in 200.
SMALLEST_P = 1e-4


def flat(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy().ravel()


def test_table_holds_the_gaussian_quantiles_scaled_to_unit_variance() -> None:
    table = np.load(draws.TABLE)
    assert table.dtype == np.dtype("<f4")
    quantile = special.ndtri((np.arange(65536) + 0.5) / 65536)
    expected = quantile / np.sqrt(np.mean(quantile**2))
    assert np.abs(table - expected).max() <= 2**-22
    assert np.abs(expected - quantile).max() < 5e-5
    assert np.all(np.diff(table) > 0)


def test_table_has_mean_zero_and_variance_one() -> None:
    table = np.load(draws.TABLE).astype(np.float64)
    assert np.array_equal(table, -table[::-1])
    assert np.mean(table**2) == pytest.approx(1, abs=2e-9)
    assert np.mean(table**4) == pytest.approx(3, abs=1e-3)


@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_moments_are_within_four_standard_errors(kind: str) -> None:
    x = flat(getattr(noise, kind)(KEYS, (2000,)))
    exact = {
        "uniform": [(1, 1 / 2), (2, 1 / 3), (3, 1 / 4), (4, 1 / 5)],
        "normal": [(1, 0), (2, 1), (3, 0), (4, 3), (6, 15)],
    }[kind]
    for power, moment in exact:
        standard_error = np.std(x**power) / np.sqrt(x.size)
        assert abs(np.mean(x**power) - moment) < 4 * standard_error


def test_kolmogorov_smirnov() -> None:
    assert stats.kstest(flat(noise.uniform(KEYS, (1000,))), "uniform").pvalue > SMALLEST_P
    assert stats.kstest(flat(noise.normal(KEYS, (1000,))), "norm").pvalue > SMALLEST_P


def test_chi_square_over_values_and_over_pairs() -> None:
    u = flat(noise.uniform(KEYS, (2000,)))
    assert stats.chisquare(np.bincount((u * 4096).astype(int), minlength=4096)).pvalue > SMALLEST_P
    pairs = (u.reshape(-1, 2) * 64).astype(int)
    assert stats.chisquare(np.bincount(pairs[:, 0] * 64 + pairs[:, 1], minlength=4096)).pvalue > SMALLEST_P
    z = special.ndtr(flat(noise.normal(KEYS, (2000,))))
    assert stats.chisquare(np.bincount((z * 4096).astype(int), minlength=4096)).pvalue > SMALLEST_P


@pytest.mark.parametrize("bits", [16, 32])
def test_every_lane_of_a_hash_is_uniform(bits: int) -> None:
    hashes = noise.hash64_np(noise.chain("lanes"), np.arange(400_000)).view(f"<u{bits // 8}").reshape(400_000, -1)
    for lane in hashes.T:
        assert stats.chisquare(np.bincount(lane >> (bits - 10), minlength=1024)).pvalue > SMALLEST_P


@pytest.mark.parametrize("probability", [0.001, 0.1, 1 / 6, 0.5, 0.8, 0.999])
def test_masks_have_their_probability(probability: float) -> None:
    mask = noise.bernoulli(KEYS, (4000,), probability)
    assert stats.binomtest(int(mask.sum()), mask.numel(), probability).pvalue > SMALLEST_P
    # Successes in a row of four, which share a hash.
    quads = mask.view(-1, 4).sum(dim=1).numpy()
    expected = stats.binom.pmf(np.arange(5), 4, probability) * quads.size
    kept = expected > 10
    observed = np.bincount(quads, minlength=5)
    merged = np.append(observed[kept], observed[~kept].sum()), np.append(expected[kept], expected[~kept].sum())
    assert stats.chisquare(*(part[merged[1] > 0] for part in merged), sum_check=False).pvalue > SMALLEST_P


def test_probability_is_accurate_to_a_hundred_thousandth() -> None:
    every_lane = torch.arange(-32768, 32768, dtype=torch.int16).view(torch.int64).view(1, -1)
    mask = torch.empty(1, 65536, dtype=torch.bool)
    for probability in np.linspace(0, 1, 997):
        draws._mask(draws.lanes_below(probability)).fill_torch(every_lane, mask)
        assert abs(mask.double().mean().item() - probability) <= 2**-17


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """In standard errors: the correlation times the root of the number of pairs."""
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1] * np.sqrt(a.size))


def test_neighbours_are_uncorrelated() -> None:
    """Neighbouring elements, uids, epochs, passes and raw keys."""
    uid = torch.arange(1000)

    def numbers(epoch: int, passes: int = 1) -> np.ndarray:
        keys = noise.sample_keys(0, "s", torch.full_like(uid, epoch), uid, passes)
        return noise.normal(keys, (400,)).double().numpy()

    base = numbers(0, 2)
    z = base[0]
    raw = noise.normal(torch.arange(1000), (400,)).double().numpy()
    pairs = {
        "element + 1": (z[:, :-1], z[:, 1:]),
        "element + 4": (z[:, :-4], z[:, 4:]),
        "uid + 1": (z[:-1], z[1:]),
        "epoch + 1": (z, numbers(1)[0]),
        "pass + 1": (z, base[1]),
        "raw key + 1": (raw[:-1], raw[1:]),
        "squares": (z[:, :-1] ** 2, z[:, 1:] ** 2),
    }
    for name, (a, b) in pairs.items():
        assert abs(correlation(a, b)) < 4.5, name


def test_kinds_and_streams_with_one_key_are_uncorrelated() -> None:
    u, z = flat(noise.uniform(KEYS, (500,))), flat(noise.normal(KEYS, (500,)))
    mask = flat(noise.bernoulli(KEYS, (500,), 0.5))
    other = flat(noise.normal(noise.chain(KEYS, "other"), (500,)))
    for a, b in ((u, z), (u, mask), (z, mask), (z, other)):
        assert abs(correlation(a, b)) < 4.5


def test_flipping_any_bit_of_key_or_index_flips_half_of_the_hash() -> None:
    key = noise.hash64(1, torch.arange(2000))
    index = noise.hash64(2, torch.arange(2000))
    base = noise.hash64(key, index)
    weight = torch.tensor([bin(i).count("1") for i in range(65536)])

    def flipped(other: torch.Tensor) -> float:
        return weight[(base ^ other).view(torch.int16).to(torch.int64) & 0xFFFF].view(-1, 4).sum(dim=1).double().mean().item()

    for bit in range(64):
        one = torch.tensor(1).bitwise_left_shift(bit)
        # 32 with a standard error of 4 / sqrt(2000) = 0.09.
        assert flipped(noise.hash64(key ^ one, index)) == pytest.approx(32, abs=0.5)
        assert flipped(noise.hash64(key, index ^ one)) == pytest.approx(32, abs=0.5)


def test_hashes_of_many_keys_do_not_collide() -> None:
    keys = noise.sample_keys(3, "collide", None, torch.arange(200_000), 5)
    assert keys.unique().numel() == keys.numel()
