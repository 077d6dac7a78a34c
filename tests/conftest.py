"""One thread for torch: tests share the machine, and small tensors are faster without a pool. Puts tests/ on the path too.

Signals are heard, whoever started the tests: what runs in the background of a shell ignores SIGINT, and so would all its children.
Hypothesis sets no deadline: on a busy machine it would measure the machine.
"""

import signal

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")
signal.signal(signal.SIGINT, signal.default_int_handler)
