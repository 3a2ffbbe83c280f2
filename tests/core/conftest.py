"""One thread for every core test: on tiny tensors a second one only waits for a busy core."""

import torch

torch.set_num_threads(1)
