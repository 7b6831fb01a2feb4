"""A model of two MoE layers for the tests of monitor."""

import torch

from moe_ops import nn

HIDDEN, EXPERTS, TOP_K, TOKENS = 16, 6, 2, 40


def layers(device, **router):
    torch.manual_seed(0)
    two = [nn.MoE(HIDDEN, 8, EXPERTS, TOP_K, router=router, capacity_factor=1.0) for _ in range(2)]
    return torch.nn.Sequential(*two).to(device)
