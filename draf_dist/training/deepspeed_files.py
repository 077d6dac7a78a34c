"""What a rank of DeepSpeed owns of parameters and optimizer state, and how it gets them back: no rank talks to another to save.

Under ZeRO 1 and 2 a rank owns pieces of one flat f32 copy of all parameters (`_hp_mapping` says which), under ZeRO 3 one part of
every parameter, all of one size and so padded. What every rank holds whole is shared out among them by bytes.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from draf_dist.errors import GateError, explain
from draf_dist.training.fragments import MOMENTS, Fragment, Kind, WholeTensors, kind_of, shared_out, whole
from draf_dist.training.not_imported import not_imported
from draf_dist.training.torch_engine import load_weights

# DeepSpeed's autotuner imports MLflow wherever it is installed: a quarter of the time that a rank takes to start.
with not_imported("mlflow"):
    import deepspeed
    from deepspeed.utils import safe_set_local_optimizer_state


@dataclass(frozen=True)
class DeepSpeedFiles:
    """See EngineFiles. A state that any number of ranks, any ZeRO stage or one process wrote is a state for this one."""

    engine: Any
    zero_stage: int

    def fragments(self) -> list[Fragment]:
        """What this rank owns, where it lies now."""
        tensors = self.engine.module.state_dict(keep_vars=True)
        cut = {name: value for name, value in tensors.items() if self._is_cut(value)}
        common = [whole(kind_of(value), name, value) for name, value in tensors.items() if name not in cut]
        mine = [fragment for name, value in cut.items() for fragment in self._piece("weight", name, value)]
        held = self._held()
        if held is not None:
            self._link_moments()
            for name, parameter in self._trained():
                common.append(whole("step", name, held["step"]))
                for kind in MOMENTS:
                    if self.zero_stage == 0:
                        common.append(whole(kind, name, self.engine.optimizer.state[parameter][kind]))
                    elif name in cut:
                        mine += self._piece(kind, name, parameter)
        return mine + shared_out(common, dist.get_rank(), dist.get_world_size())

    def load(self, state: WholeTensors) -> None:
        """Restores parameters and optimizer state, bit for bit.

        On every rank the parameters are whole for a moment, besides the files; of the moments one at a time.

        Raises:
            DataError: these are other parameters than the model's.
        """
        module, optimizer = self.engine.module, self.engine.optimizer
        with self._gathered(list(module.parameters())):
            load_weights(module, state.weights())
        if self.zero_stage > 0:
            optimizer.refresh_fp32_params()
        steps = [state[f"step/{name}"] for name in state.of("step")]
        if not steps:
            return
        self._make_optimizer_state(torch.stack(steps).max())
        for name, parameter in self._trained():
            for kind in MOMENTS:
                self._set_moment(parameter, kind, f"{kind}/{name}", state)

    def check(self) -> None:
        """Compares this rank's pieces of the weights with the parameters of the module; every rank calls it.

        Where pieces begin is read from DeepSpeed's internals: a version or a setting that lays them out in another way would
        scramble every checkpoint without a word. Under ZeRO 3 one parameter at a time is whole for it.

        Raises:
            GateError: on any rank they differ, or the pieces of all ranks are not all elements.
        """
        tensors = self.engine.module.state_dict(keep_vars=True)
        cut = [(name, value) for name, value in tensors.items() if self._is_cut(value)]
        whole_size = sum(_size(value) for _, value in cut)
        # Elements that the ranks hold, and pieces of theirs that are wrong.
        found = torch.tensor([0, 0], device=self.engine.device)
        for name, value in cut:
            mine = self._piece("weight", name, value)
            with self._gathered([value], changed=False):
                found[1] += sum(not _is_part_of(each, value) for each in mine)
            found[0] += sum(each.values.numel() for each in mine)
        dist.all_reduce(found)
        num_held, num_wrong = found.tolist()
        if num_wrong or num_held != whole_size:
            expected = f"each of the {whole_size:,} elements of parameters with one rank, at its place"
            told = f"{num_held:,} elements, and {num_wrong} pieces with others than their parameter has there"
            remedy = "This DeepSpeed lays its state out in another way, which would scramble checkpoints: install another version."
            raise GateError(explain(f"DeepSpeed {deepspeed.__version__}", expected=expected, found=told, remedy=remedy))

    def _is_cut(self, value: Tensor) -> bool:
        """Whether the ranks hold this one in parts."""
        if not isinstance(value, nn.Parameter):
            return False
        return self.zero_stage == 3 or (self.zero_stage > 0 and value.requires_grad and value.numel() > 0)

    def _piece(self, kind: Kind, name: str, parameter: nn.Parameter) -> list[Fragment]:
        """This rank's part of a parameter that is cut, or of its moment; none where all of it is other ranks'."""
        if self.zero_stage == 3:
            shape: torch.Size = parameter.ds_shape  # type: ignore[attr-defined]
            start, count = _span(parameter)
            return [Fragment(kind, name, tuple(shape), start, self._part(kind, parameter)[:count])] if count else []
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return []
        values = mapping.get_hp_fragment(None if kind == "weight" else kind).detach()
        return [Fragment(kind, name, tuple(parameter.shape), mapping.lp_fragment_address.start, values)]

    def _part(self, kind: Kind, parameter: nn.Parameter) -> Tensor:
        """This rank's part under ZeRO 3, padded. DeepSpeed's own getter would bring to the GPU what is offloaded."""
        if not parameter.requires_grad:
            frozen: Tensor = parameter.ds_tensor.detach()  # type: ignore[attr-defined]
            return frozen
        part, _ = self.engine.optimizer._get_fp32_opt_state_partition(
            parameter, release_swap_buffers=True, optim_state_key=None if kind == "weight" else kind
        )
        found: Tensor = part.detach()
        return found

    def _set_moment(self, parameter: nn.Parameter, kind: Kind, tensor: str, state: WholeTensors) -> None:
        if self.zero_stage == 0:
            self.engine.optimizer.state[parameter][kind].copy_(state[tensor])
        elif self.zero_stage == 3:
            # DeepSpeed's setter of whole tensors fails where a parameter can't be cut evenly; its parts are of one size, padded.
            size: int = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
            start, count = _span(parameter)
            part = functional.pad(state[tensor].flatten()[start : start + count], (0, size - count))
            safe_set_local_optimizer_state(parameter, part.to(self.engine.device), kind)
        elif parameter._hp_mapping is not None:  # type: ignore[attr-defined]
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            address = mapping.lp_fragment_address
            mapping.get_hp_fragment(kind).copy_(state[tensor].flatten()[address.start : address.start + address.numel])

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, parameter) for name, parameter in self.engine.module.named_parameters() if parameter.requires_grad)

    def _state(self) -> Mapping[Tensor, dict[str, Tensor]]:
        optimizer = self.engine.optimizer if self.zero_stage == 0 else self.engine.optimizer.optimizer
        state: Mapping[Tensor, dict[str, Tensor]] = optimizer.state
        return state

    def _held(self) -> dict[str, Tensor] | None:
        """Adam's state of one tensor, which has the step counter of all; None before the first step."""
        state = self._state()
        return next((state[owner] for owner in self._owners() if owner in state and state[owner]), None)

    def _owners(self) -> list[Tensor]:
        """The tensors that Adam keeps state of: flat parts of the parameters under ZeRO."""
        optimizer = self.engine.optimizer
        if self.zero_stage == 0:
            return [parameter for _, parameter in self._trained()]
        flat: list[Tensor] = (
            optimizer.fp32_partitioned_groups_flat if self.zero_stage == 3 else optimizer.single_partition_of_fp32_groups
        )
        return flat

    def _make_optimizer_state(self, step: Tensor) -> None:
        """State as after the first step, which an engine that never stepped does not have yet."""
        state = self._state()
        for owner in self._owners():
            for kind in MOMENTS:
                state[owner].setdefault(kind, torch.zeros_like(owner)).zero_()
            state[owner]["step"] = step.clone()
        self._link_moments()

    def _link_moments(self) -> None:
        """Lets ZeRO 1 and 2 find the moments of every parameter.

        DeepSpeed does it once, after the first of several groups has stepped, when the others have no moments yet.
        """
        if self.zero_stage in (1, 2):
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    @contextmanager
    def _gathered(self, parameters: list[nn.Parameter], *, changed: bool = True) -> Iterator[None]:
        """Parameters whole while entered; what rank 0 left in them stays, if they are changed."""
        if self.zero_stage < 3 or not parameters:
            yield
            return
        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if changed else None):
            yield


def _size(parameter: nn.Parameter) -> int:
    """Elements of all ranks' parts."""
    size: int = getattr(parameter, "ds_numel", parameter.numel())
    return size


def _is_part_of(piece: Fragment, parameter: nn.Parameter) -> bool:
    there = parameter.detach().flatten()[piece.start : piece.start + piece.values.numel()]
    return torch.equal(piece.values, there.to(piece.values.device))


def _span(parameter: nn.Parameter) -> tuple[int, int]:
    """Where this rank's part of a parameter begins under ZeRO 3, and how many of its elements are no padding."""
    size: int = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
    start = size * dist.get_rank()
    return start, max(0, min(size, parameter.ds_numel - start))  # type: ignore[attr-defined]
