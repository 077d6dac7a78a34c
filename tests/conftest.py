"""One thread for torch: tests share the machine, and small tensors are faster without a pool. Puts tests/ on the path too."""

import torch

torch.set_num_threads(1)
