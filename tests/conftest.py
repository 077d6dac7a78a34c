"""One thread for torch: tests share the machine, and small tensors are faster without a pool. Puts tests/ on the path too.

Signals are heard, whoever started the tests: what runs in the background of a shell ignores SIGINT, and so would all its children.
"""

import signal

import torch

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)
