"""Noise: a pure function of (key, element), the same in torch, numpy and Python, in any batch and any chunk."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from draf_dist import noise
from draf_dist.errors import DataError
from draf_dist.noise import blocks, draws

INT64 = st.integers(-(2**63), 2**63 - 1)
EXTREMES = [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF]
M = 2**64 - 1


def reference_hash(key: int, index: int) -> int:
    """splitmix64 as docs/noise.md writes it, in Python integers; the result is unsigned."""
    z = (key + (index + 1) * 0x9E3779B97F4A7C15) & M
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & M
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & M
    return z ^ (z >> 31)


def reference_chain(*parts: int | str) -> int:
    key = 0
    for part in parts:
        name = isinstance(part, str) and int.from_bytes(hashlib.sha256(part.encode()).digest()[:8], "little")
        key = reference_hash(key, name if isinstance(part, str) else part)
    return key


def reference_lanes(kind: str, key: int, size: int, bits: int) -> np.ndarray:
    """The lanes of a row, as unsigned integers, lowest bits first."""
    start, per_hash = key + reference_chain("draf_dist.noise", kind), 64 // bits
    return np.array([reference_hash(start, i // per_hash) >> (i % per_hash * bits) & (2**bits - 1) for i in range(size)])


def signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def test_hash_is_the_public_splitmix64() -> None:
    # The first outputs of the reference implementation with seed 0 and with seed 1234567.
    assert [h & M for h in noise.hash64(0, torch.arange(3)).tolist()] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [h & M for h in noise.hash64(1234567, torch.arange(5)).tolist()] == expected


@settings(max_examples=50, deadline=None)
@given(INT64, st.lists(INT64, min_size=1, max_size=9))
def test_hash_agrees_in_torch_numpy_and_python(key: int, index: list[int]) -> None:
    expected = [signed(reference_hash(key, i)) for i in index]
    assert noise.hash64(key, torch.tensor(index)).tolist() == expected
    assert noise.hash64(torch.tensor(key), torch.tensor(index)).tolist() == expected
    assert noise.hash64_np(key, np.array(index)).tolist() == expected
    assert noise.hash64_np(np.array(key), np.array(index)).tolist() == expected
    assert [noise.hash64_np(key, np.array(i)).item() for i in index] == expected


@settings(max_examples=50, deadline=None)
@given(st.lists(st.one_of(INT64, st.integers(2**63, 2**64), st.text(max_size=8)), max_size=5), INT64)
def test_chain_agrees_in_torch_numpy_and_python(parts: list[int | str], last: int) -> None:
    expected = signed(reference_chain(*parts, last))
    assert noise.chain(*parts, last) == expected
    assert noise.chain(*parts, torch.tensor(last)).item() == expected
    assert noise.chain(*parts, np.int64(last)) == expected
    assert noise.chain_np(*parts, last).item() == expected
    assert noise.chain_np(*parts, np.array([last])).tolist() == [expected]


def test_chain_goes_on_after_a_tensor() -> None:
    uid = torch.tensor([3, -1])
    assert noise.chain(7, "crop", uid, 5, "x").tolist() == [noise.chain(7, "crop", u, 5, "x") for u in (3, -1)]
    assert noise.chain_np(7, np.array([3, -1]), "x").tolist() == [noise.chain(7, u, "x") for u in (3, -1)]


def test_chain_depends_on_order_and_length() -> None:
    keys = [noise.chain(*parts) for parts in ((1, 2), (2, 1), (1,), (1, 0), (1, 0, 0), ("1",), ("a", "b"), ("ab",))]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("epoch", [None, torch.tensor([0, 3, 3])])
def test_sample_keys_chain_seed_stream_pass_epoch_uid(epoch) -> None:
    uid = torch.tensor([11, -1, 2**62])
    keys = noise.sample_keys(9, "dropout", epoch, uid, passes=2)
    assert keys.shape == (2, 3)
    for s in range(2):
        for b in range(3):
            middle = [] if epoch is None else [int(epoch[b])]
            assert keys[s, b] == noise.chain(9, "dropout", s, *middle, int(uid[b]))


@pytest.mark.parametrize("size", [1, 3, 4, 5, 130])
def test_draws_equal_the_short_reference(size: int) -> None:
    keys = torch.tensor(EXTREMES)
    table = np.load(draws.TABLE)
    for row, key in enumerate(EXTREMES):
        assert noise.uniform(keys, (size,))[row].tolist() == ((reference_lanes("uniform", key, size, 32) >> 8) / 2**24).tolist()
        assert noise.normal(keys, (size,))[row].tolist() == table[reference_lanes("normal", key, size, 16)].tolist()
        mask = noise.bernoulli(keys, (size,), 0.3)[row]
        assert mask.tolist() == (reference_lanes("bernoulli", key, size, 16) < round(0.3 * 65536)).tolist()


def test_golden_draws() -> None:
    keys = torch.tensor([noise.chain(1, "golden"), -1])
    assert keys[0] == GOLDEN_KEY
    assert [[float.hex(v) for v in row] for row in noise.uniform(keys, (3,)).tolist()] == GOLDEN_UNIFORM
    assert [[float.hex(v) for v in row] for row in noise.normal(keys, (3,)).tolist()] == GOLDEN_NORMAL
    assert ["".join("01"[v] for v in row) for row in noise.bernoulli(keys, (16,), 0.25).tolist()] == GOLDEN_MASK


GOLDEN_KEY = 3916947429593528073
GOLDEN_UNIFORM = [
    ["0x1.dbe2fc0000000p-2", "0x1.66e24c0000000p-1", "0x1.e2a14e0000000p-1"],
    ["0x1.88db780000000p-3", "0x1.6d42380000000p-1", "0x1.d97b0c0000000p-2"],
]
GOLDEN_NORMAL = [
    ["0x1.bc51680000000p-7", "-0x1.b34b1e0000000p+0", "0x1.f07a0c0000000p-3"],
    ["-0x1.bce8a80000000p-1", "-0x1.482bfc0000000p+0", "-0x1.6646380000000p-1"],
]
GOLDEN_MASK = ["0000001101001100", "0100011110000000"]


def test_the_page_on_noise_prints_the_golden_values() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/noise.md").read_text()
    numbers = [float.hex(float.fromhex(word)) for word in page.split() if "0x1." in word]
    assert numbers == [number for rows in (GOLDEN_UNIFORM, GOLDEN_NORMAL) for row in rows for number in row]
    assert all(row in page for row in GOLDEN_MASK)
    keys = [noise.chain("a"), GOLDEN_KEY, noise.chain(0, "dropout", 0, 3, 11)]
    salts = [noise.chain("draf_dist.noise", kind) for kind in ("uniform", "normal", "bernoulli")]
    assert all(str(value) in page for value in keys + salts)


DRAWS = {
    "uniform": noise.uniform,
    "normal": noise.normal,
    "bernoulli": lambda keys, shape: noise.bernoulli(keys, shape, 0.2),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("shape", [(7,), (3, 5), (64, 10, 10), (5000,)])
def test_a_row_depends_on_its_key_alone(draw, shape) -> None:
    keys = noise.sample_keys(0, "rows", None, torch.arange(23), 2)
    whole = draw(keys, shape)
    assert whole.shape == (2, 23, *shape)
    assert torch.equal(draw(keys[1, 5:9], shape), whole[1, 5:9])
    assert torch.equal(draw(keys[:, ::3], shape), whole[:, ::3])
    assert torch.equal(draw(keys[1, 4], shape), whole[1, 4])


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_the_first_elements_do_not_depend_on_how_many_follow(draw) -> None:
    keys = torch.tensor(EXTREMES)
    long = draw(keys, (1000,))
    for size in (1, 2, 3, 6, 999):
        assert torch.equal(draw(keys, (size,)), long[:, :size])


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("block", [1, 3, 64, 1 << 20])
def test_the_size_of_the_blocks_changes_nothing(draw, block: int, monkeypatch) -> None:
    keys = torch.tensor(EXTREMES)
    expected = draw(keys, (333,))
    blocks._steps_np.cache_clear()
    monkeypatch.setattr(blocks, "BLOCK_CPU", block)
    try:
        assert torch.equal(draw(keys, (333,)), expected)
    finally:
        blocks._steps_np.cache_clear()


@pytest.mark.parametrize("block", [1, 50, 1 << 20])
def test_the_code_for_other_devices_gives_the_same_bits(block: int, monkeypatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_GPU", block)
    keys = torch.tensor(EXTREMES).view(2, 3)
    for draw in (draws._UNIFORM, draws._NORMAL, *(draws._mask(count) for count in (0, 1, 20_000, 32_768, 65_535, 65_536))):
        for shape in ((), (1,), (6,), (9, 13)):
            assert torch.equal(draw.with_torch(keys, shape), draw(keys, shape))


def test_the_number_of_threads_changes_nothing() -> None:
    keys = torch.tensor(EXTREMES)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = [draw(keys, (40_000,)) for draw in DRAWS.values()]
        torch.set_num_threads(2)
        assert all(torch.equal(a, draw(keys, (40_000,))) for a, draw in zip(one, DRAWS.values(), strict=True))
    finally:
        torch.set_num_threads(threads)


def test_draws_inside_a_compiled_function_are_the_same_bits() -> None:
    def noisy(x: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        kept = noise.bernoulli(keys, (5,), 0.7)
        return (x + noise.normal(keys, (5,)) - noise.uniform(keys, (5,))) * kept

    x, keys = torch.ones(6, 5), torch.arange(6)
    # The eager back end: what is tested is what the compiler is shown, and no C++ needs building.
    assert torch.equal(torch.compile(noisy, backend="eager", fullgraph=True)(x, keys), noisy(x, keys))


def test_masks_of_one_key_are_nested_and_0_and_1_are_exact() -> None:
    keys = torch.arange(20)
    masks = [noise.bernoulli(keys, (5000,), p) for p in (0.0, 1e-5, 0.1, 0.5, 0.99999, 1.0)]
    assert not masks[0].any()
    assert masks[-1].all()
    assert all((low <= high).all() for low, high in zip(masks, masks[1:], strict=False))


def test_uniform_stays_below_one_and_draws_of_no_elements_work() -> None:
    keys = torch.arange(200)
    numbers = noise.uniform(keys, (1000,))
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert noise.normal(keys[:0], (4,)).shape == (0, 4)
    assert noise.bernoulli(keys, (0, 3), 0.5).shape == (200, 0, 3)


def test_what_was_first_drawn_in_inference_mode_can_be_used_in_training() -> None:
    draws.normal_quantiles.cache_clear()
    draws._quantiles_np.cache_clear()
    with torch.inference_mode():
        noise.normal(torch.arange(2), (3,))
        draws._NORMAL.with_torch(torch.arange(2), (3,))
    weight = torch.ones(3, requires_grad=True)
    numbers = noise.normal(torch.arange(2), (3,))
    (weight * numbers * noise.bernoulli(torch.arange(2), (3,), 0.5)).sum().backward()
    assert weight.grad is not None


def test_wrong_keys_and_probabilities_are_refused() -> None:
    with pytest.raises(TypeError, match="int64"):
        noise.normal(torch.zeros(3), (2,))
    for probability in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="lies in"):
            noise.bernoulli(torch.arange(3), (2,), probability)


def test_an_altered_table_is_refused(tmp_path, monkeypatch) -> None:
    table = np.load(draws.TABLE)
    table[5] += 1e-3
    np.save(tmp_path / "table.npy", table)
    monkeypatch.setattr(draws, "TABLE", tmp_path / "table.npy")
    draws.normal_quantiles.cache_clear()
    try:
        with pytest.raises(DataError, match="sha256"):
            draws.normal_quantiles(torch.device("cpu"))
    finally:
        draws.normal_quantiles.cache_clear()
