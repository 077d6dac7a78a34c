"""A state in pieces: cut among ranks, written as safetensors, put together again bit for bit."""

from collections.abc import Sequence

import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from draf_dist.errors import DataError
from draf_dist.training.fragments import ALIGNMENT, Fragment, HostCopy, WholeTensors, shared_out, whole

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool)


def state(seed: int = 0) -> dict[str, Tensor]:
    """Tensors of many sizes and types; one without axes, one without elements."""
    draw = torch.Generator().manual_seed(seed)
    sizes = ((3, 5), (7,), (2, 3, 4), (1,), (11,), (13,))
    tensors = {
        f"weight/layer.{i}": torch.randint(0, 2 if dtype == torch.bool else 100, size, generator=draw).to(dtype)
        for i, (dtype, size) in enumerate(zip(DTYPES, sizes, strict=True))
    }
    return {**tensors, "step/layer.0": torch.tensor(4.0), "weight/empty": torch.empty(0, 3), "buffer/a@b/c": torch.randn(4)}


def fragments_of(tensors: dict[str, Tensor]) -> list[Fragment]:
    return [whole(*key.split("/", 1), value) for key, value in tensors.items()]  # type: ignore[arg-type]


def files_of(parts: Sequence[list[Fragment]]) -> list[bytes]:
    return [bytes(HostCopy().take(part)) for part in parts]


def assert_equal(found: WholeTensors, expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape == torch.Size(found.shape(name))
        assert torch.equal(found[name], value)


@pytest.mark.parametrize("world", [1, 2, 3, 5, 40])
def test_what_all_ranks_hold_is_shared_out_and_put_together_bit_for_bit(world: int) -> None:
    tensors = state()
    parts = [shared_out(fragments_of(tensors), rank, world) for rank in range(world)]
    assert_equal(WholeTensors(files_of(parts), "here"), tensors)


def test_every_rank_writes_about_as_many_bytes() -> None:
    tensors = {f"weight/{i}": torch.randn(1000 + 37 * i) for i in range(10)} | {"weight/large": torch.randn(50_000)}
    sizes = [sum(each.values.nbytes for each in shared_out(fragments_of(tensors), rank, 3)) for rank in range(3)]
    assert max(sizes) - min(sizes) <= 8


def test_a_file_is_safetensors_and_its_tensors_are_aligned() -> None:
    (file,) = files_of([fragments_of(state())])
    found = load(file)
    assert torch.equal(found["weight/layer.0@0"].view(3, 5), state()["weight/layer.0"])
    assert torch.equal(found["step/layer.0"], torch.tensor(4.0))
    assert (8 + int.from_bytes(file[:8], "little")) % ALIGNMENT == 0


def test_the_memory_of_a_copy_serves_the_next_one_and_a_new_layout_gets_its_own() -> None:
    copy, tensors = HostCopy(), state()
    first = copy.take(fragments_of(tensors))
    kept = bytes(first)
    for value in tensors.values():
        value.zero_()
    # A copy: what happens to the state afterwards does not show.
    assert bytes(first) == kept
    second = copy.take(fragments_of(tensors))
    assert torch.frombuffer(first, dtype=torch.uint8).data_ptr() == torch.frombuffer(second, dtype=torch.uint8).data_ptr()
    assert bytes(first) != kept
    tensors |= {"exp_avg/layer.0": torch.ones(3, 5)}
    assert_equal(WholeTensors([copy.take(fragments_of(tensors))], "here"), tensors)


def test_pieces_that_are_missing_or_there_twice_are_named() -> None:
    tensors = state()
    files = files_of([shared_out(fragments_of(tensors), rank, 3) for rank in range(3)])
    for broken in (files[:2], files[1:], [*files, files[0]]):
        with pytest.raises(DataError, match=r"here: weight/\S+: expected all of \d+ elements once"):
            WholeTensors(broken, "here")


def test_what_is_put_together_is_nobody_elses_memory() -> None:
    file = bytearray(files_of([fragments_of(state())])[0])
    found = WholeTensors([memoryview(file)], "here")
    before = found["weight/layer.0"]
    before.zero_()
    assert torch.equal(found["weight/layer.0"], state()["weight/layer.0"])
