"""Bad input for what the routers, their losses and helpers take beyond nn.Router."""

import pytest
import torch

from arguments import FLOAT, ID, H, ints, zeros
from moe_ops import losses, nn

T, E, K = 3, 4, 2
PARAMETER = torch.nn.Parameter(zeros(2))
LAYER = nn.MoE(H, 5, E, K)


def choice():
    return nn.ExpertChoiceRouter(H, E, K)


BAD = {
    "SwitchRouter jitter": (lambda: nn.SwitchRouter(H, E, jitter=1), ValueError, "SwitchRouter: jitter must be in [0"),
    "SwitchRouter bias": (lambda: nn.SwitchRouter(H, E, bias=1), TypeError, "SwitchRouter: bias must be True or False"),
    "NoisyTopKRouter top_k": (
        lambda: nn.NoisyTopKRouter(H, E, 5),
        ValueError,
        "route: top_k must be between 1 and num_experts (4), got 5",
    ),
    "NoisyTopKRouter x": (
        lambda: nn.NoisyTopKRouter(H, E, K)(zeros(T, 7)),
        ValueError,
        "NoisyTopKRouter: x must be of shape [..., 6], got [3, 7]",
    ),
    "HashRouter logits": (
        lambda: nn.HashRouter(H, E, K, vocabulary=9).logits(zeros(T, H)),
        ValueError,
        "HashRouter: score must be one that scores tokens to have logits, got 'uniform'",
    ),
    "truncated_normal_ scalar": (
        lambda: nn.init.truncated_normal_(torch.zeros(())),
        ValueError,
        "truncated_normal_: weight must be [..., fan_in] with fan_in of 1 or more, got shape []",
    ),
    "ExpertChoiceRouter hidden": (
        lambda: nn.ExpertChoiceRouter(0, E, K),
        ValueError,
        "ExpertChoiceRouter: hidden must be at least 1, got 0",
    ),
    "expert choice and capacity": (
        lambda: nn.MoE(H, 5, E, K, router=choice(), capacity_factor=1.0),
        ValueError,
        "MoE: capacity_factor must be None where experts choose, got 1.0",
    ),
    "expert choice and zero_computation": (
        lambda: nn.MoE(H, 5, E - 1, K, router=choice(), zero_computation=nn.ZeroComputationExperts(H, zero=1)),
        ValueError,
        "MoE: zero_computation must be None where experts choose",
    ),
    "zero_computation hidden": (
        lambda: nn.MoE(H, 5, E, K, zero_computation=nn.ZeroComputationExperts(7, zero=1)),
        ValueError,
        "MoE: zero_computation must have hidden 6, got 7",
    ),
    "ZeroComputationExperts none": (
        lambda: nn.ZeroComputationExperts(H),
        ValueError,
        "ZeroComputationExperts: zero, skip or constant must be at least 1, got 0 of each",
    ),
    "ZeroComputationExperts skip": (
        lambda: nn.ZeroComputationExperts(H, skip=-1),
        ValueError,
        "ZeroComputationExperts: skip must be at least 0, got -1",
    ),
    "HashRouter vocabulary": (
        lambda: nn.HashRouter(H, E, K, 0),
        ValueError,
        "HashRouter: vocabulary must be at least 1, got 0",
    ),
    "HashRouter score": (
        lambda: nn.HashRouter(H, E, K, 9, score="tanh"),
        ValueError,
        "HashRouter: score must be one of 'uniform', 'softmax', 'sigmoid', 'sqrtsoftplus', got 'tanh'",
    ),
    "HashRouter bias": (lambda: nn.HashRouter(H, E, K, 9, bias=True), ValueError, "HashRouter: bias must be False"),
    "HashRouter token_ids": (
        lambda: nn.HashRouter(H, E, K, 9)(zeros(T, H), token_ids=zeros(T)),
        TypeError,
        f"HashRouter: token_ids {ID} float32",
    ),
    "balanced_table": (
        lambda: nn.balanced_table([1], 2),
        TypeError,
        "balanced_table: frequencies must be a Tensor of shape [vocabulary], got list",
    ),
    "HierarchicalRouter groups": (
        lambda: nn.HierarchicalRouter(H, E, K, 2),
        TypeError,
        "HierarchicalRouter: groups must be a pair (num_groups, top_groups), got int 2",
    ),
    "HierarchicalRouter divisor": (
        lambda: nn.HierarchicalRouter(H, E, K, (3, 1)),
        ValueError,
        "HierarchicalRouter: groups must be (a divisor of num_experts (4)",
    ),
    "HierarchicalRouter held": (
        lambda: nn.HierarchicalRouter(H, E, 3, (2, 1)),
        ValueError,
        "HierarchicalRouter: groups must hold top_k / top_groups (3), got 2 each",
    ),
    "SparseMixerRouter threshold": (
        lambda: nn.SparseMixerRouter(H, E, threshold=0),
        ValueError,
        "SparseMixerRouter: threshold must be greater than 0, got 0",
    ),
    "Cascade experts": (lambda: nn.Cascade(None, []), TypeError, "Cascade: experts must be an Experts, got None"),
    "Cascade no routers": (
        lambda: nn.Cascade(LAYER.experts, []),
        ValueError,
        "Cascade: routers must be at least 1, got 0",
    ),
    "Cascade sizes": (
        lambda: nn.Cascade(LAYER.experts, [nn.Router(H, 5, K)]),
        ValueError,
        "Cascade: routers must have hidden, num_experts (6, 4), got (6, 5)",
    ),
    "LossFreeBalancing model": (
        lambda: nn.LossFreeBalancing(3),
        TypeError,
        "LossFreeBalancing: model must be a Module, got int 3",
    ),
    "LossFreeBalancing group": (
        lambda: nn.LossFreeBalancing(LAYER, group="all"),
        TypeError,
        "LossFreeBalancing: group must be a torch.distributed.ProcessGroup or None, got str 'all'",
    ),
    "parameter_groups": (
        lambda: nn.parameter_groups(LAYER, 3),
        TypeError,
        "parameter_groups: router must be a mapping of options, got int 3",
    ),
    "parameter_groups no router": (
        lambda: nn.parameter_groups(LAYER.experts, {}),
        ValueError,
        "parameter_groups: model must have a router with parameters, got none",
    ),
    "GradientSmoothing decay": (
        lambda: nn.GradientSmoothing([PARAMETER], decay=1.0),
        ValueError,
        "GradientSmoothing: decay must be in [0, 1), got 1.0",
    ),
    "GradientSmoothing attach": (
        lambda: nn.GradientSmoothing([PARAMETER]).attach(None),
        TypeError,
        "GradientSmoothing: optimizer must be an Optimizer, got None",
    ),
    "WarmUp layer": (lambda: nn.WarmUp(None, 3), TypeError, "WarmUp: layer must be an MoE, got None"),
    "WarmUp nothing": (
        lambda: nn.WarmUp(LAYER, 3),
        ValueError,
        "WarmUp: top_k or capacity_factor must be given, got None for both",
    ),
    "WarmUp top_k": (
        lambda: nn.WarmUp(LAYER, 3, top_k=(5, 1)),
        ValueError,
        "route: top_k must be between 1 and num_experts (4), got 5",
    ),
    "importance experts": (
        lambda: losses.importance(zeros(T, K), zeros(T, K), E),
        TypeError,
        f"importance: experts {ID} float32",
    ),
    "importance weights": (
        lambda: losses.importance(ints(T, K), ints(T, K), E),
        TypeError,
        f"importance: weights {FLOAT} int32",
    ),
    "load": (lambda: losses.load(zeros(1, E)), ValueError, "load: load must be of shape [experts], got [1, 4]"),
    "local_entropy": (
        lambda: losses.local_entropy(zeros(E)),
        ValueError,
        "local_entropy: logits must be of shape [tokens, experts], got [4]",
    ),
    "global_entropy": (
        lambda: losses.global_entropy(zeros(1, E), weight="x"),
        TypeError,
        "global_entropy: weight must be a number, got str 'x'",
    ),
    "even_": (lambda: nn.init.even_(3), TypeError, "even_: router must be a LinearRouter, got int 3"),
    "truncated_normal_": (
        lambda: nn.init.truncated_normal_(zeros(2, 2), scale=0),
        ValueError,
        "truncated_normal_: scale must be greater than 0, got 0",
    ),
    "upcycle_": (
        lambda: nn.init.upcycle_(LAYER.experts, zeros(9, H), zeros(H, 5)),
        ValueError,
        "upcycle_: w_in must be of shape [out, in] = [10, 6], got [9, 6]",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, text = BAD[name]
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert str(caught.value).startswith(text), str(caught.value)
