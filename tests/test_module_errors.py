"""Bad input for every argument of the losses and modules, as tests/test_errors.py has it for the operators."""

import inspect

import pytest
import torch

from arguments import ACTIVATION, FLOAT, ID, ON_CPU, POLICY, SCORE, H, a_plan, elsewhere, half, ints, zeros
from cases import INF, NAN
from moe_ops import RouteResult, losses, nn

T, E, K, INNER = 3, 4, 2, 5
COUNTS, PROB = ints(1, E), zeros(1, E)


def router(**options):
    return nn.Router(H, E, K, **({"correction_bias": True} | options))


def experts(**options):
    return nn.Experts(E, H, INNER, **options)


def moe(**options):
    return nn.MoE(H, INNER, E, K, **options)


# Name in the errors: the function, and a valid call of it.
ROUTED = {"x": zeros(T, H), "weights": zeros(T, K), "experts": ints(T, K)}
GOOD = {
    "load_balancing": (losses.load_balancing, {"route": (COUNTS, PROB)}),
    "z_loss": (losses.z_loss, {"logsumexp": zeros(T)}),
    "Router": (nn.Router, {"hidden": H, "num_experts": E, "top_k": K}),
    "Router.forward": (router(), {"x": zeros(T, H), "stats": True}),
    "Router.update_bias": (router().update_bias, {"counts": ints(E), "rate": 0.1}),
    "Experts": (nn.Experts, {"num_experts": E, "hidden": H, "inner": INNER}),
    "Experts.forward": (experts(), ROUTED),
    "Experts.forward, naive": (experts(impl="naive"), ROUTED),
    "MoE": (nn.MoE, {"hidden": H, "inner": INNER, "num_experts": E, "top_k": K}),
    "MoE.forward": (moe(), {"x": zeros(T, H), "return_route": True}),
}

DTYPE = "must be None, float32, bfloat16, float16 or float64, got"
BOOL = "must be True or False, got str 'yes'"
SIZE = "must be at least 1, got 0"
TORCH = "Expected one of cpu, cuda"  # what torch says of a device it does not know

