"""Tensors in pieces: what one rank owns of a state, the file that it makes of it, and whole tensors out of the files of all ranks.

A file is safetensors. Its keys are `<kind>/<name>@<start>`, elements from `start` on of a tensor flattened, and `<kind>/<name>` for
a tensor without axes; the metadata of the header say the shape of the whole. Kinds: weight, buffer, exp_avg, exp_avg_sq, step.
"""

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from draf_dist.errors import DataError, explain

Kind = Literal["weight", "buffer", "exp_avg", "exp_avg_sq", "step"]
# Adam's state beside its step counter.
MOMENTS: tuple[Kind, ...] = ("exp_avg", "exp_avg_sq")
KINDS_OF_ADAM: tuple[Kind, ...] = (*MOMENTS, "step")
# Names that safetensors has for them: https://github.com/huggingface/safetensors#format
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA = "__metadata__"
# The header is preceded by its length, and padded so that what follows is aligned for every dtype.
LENGTH_BYTES, ALIGNMENT = 8, 8


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + n) of a tensor, flattened. values (n,) are the live ones, on their device; shape: of the whole."""

    kind: Kind
    name: str
    shape: tuple[int, ...]
    start: int
    values: Tensor

    @property
    def tensor(self) -> str:
        """What tells the whole tensor from all others."""
        return f"{self.kind}/{self.name}"

    @property
    def key(self) -> str:
        """What it is called in a file."""
        return f"{self.tensor}@{self.start}" if self.shape else self.tensor


def kind_of(value: Tensor) -> Kind:
    """What an entry of a state_dict with its variables kept is."""
    return "weight" if isinstance(value, nn.Parameter) else "buffer"


def whole(kind: Kind, name: str, value: Tensor) -> Fragment:
    """All of a tensor."""
    return Fragment(kind, name, tuple(value.shape), 0, value.detach().reshape(-1))


def shared_out(fragments: Iterable[Fragment], rank: int, world: int) -> list[Fragment]:
    """The part of a rank in what every rank holds whole: laid end to end, and cut into `world` pieces of about as many bytes.

    A tensor of no elements is the first rank's.
    """
    everything = list(fragments)
    total = sum(_size_bytes(each) for each in everything)
    low, high = total * rank // world, total * (rank + 1) // world
    mine: list[Fragment] = []
    offset = 0
    for each in everything:
        size, count = each.values.element_size(), each.values.numel()
        # An element belongs to the rank in whose piece it begins.
        first, last = (min(max(-((offset - cut) // size), 0), count) for cut in (low, high))
        if first < last or (count == 0 and rank == 0):
            mine.append(Fragment(each.kind, each.name, each.shape, each.start + first, each.values[first:last]))
        offset += size * count
    return mine


class HostCopy:
    """The file of one rank in host memory, which serves again from save to save for as long as the rank owns the same pieces."""

    def __init__(self) -> None:
        self._layout: tuple[tuple[str, tuple[int, ...], torch.dtype, int], ...] = ()
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._places: list[Tensor] = []

    def take(self, fragments: Sequence[Fragment]) -> memoryview:
        """Copies the fragments and gives the bytes of their file, which the next call overwrites.

        This is all that training waits for; from a GPU it goes into pinned memory, all tensors at once.
        """
        # Widest first, so that each begins at a multiple of its own size.
        ordered = sorted(fragments, key=lambda each: -each.values.element_size())
        layout = tuple((each.key, each.shape, each.values.dtype, each.values.numel()) for each in ordered)
        on_gpu = any(each.values.is_cuda for each in ordered)
        if layout != self._layout:
            self._arrange(ordered, pinned=on_gpu)
            self._layout = layout
        for place, each in zip(self._places, ordered, strict=True):
            place.copy_(each.values, non_blocking=True)
        if on_gpu:
            torch.cuda.synchronize()
        return memoryview(self._memory.numpy())  # type: ignore[arg-type]

    def _arrange(self, ordered: Sequence[Fragment], *, pinned: bool) -> None:
        header = _header(ordered)
        # What was held before goes first: it may be as large.
        self._places, self._memory = [], torch.empty(0, dtype=torch.uint8)
        self._memory = torch.empty(len(header) + sum(map(_size_bytes, ordered)), dtype=torch.uint8, pin_memory=pinned)
        self._memory[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        offset = len(header)
        for each in ordered:
            size = _size_bytes(each)
            self._places.append(self._memory[offset : offset + size].view(each.values.dtype))
            offset += size


def _header(ordered: Sequence[Fragment]) -> bytes:
    """The beginning of a safetensors file, its length included."""
    entries: dict[str, object] = {METADATA: {each.tensor: json.dumps(each.shape) for each in ordered}}
    offset = 0
    for each in ordered:
        stop = offset + _size_bytes(each)
        shape = [each.values.numel()] if each.shape else []
        entries[each.key] = {"dtype": DTYPE_NAMES[each.values.dtype], "shape": shape, "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def _size_bytes(fragment: Fragment) -> int:
    return fragment.values.numel() * fragment.values.element_size()


@dataclass(frozen=True)
class _Piece:
    start: int
    values: Tensor


class WholeTensors(Mapping[str, Tensor]):
    """`<kind>/<name>` -> the whole tensor, put together anew at every look from the files of all ranks, which are held meanwhile.

    So besides the files no more than the tensors in use takes memory.
    """

    def __init__(self, files: Iterable[bytes | memoryview], where: str) -> None:
        """where: for messages.

        Raises:
            DataError: pieces of a tensor are missing, or there are two of one.
        """
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[str, list[_Piece]] = {}
        for file in files:
            self._add(file)
        for name, pieces in self._pieces.items():
            pieces.sort(key=lambda piece: piece.start)
            _check_whole(pieces, self._shapes[name], f"{where}: {name}")

    def __getitem__(self, name: str) -> Tensor:
        values = [piece.values for piece in self._pieces[name]]
        # cat of one copies as well: nobody gets a view of a file.
        return torch.cat(values).view(self._shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without putting it together."""
        return self._shapes[name]

    def of(self, *kinds: Kind) -> Iterator[str]:
        """The names of tensors of these kinds, without the kind."""
        return (name for kind, _, name in (key.partition("/") for key in self) if kind in kinds)

    def weights(self) -> dict[str, Tensor]:
        """Parameters and buffers by name, as a state_dict holds them."""
        keys = (key for key in self if key.partition("/")[0] in ("weight", "buffer"))
        return {key.partition("/")[2]: self[key] for key in keys}

    def _add(self, file: bytes | memoryview) -> None:
        start = LENGTH_BYTES + int.from_bytes(file[:LENGTH_BYTES], "little")
        header = json.loads(bytes(file[LENGTH_BYTES:start]))
        for name, shape in header.pop(METADATA, {}).items():
            self._shapes[name] = tuple(json.loads(shape))
        for key, entry in header.items():
            name, cut, first = key.rpartition("@")
            dtype, (low, high) = DTYPES[entry["dtype"]], entry["data_offsets"]
            values = _view(file, dtype, start + low, (high - low) // dtype.itemsize)
            self._pieces.setdefault(name if cut else key, []).append(_Piece(int(first) if cut else 0, values))


def _view(file: bytes | memoryview, dtype: torch.dtype, offset: int, count: int) -> Tensor:
    if count == 0:
        return torch.empty(0, dtype=dtype)
    with warnings.catch_warnings():
        # Nothing writes there: __getitem__ copies.
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        return torch.frombuffer(file, dtype=dtype, count=count, offset=offset)


def _check_whole(pieces: Sequence[_Piece], shape: tuple[int, ...], where: str) -> None:
    position = 0
    for piece in pieces:
        if piece.start != position:
            break
        position += piece.values.numel()
    expected = torch.Size(shape).numel()
    if position != expected or sum(piece.values.numel() for piece in pieces) != expected:
        found = f"pieces that begin at {', '.join(str(piece.start) for piece in pieces[:5])}"
        remedy = "This checkpoint is not used."
        raise DataError(explain(where, expected=f"all of {expected} elements once", found=found, remedy=remedy))
