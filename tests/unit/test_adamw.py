import subprocess
import sys

import torch
from torch import nn

from draf_dist.training.adamw import AdamW

LEARNING_RATE, WEIGHT_DECAY = 3e-2, 0.1
WITHOUT_COMPILER = """
import sys, torch
from draf_dist.training.adamw import AdamW
layer = torch.nn.Linear(3, 2)
optimizer = AdamW(layer.parameters(), lr=0.1)
layer(torch.ones(1, 3)).sum().backward()
optimizer.step()
optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
sys.exit("torch._dynamo" in sys.modules)
"""


def train(kind: type[torch.optim.AdamW], steps: int, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    generator = torch.Generator().manual_seed(seed)
    module = nn.Linear(5, 3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    optimizer = kind([module.weight], lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    optimizer.add_param_group({"params": [module.bias], "weight_decay": 0.0})
    for _ in range(steps):
        optimizer.zero_grad()
        module(torch.randn(8, 5, generator=generator)).square().sum().backward()
        optimizer.step()
    return module, optimizer


class TestAdamW:
    def test_steps_are_those_of_torch_to_the_bit(self) -> None:
        (ours, mine), (theirs, torchs) = train(AdamW, 20), train(torch.optim.AdamW, 20)
        for found, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(found, expected)
        for found, expected in zip(mine.state.values(), torchs.state.values(), strict=True):
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected)

    def test_gradients_are_off_in_a_step_and_on_again_after_it(self) -> None:
        module, _ = train(AdamW, 1)
        assert torch.is_grad_enabled()
        assert all(parameter.is_leaf and parameter.requires_grad for parameter in module.parameters())

    def test_torch_compiler_is_never_imported(self) -> None:
        # In a process of its own: this one may have it from elsewhere.
        assert subprocess.run([sys.executable, "-c", WITHOUT_COMPILER], check=False).returncode == 0