# Function, changed arguments (the first is at fault), exception, the name the error begins with, the text after.
BAD = [
    # load_balancing
    ("load_balancing", {"route": None}, TypeError, ": route must be a RouteResult or a pair (counts, mean_prob), got"),
    ("load_balancing", {"route": (1, 2, 3)}, TypeError, ": route must be a RouteResult or a pair (counts, mean_prob)"),
    (
        "load_balancing",
        {"route": (1, 2)},
        TypeError,
        ": route.counts must be a Tensor of shape [segments, experts], got",
    ),
    (
        "load_balancing",
        {"route": (ints(E), PROB)},
        ValueError,
        ": route.counts must be of shape [segments, experts], got",
    ),
    (
        "load_balancing",
        {"route": (zeros(T, K), ints(T, K))},
        TypeError,
        ": route.counts must be of dtype int32 or int64 (call route with stats=True), got float32",
    ),
    ("load_balancing", {"route": (COUNTS, COUNTS)}, TypeError, f": route.mean_prob {FLOAT} int32"),
    (
        "load_balancing",
        {"route": (COUNTS, zeros(2, E))},
        ValueError,
        ": route.mean_prob must be of shape [segments, experts] = [1, 4], got [2, 4]",
    ),
    (
        "load_balancing",
        {"route": (COUNTS, elsewhere(1, E))},
        ValueError,
        f": route.mean_prob {ON_CPU.format('route.counts')}",
    ),
    ("load_balancing", {"alpha": "x"}, TypeError, ": alpha must be a number, got str 'x'"),
    ("load_balancing", {"alpha": NAN}, ValueError, ": alpha must be a finite float64, got nan"),
    ("load_balancing", {"group": 1}, TypeError, ": group must be a torch.distributed.ProcessGroup or None, got int 1"),
    # z_loss
    ("z_loss", {"logsumexp": None}, TypeError, ": logsumexp must be a Tensor of shape [tokens], got None"),
    ("z_loss", {"logsumexp": zeros(T, E)}, ValueError, ": logsumexp must be of shape [tokens], got [3, 4]"),
    ("z_loss", {"logsumexp": ints(T)}, TypeError, f": logsumexp {FLOAT} int32"),
    (
        "z_loss",
        {"logsumexp": RouteResult(*[zeros(T)] * 5)},
        TypeError,
        ": logsumexp must be a Tensor of shape [tokens]",
    ),
    ("z_loss", {"weight": None}, TypeError, ": weight must be a number, got None"),
    ("z_loss", {"weight": INF}, ValueError, ": weight must be a finite float64, got inf"),
    # Router
    ("Router", {"hidden": 0}, ValueError, f": hidden {SIZE}"),
    ("Router", {"hidden": "a"}, TypeError, ": hidden must be an int, got str 'a'"),
    ("Router", {"num_experts": -1}, ValueError, ": num_experts must be at least 1, got -1"),
    ("Router", {"top_k": 5}, ValueError, "route: top_k must be between 1 and num_experts (4), got 5"),
    ("Router", {"bias": "yes"}, TypeError, f": bias {BOOL}"),
    ("Router", {"score": "tanh"}, ValueError, f"route: score {SCORE} 'tanh'"),
    ("Router", {"groups": (3, 1)}, ValueError, "route: groups must split num_experts (4) evenly, got 3 groups"),
    ("Router", {"group_score": "sum"}, ValueError, "route: group_score must be one of 'max', 'top2_sum', got 'sum'"),
    ("Router", {"group_mask": "inf"}, ValueError, "route: group_mask must be one of '-inf', 'zero', got 'inf'"),
    (
        "Router",
        {"renormalize": "l2"},
        ValueError,
        "route: renormalize must be one of False, True, 'clamp', 'pnorm', got",
    ),
    ("Router", {"eps": INF}, ValueError, "route: eps must be a finite float32, got inf"),
    ("Router", {"p": INF}, ValueError, "route: p must be a finite float64, got inf"),
    ("Router", {"scale": "2"}, TypeError, "route: scale must be a number, got str '2'"),
    ("Router", {"softcap": INF}, ValueError, "route: softcap must be a finite float32, got inf"),
    ("Router", {"expert_scale": "yes"}, TypeError, f": expert_scale {BOOL}"),
    ("Router", {"correction_bias": "yes"}, TypeError, f": correction_bias {BOOL}"),
    ("Router", {"jitter": "a"}, TypeError, ": jitter must be a number, got str 'a'"),
    ("Router", {"jitter": 1.0}, ValueError, ": jitter must be in [0, 1), got 1.0"),
    ("Router", {"device": "nowhere"}, RuntimeError, TORCH),
    ("Router", {"dtype": torch.int32}, TypeError, f": dtype {DTYPE} int32"),
    ("Router", {"dtype": "half"}, TypeError, f": dtype {DTYPE} str 'half'"),
    ("Router.forward", {"x": None}, TypeError, "Router: x must be a Tensor of shape [..., 6], got None"),
    ("Router.forward", {"x": ints(T, H)}, TypeError, f"Router: x {FLOAT} int32"),
    ("Router.forward", {"x": elsewhere(T, H)}, ValueError, f"Router: x {ON_CPU.format('weight')}"),
    ("Router.forward", {"stats": "yes"}, TypeError, f"route: stats {BOOL}"),
    ("Router.forward", {"segments": zeros(T)}, TypeError, f"route: segments {ID} float32"),
    ("Router.forward", {"num_segments": 0}, ValueError, f"route: num_segments {SIZE}"),
    ("Router.forward", {"token_ids": zeros(T)}, TypeError, f"Router: token_ids {ID} float32"),
    ("Router.update_bias", {"counts": None}, TypeError, ": counts must be a Tensor of shape [..., 4], got None"),
    ("Router.update_bias", {"counts": ints(3)}, ValueError, ": counts must be of shape [..., 4], got [3]"),
    ("Router.update_bias", {"counts": elsewhere(E)}, ValueError, f": counts {ON_CPU.format('selection_bias')}"),
    ("Router.update_bias", {"rate": "a"}, TypeError, ": rate must be a number, got str 'a'"),
    # Experts
    ("Experts", {"num_experts": 0}, ValueError, f": num_experts {SIZE}"),
    ("Experts", {"hidden": "a"}, TypeError, ": hidden must be an int, got str 'a'"),
    ("Experts", {"inner": 4.5}, TypeError, ": inner must be an int, got float 4.5"),
    ("Experts", {"activation": "swish"}, ValueError, f": activation {ACTIVATION} 'swish'"),
    ("Experts", {"gated": "yes"}, TypeError, f": gated {BOOL}"),
    ("Experts", {"bias": "yes"}, TypeError, f": bias {BOOL}"),
    ("Experts", {"layout": "mixed"}, ValueError, ": layout must be one of 'concatenated', 'interleaved', got 'mixed'"),
    ("Experts", {"alpha": "yes"}, TypeError, ": alpha must be a number, got str 'yes'"),
    ("Experts", {"limit": -1}, ValueError, ": limit must be greater than 0, got -1"),
    ("Experts", {"up_offset": NAN}, ValueError, ": up_offset must be a finite float64, got nan"),
    ("Experts", {"weight_on": "both"}, ValueError, ": weight_on must be one of 'output', 'input', got 'both'"),
    ("Experts", {"impl": "fast"}, ValueError, ": impl must be one of 'moe_ops', 'naive', got 'fast'"),
    ("Experts", {"device": "nowhere"}, RuntimeError, TORCH),
    ("Experts", {"dtype": torch.complex64}, TypeError, f": dtype {DTYPE} complex64"),
    *(
        (name, changed, error, f"moe_mlp: {text}")
        for name in ("Experts.forward", "Experts.forward, naive")
        for changed, error, text in [
            ({"x": zeros(T, 7)}, ValueError, "w_in must be of shape [experts, 2 * inner, hidden] with hidden = 7, got"),
            ({"x": half(T, H).long()}, TypeError, f"x {FLOAT} int64"),
            ({"weights": zeros(4, K)}, ValueError, "weights must be of shape [3, top_k] to fit x, got [4, 2]"),
            ({"experts": zeros(T, K)}, TypeError, f"experts {ID} float32"),
            ({"capacity": -1}, ValueError, "capacity must be at least 0, got -1"),
            ({"drop_policy": "random"}, ValueError, f"drop_policy {POLICY} 'random'"),
            ({"plan": [1]}, TypeError, "plan must be a Plan, got list"),
            ({"plan": a_plan(experts=3)}, ValueError, "plan.offsets must be of shape [experts + 1] = [5], got [4]"),
        ]
    ),
    # MoE
    ("MoE", {"hidden": "a"}, TypeError, ": hidden must be an int, got str 'a'"),
    ("MoE", {"inner": 0}, ValueError, f": inner {SIZE}"),
    ("MoE", {"num_experts": 2.0}, TypeError, ": num_experts must be an int, got float 2.0"),
    ("MoE", {"top_k": 5}, ValueError, "route: top_k must be between 1 and num_experts (4), got 5"),
    ("MoE", {"router": 3}, TypeError, ": router must be a Router, a mapping of its options or None, got int 3"),
    ("MoE", {"router": nn.Router(H, E, 1)}, ValueError, ": router must have hidden, num_experts, top_k (6, 4, 2), got"),
    ("MoE", {"router": {"score": 1}}, TypeError, f"route: score {SCORE} int 1"),
    ("MoE", {"shared_inner": -1}, ValueError, ": shared_inner must be at least 0, got -1"),
    ("MoE", {"shared_gate": "yes", "shared_inner": 3}, TypeError, f": shared_gate {BOOL}"),
    ("MoE", {"shared_gate": True}, ValueError, ": shared_gate needs a shared expert, got shared_inner=0"),
    ("MoE", {"latent": 0}, ValueError, f": latent {SIZE}"),
    ("MoE", {"zero_computation": 2}, TypeError, ": zero_computation must be a ZeroComputationExperts or None, got int"),
    ("MoE", {"capacity_factor": "a"}, TypeError, ": capacity_factor must be a number, got str 'a'"),
    ("MoE", {"capacity_factor": 0.0}, ValueError, ": capacity_factor must be greater than 0, got 0.0"),
    ("MoE", {"capacity_factor": INF}, ValueError, ": capacity_factor must be a finite float64, got inf"),
    ("MoE", {"drop_policy": "random"}, ValueError, f": drop_policy {POLICY} 'random'"),
    ("MoE", {"weight_on": "both"}, ValueError, "Experts: weight_on must be one of 'output', 'input', got 'both'"),
    ("MoE", {"mesh": 4}, TypeError, ': mesh must be a DeviceMesh with a dimension named "ep", got int 4'),
    ("MoE", {"device": "nowhere"}, RuntimeError, TORCH),
    ("MoE", {"dtype": torch.int64}, TypeError, f": dtype {DTYPE} int64"),
    ("MoE", {"options": 1}, TypeError, "Experts.__init__() got an unexpected keyword argument 'options'"),
    ("MoE.forward", {"x": ints(T, H)}, TypeError, f"MoE: x {FLOAT} int32"),
    ("MoE.forward", {"return_route": "yes"}, TypeError, f"MoE: return_route {BOOL}"),
    ("MoE.forward", {"segments": ints(E)}, ValueError, "route: segments must be of shape [tokens] = [3], got [4]"),
    ("MoE.forward", {"num_segments": "all"}, TypeError, "route: num_segments must be an int, got str 'all'"),
    ("MoE.forward", {"token_ids": ints(E)}, ValueError, "MoE: token_ids must be of shape [...] = [3], got [4]"),
]


def parameters(function):
    return set(inspect.signature(function.forward if isinstance(function, torch.nn.Module) else function).parameters)


@pytest.mark.parametrize("name", GOOD)
def test_every_argument_has_a_bad_input(name):
    function, arguments = GOOD[name]
    function(**arguments)
    assert {next(iter(changed)) for of, changed, *_ in BAD if of == name} == parameters(function)


@pytest.mark.parametrize(
    ("name", "changed", "error", "text"), BAD, ids=[f"{name}-{next(iter(changed))}" for name, changed, *_ in BAD]
)
def test_bad_input(name, changed, error, text):
    function, arguments = GOOD[name]
    with pytest.raises(error) as caught:
        function(**(arguments | changed))
    assert type(caught.value) is error
    expected = name + text if text.startswith(":") else text
    assert str(caught.value).startswith(expected), str(caught.value)


def test_update_bias_needs_a_bias():
    with pytest.raises(ValueError, match=r"Router\.update_bias: the router must be built with correction_bias=True"):
        router(correction_bias=False).update_bias(ints(E), 0.1)
