import subprocess
import sys

import pytest
import torch

from draf_dist.training.not_imported import not_compiled, not_imported

DEEPSPEED_STEP = """
import sys
import torch
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
from draf_dist.training.deepspeed_config import DeepSpeedConfig
from draf_dist.training.deepspeed_engine import DeepSpeedRanks
from draf_dist.training.job import OptimizerConfig
ranks = DeepSpeedRanks(DeepSpeedConfig(zero_stage={stage}), torch.device("cpu"), 1, 1)
engine, _ = ranks.start(torch.nn.Linear(3, 2), OptimizerConfig())
engine.backward(engine.module(torch.ones(1, 3)).sum())
engine.step(0.1)
sys.exit("torch._dynamo" in sys.modules)
"""


class TestNotImported:
    def test_module_is_missing_while_entered_only(self) -> None:
        sys.modules.pop("colorsys", None)
        with not_imported("colorsys"), pytest.raises(ImportError):
            import colorsys
        import colorsys  # noqa: F811

        assert colorsys.rgb_to_hsv(0, 0, 0) == (0, 0, 0)

    def test_what_was_imported_stays(self) -> None:
        with not_imported("sys"):
            import sys as found
        assert found is sys


class TestNotCompiled:
    def test_functions_stay_as_they_are_however_they_are_marked(self) -> None:
        compiled = torch.compile
        with not_compiled():
            marked = torch.compile(len)
            called = torch.compile(backend="eager")(len)
        assert marked is len
        assert called is len
        assert torch.compile is compiled

    @pytest.mark.parametrize("stage", [1, 2])
    def test_rank_trains_without_torch_compiler(self, stage: int) -> None:
        # Seconds of every start of every rank, also after a failure.
        done = subprocess.run(
            [sys.executable, "-c", DEEPSPEED_STEP.format(stage=stage)], check=False, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
