"""Weights and descriptions as files that anyone may hand on: safetensors with digests beside them, never a pickle."""

import hashlib
from collections.abc import Collection, Mapping

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from draf_dist.errors import DataError, explain, together


def weights_of(module: nn.Module) -> bytes:
    """All parameters and buffers as one safetensors file. The same module gives the same bytes."""
    return save_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()})


def fill(module: nn.Module, content: bytes, *, where: str) -> None:
    """Copies the tensors of a safetensors file into a module.

    Raises:
        DataError: it is no such file, or a tensor is missing, superfluous, or of another shape or type.
    """
    try:
        tensors = load_tensors(content)
    except SafetensorError as error:
        raise DataError(
            explain(where, expected="a safetensors file", found=str(error), remedy="Export the model again.")
        ) from error
    problems = _differences(module.state_dict(), tensors, where)
    if problems:
        raise DataError(together(problems))
    module.load_state_dict(tensors, strict=True)


def require_files(files: Collection[str], required: Collection[str], *, where: str, what: str) -> None:
    """Refuses a folder that lacks some of its files.

    Raises:
        DataError: some are missing.
    """
    if missing := [name for name in required if name not in files]:
        raise DataError(explain(where, expected=what, found=f"no {', '.join(missing)}", remedy="Copy the folder again."))


def digest(content: bytes) -> str:
    """The sha256, 64 hex digits."""
    return hashlib.sha256(content).hexdigest()


def check_digest(content: bytes, expected: str, *, where: str) -> None:
    """Refuses content that is not what was written.

    Raises:
        DataError: it has another sha256.
    """
    if digest(content) != expected:
        found = f"{digest(content)[:12]} ({len(content)} bytes)"
        raise DataError(
            explain(where, expected=f"sha256 {expected[:12]}", found=found, remedy="The file is damaged; copy or export it again.")
        )


def unreadable(where: str, expected: str, error: ValidationError) -> DataError:
    """The refusal of a JSON file that is not what it should be, with the first problems found."""
    found = "; ".join(
        f"{'.'.join(str(part) for part in detail['loc']) or 'top level'}: {detail['msg']}" for detail in error.errors()[:3]
    )
    return DataError(explain(where, expected=expected, found=found, remedy="Export the model again with this version."))


def _differences(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], where: str) -> list[str]:
    """One line per tensor that is missing, superfluous, or of another shape or type."""
    remedy = "The weights and the description beside them do not belong together."
    problems = [
        explain(f"{where}: {name}", expected="a tensor", found="none", remedy=remedy) for name in sorted(expected.keys() - found)
    ]
    problems += [
        explain(f"{where}: {name}", expected="no such tensor", found="one", remedy=remedy)
        for name in sorted(found.keys() - expected)
    ]
    for name in sorted(expected.keys() & found.keys()):
        wanted, given = _form(expected[name]), _form(found[name])
        if wanted != given:
            problems.append(explain(f"{where}: {name}", expected=wanted, found=given, remedy=remedy))
    return problems


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
