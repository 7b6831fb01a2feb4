"""Prints what nvcc calls the architecture of torch's device 0: 80, or 90a, which has Hopper's own instructions."""

import torch

major, minor = torch.cuda.get_device_capability()
print(f"{major}{minor}" + "a" * (major == 9))
