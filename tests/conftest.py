"""One thread for torch: tests share the machine, and small tensors are faster without a pool. Puts tests/ on the path too.

Signals are heard, whoever started the tests: what runs in the background of a shell ignores SIGINT, and so would all its children.
Hypothesis sets no deadline: on a busy machine it would measure the machine.
The cache of the node is one of the session's own: what is read from a bucket really comes from there.
"""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _cache_of_the_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder: Path = tmp_path_factory.mktemp("node-cache") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DRAF_CACHE_DIR", str(folder))
        yield folder
