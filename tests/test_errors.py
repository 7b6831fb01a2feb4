"""Bad input for every argument of every public function: the exception's type, and a text that names the operator,
the argument, what was expected and what came."""

import inspect
import re

import pytest
import torch

import moe_ops
from arguments import (
    ACTIVATION,
    COPIED,
    EXPERT_DTYPE,
    FLOAT,
    GOOD,
    ID,
    INNER,
    INT32,
    ON_CPU,
    POLICY,
    SCORE,
    E,
    H,
    K,
    T,
    a_plan,
    elsewhere,
    half,
    ints,
    zeros,
)
from cases import INF, NAN
from moe_ops import library

FUNCTIONS = ("route", "plan", "permute", "grouped_gemm", "combine", "dispatch", "moe_mlp")

# Function, changed arguments (the first is at fault), exception, text after the names of function and argument.
BAD = [
    # route
    ("route", {"logits": [[1.0]]}, TypeError, "must be a Tensor of shape [tokens, experts], got list"),
    ("route", {"logits": zeros(E)}, ValueError, "must be of shape [tokens, experts], got [4]"),
    ("route", {"logits": zeros(1, T, E)}, ValueError, "must be of shape [tokens, experts], got [1, 3, 4]"),
    ("route", {"logits": ints(T, E)}, TypeError, f"{FLOAT} int32"),
    ("route", {"logits": zeros(T, E).to_sparse()}, TypeError, "must be a dense Tensor, got one of layout sparse_coo"),
    (
        "route",
        {"logits": zeros(1, 1).expand(2**30, 4)},
        ValueError,
        "must name fewer than 2**31 slots, got 2147483648",
    ),
    ("route", {"top_k": 0}, ValueError, "must be between 1 and num_experts (4), got 0"),
    ("route", {"top_k": 5}, ValueError, "must be between 1 and num_experts (4), got 5"),
    ("route", {"top_k": 2.0}, TypeError, "must be an int, got float 2.0"),
    ("route", {"top_k": True}, TypeError, "must be an int, got bool True"),
    ("route", {"score": "tanh"}, ValueError, f"{SCORE} 'tanh'"),
    ("route", {"score": None}, TypeError, f"{SCORE} None"),
    ("route", {"selection_bias": 1.0}, TypeError, "must be a Tensor of shape [experts], got float 1.0"),
    ("route", {"selection_bias": zeros(T)}, ValueError, "must be of shape [experts] = [4], got [3]"),
    ("route", {"selection_bias": ints(E)}, TypeError, f"{FLOAT} int32"),
    ("route", {"selection_bias": elsewhere(E)}, ValueError, ON_CPU.format("logits")),
    ("route", {"groups": 2}, TypeError, "must be None or a pair (num_groups, top_groups), got 2"),
    ("route", {"groups": (2, 1.0)}, TypeError, "must be an int, got float 1.0"),
    ("route", {"groups": (3, 1)}, ValueError, "must split num_experts (4) evenly, got 3 groups"),
    ("route", {"groups": (0, 1)}, ValueError, "must split num_experts (4) evenly, got 0 groups"),
    ("route", {"groups": (2, 3)}, ValueError, "must keep between 1 and 2 groups, got 3"),
    ("route", {"groups": (1, 2)}, ValueError, "must keep between 1 and 1 groups, got 2"),
    ("route", {"groups": (2, 1), "top_k": 3}, ValueError, "must keep at least top_k (3) experts, got 2"),
    ("route", {"group_score": "sum"}, ValueError, "must be one of 'max', 'top2_sum', got 'sum'"),
    ("route", {"group_mask": "inf"}, ValueError, "must be one of '-inf', 'zero', got 'inf'"),
    ("route", {"renormalize": "l2"}, ValueError, "must be one of False, True, 'clamp', 'pnorm', got 'l2'"),
    ("route", {"renormalize": 1}, TypeError, "must be one of False, True, 'clamp', 'pnorm', got int 1"),
    ("route", {"eps": "small"}, TypeError, "must be a number, got str 'small'"),
    ("route", {"eps": NAN}, ValueError, "must be a finite float32, got nan"),
    ("route", {"eps": INF}, ValueError, "must be a finite float32, got inf"),
    ("route", {"p": 0.0}, ValueError, "must be greater than 0, got 0.0"),
    ("route", {"p": INF, "renormalize": "pnorm"}, ValueError, "must be a finite float64, got inf"),
    ("route", {"scale": None}, TypeError, "must be a number, got None"),
    ("route", {"scale": 10**400}, ValueError, "must be a finite float32, got 100000000... (401 characters)"),
    ("route", {"expert_scale": zeros(E, 1)}, ValueError, "must be of shape [experts], got [4, 1]"),
    ("route", {"expert_scale": ints(E)}, TypeError, f"{FLOAT} int32"),
    ("route", {"softcap": 0}, ValueError, "must be greater than 0, got 0"),
    ("route", {"softcap": -1.0}, ValueError, "must be greater than 0, got -1.0"),
    ("route", {"softcap": 1e-60}, ValueError, "must be greater than 0 in float32, got 1e-60"),
    ("route", {"softcap": 1e60}, ValueError, "must be a finite float32, got 1e+60"),
    ("route", {"softcap": INF, "logits": zeros(T, E).double()}, ValueError, "must be a finite float64, got inf"),
    ("route", {"stats": 1}, TypeError, "must be True or False, got int 1"),
    ("route", {"segments": zeros(T)}, TypeError, f"{ID} float32"),
    ("route", {"segments": ints(E)}, ValueError, "must be of shape [tokens] = [3], got [4]"),
    ("route", {"segments": elsewhere(T, dtype=torch.int32)}, ValueError, ON_CPU.format("logits")),
    ("route", {"num_segments": 0}, ValueError, "must be at least 1, got 0"),
    ("route", {"num_segments": 2**31, "stats": True}, ValueError, "must be at most 2147483647, got 2147483648"),
    ("route", {"num_segments": "all"}, TypeError, "must be an int, got str 'all'"),
    # plan
    ("plan", {"experts": None}, TypeError, "must be a Tensor of shape [tokens, top_k], got None"),
    ("plan", {"experts": ints(T)}, ValueError, "must be of shape [tokens, top_k], got [3]"),
    ("plan", {"experts": zeros(T, K)}, TypeError, f"{ID} float32"),
    ("plan", {"experts": ints(T, K, dtype=torch.int16)}, TypeError, f"{ID} int16"),
    (
        "plan",
        {"experts": ints(1, 1).expand(2**16, 2**15)},
        ValueError,
        "must name fewer than 2**31 slots, got 2147483648",
    ),
    ("plan", {"experts": ints(T, K).to_sparse()}, TypeError, "must be a dense Tensor, got one of layout sparse_coo"),
    ("plan", {"num_experts": 0}, ValueError, "must be at least 1, got 0"),
    ("plan", {"num_experts": 2**31}, ValueError, "must be at most 2147483646, got 2147483648"),
    ("plan", {"num_experts": 4.0}, TypeError, "must be an int, got float 4.0"),
    ("plan", {"capacity": -1}, ValueError, "must be at least 0, got -1"),
    (
        "plan",
        {"capacity": 10**30},
        ValueError,
        "must be at most 9223372036854775807, got 1000000000000000000000000000000",
    ),
    ("plan", {"capacity": 1.25}, TypeError, "must be an int, got float 1.25"),
    ("plan", {"drop_policy": "random"}, ValueError, f"{POLICY} 'random'"),
    (
        "plan",
        {"weights": None, "drop_policy": "probability"},
        ValueError,
        "must be given with drop_policy 'probability'",
    ),
    ("plan", {"weights": ints(T, K)}, TypeError, f"{FLOAT} int32"),
    ("plan", {"weights": zeros(T, 1)}, ValueError, "must be of shape [tokens, top_k] = [3, 2], got [3, 1]"),
    ("plan", {"weights": elsewhere(T, K)}, ValueError, ON_CPU.format("experts")),
    # permute
    ("permute", {"x": "rows"}, TypeError, "must be a Tensor of shape [tokens, hidden], got str 'rows'"),
    ("permute", {"x": zeros(1, T, H)}, ValueError, "must be of shape [tokens, hidden], got [1, 3, 6]"),
    ("permute", {"x": zeros(T, H).to(torch.float8_e8m0fnu)}, TypeError, f"{COPIED} float8_e8m0fnu"),
    ("permute", {"x": zeros(T, H).bool().byte().view(torch.float4_e2m1fn_x2)}, TypeError, f"{COPIED} float4_e2m1fn_x2"),
    (
        "permute",
        {"x": zeros(T, H, dtype=torch.complex64).requires_grad_()},
        TypeError,
        f", which requires a gradient, {FLOAT} complex64",
    ),
    ("permute", {"plan": (1, 2)}, TypeError, "must be a Plan, got tuple"),
    ("permute", {"plan": a_plan(tokens=4)}, ValueError, "must be of as many tokens as x has (3), got slot_row [4, 2]"),
    ("permute", {"plan": a_plan(row_slot=ints(6, dtype=torch.int64))}, TypeError, f".row_slot {INT32}"),
    ("permute", {"plan": a_plan(slot_row=ints(6))}, ValueError, ".slot_row must be of shape [tokens, top_k], got [6]"),
    (
        "permute",
        {"plan": a_plan(row_slot=elsewhere(6, dtype=torch.int32))},
        ValueError,
        ".row_slot " + ON_CPU.format("x"),
    ),
    # grouped_gemm
    ("grouped_gemm", {"a": 3}, TypeError, "must be a Tensor of shape [rows, k], got int 3"),
    ("grouped_gemm", {"a": zeros(H)}, ValueError, "must be of shape [rows, k], got [6]"),
    ("grouped_gemm", {"a": ints(T, H)}, TypeError, f"{FLOAT} int32"),
    ("grouped_gemm", {"w": zeros(INNER, H)}, ValueError, "must be of shape [experts, n, k], got [5, 6]"),
    ("grouped_gemm", {"w": zeros(E, H, INNER)}, ValueError, "must be of shape [experts, n, 6] to fit a, got [4, 6, 5]"),
    ("grouped_gemm", {"w": half(E, INNER, H)}, TypeError, EXPERT_DTYPE.format("a", "bfloat16")),
    ("grouped_gemm", {"w": zeros(E, INNER, H, dtype=torch.float64)}, TypeError, EXPERT_DTYPE.format("a", "float64")),
    (
        "grouped_gemm",
        {"w": zeros(E, INNER, H, dtype=torch.float16), "a": half(T * K, H)},
        TypeError,
        "must have the dtype of a (bfloat16) or float32, got float16",
    ),
    (
        "grouped_gemm",
        {"w": zeros(E, INNER, H), "a": zeros(T * K, H, dtype=torch.float64)},
        TypeError,
        "must have the dtype of a (float64), got float32",
    ),
    ("grouped_gemm", {"w": elsewhere(E, INNER, H)}, ValueError, ON_CPU.format("a")),
    ("grouped_gemm", {"offsets": [0, 1]}, TypeError, "must be a Tensor of shape [experts + 1], got list"),
    ("grouped_gemm", {"offsets": ints(E)}, ValueError, "must be of shape [experts + 1] = [5], got [4]"),
    ("grouped_gemm", {"offsets": ints(E + 1, dtype=torch.int64)}, TypeError, INT32),
    ("grouped_gemm", {"offsets": elsewhere(E + 1, dtype=torch.int32)}, ValueError, ON_CPU.format("a")),
    ("grouped_gemm", {"bias": zeros(INNER)}, ValueError, "must be of shape [experts, n], got [5]"),
    ("grouped_gemm", {"bias": zeros(E, H)}, ValueError, "must be of shape [experts, n] = [4, 5], got [4, 6]"),
    ("grouped_gemm", {"bias": half(E, INNER)}, TypeError, EXPERT_DTYPE.format("a", "bfloat16")),
    ("grouped_gemm", {"gather": True}, TypeError, "must be a Plan, got bool True"),
    ("grouped_gemm", {"gather": a_plan()}, ValueError, "must be of as many tokens as a has (6), got slot_row [3, 2]"),
    # combine
    ("combine", {"rows": None}, TypeError, "must be a Tensor of shape [rows, hidden], got None"),
    ("combine", {"rows": zeros(H)}, ValueError, "must be of shape [rows, hidden], got [6]"),
    ("combine", {"rows": ints(T * K, H)}, TypeError, f"{FLOAT} int32"),
    ("combine", {"weights": zeros(T)}, ValueError, "must be of shape [tokens, top_k], got [3]"),
    ("combine", {"weights": zeros(T, 1)}, ValueError, "must be of shape [tokens, top_k] = [3, 2], got [3, 1]"),
    ("combine", {"weights": ints(T, K)}, TypeError, f"{FLOAT} int32"),
    ("combine", {"weights": elsewhere(T, K)}, ValueError, ON_CPU.format("rows")),
    ("combine", {"plan": None}, TypeError, "must be a Plan, got None"),
    ("combine", {"plan": a_plan(tokens=4)}, ValueError, "must be of as many rows as rows has (6), got row_slot [8]"),
    ("combine", {"plan": a_plan(slot_row=ints(T, K).long())}, TypeError, f".slot_row {INT32}"),
    # moe_mlp
    ("moe_mlp", {"x": zeros(H)}, ValueError, "must be of shape [tokens, hidden], got [6]"),
    ("moe_mlp", {"x": ints(T, H)}, TypeError, f"{FLOAT} int32"),
    ("moe_mlp", {"weights": None}, TypeError, "must be a Tensor of shape [tokens, top_k], got None"),
    ("moe_mlp", {"weights": zeros(4, K)}, ValueError, "must be of shape [3, top_k] to fit x, got [4, 2]"),
    ("moe_mlp", {"weights": ints(T, K)}, TypeError, f"{FLOAT} int32"),
    ("moe_mlp", {"experts": None}, ValueError, "must be given where plan is None, got None"),
    ("moe_mlp", {"experts": zeros(T, K)}, TypeError, f"{ID} float32"),
    ("moe_mlp", {"experts": ints(T, 1)}, ValueError, "must be of shape [tokens, top_k] = [3, 2], got [3, 1]"),
    ("moe_mlp", {"experts": elsewhere(T, K, dtype=torch.int32)}, ValueError, ON_CPU.format("x")),
    (
        "moe_mlp",
        {"w_in": zeros(E, INNER, H)},
        ValueError,
        "must be of shape [experts, 2 * inner, hidden] (gated), got [4, 5, 6]",
    ),
    (
        "moe_mlp",
        {"w_in": zeros(E, 10, INNER)},
        ValueError,
        "must be of shape [experts, 2 * inner, hidden] with hidden = 6, got",
    ),
    ("moe_mlp", {"w_in": half(E, 2 * INNER, H)}, TypeError, EXPERT_DTYPE.format("x", "bfloat16")),
    (
        "moe_mlp",
        {"w_in": zeros(0, 2 * INNER, H), "w_out": zeros(0, H, INNER)},
        ValueError,
        "must hold at least 1 expert, got [0, 10, 6]",
    ),
    (
        "moe_mlp",
        {"w_out": zeros(E, INNER, H)},
        ValueError,
        "must be of shape [experts, hidden, inner] = [4, 6, 5], got [4, 5, 6]",
    ),
    ("moe_mlp", {"w_out": half(E, H, INNER)}, TypeError, EXPERT_DTYPE.format("x", "bfloat16")),
    ("moe_mlp", {"activation": "swiglu"}, ValueError, f"{ACTIVATION} 'swiglu'"),
    ("moe_mlp", {"activation": torch.relu}, TypeError, f"{ACTIVATION} builtin_function_or_method"),
    ("moe_mlp", {"gated": "yes"}, TypeError, "must be True or False, got str 'yes'"),
    ("moe_mlp", {"b_in": zeros(E, INNER)}, ValueError, "must be of shape [experts, 2 * inner] = [4, 10], got [4, 5]"),
    ("moe_mlp", {"b_in": half(E, 2 * INNER)}, TypeError, EXPERT_DTYPE.format("x", "bfloat16")),
    ("moe_mlp", {"b_out": zeros(H)}, ValueError, "must be of shape [experts, hidden], got [6]"),
    ("moe_mlp", {"b_out": elsewhere(E, H)}, ValueError, ON_CPU.format("x")),
    ("moe_mlp", {"layout": "rows"}, ValueError, "must be one of 'concatenated', 'interleaved', got 'rows'"),
    ("moe_mlp", {"alpha": "1"}, TypeError, "must be a number, got str '1'"),
    ("moe_mlp", {"limit": 0.0}, ValueError, "must be greater than 0, got 0.0"),
    ("moe_mlp", {"limit": INF}, ValueError, "must be a finite float32, got inf"),
    ("moe_mlp", {"up_offset": NAN}, ValueError, "must be a finite float32, got nan"),
    ("moe_mlp", {"weight_on": "both"}, ValueError, "must be one of 'output', 'input', got 'both'"),
    ("moe_mlp", {"capacity": -2}, ValueError, "must be at least 0, got -2"),
    ("moe_mlp", {"capacity": 3, "plan": a_plan()}, ValueError, "must be None where a plan is given, got 3"),
    ("moe_mlp", {"drop_policy": "last"}, ValueError, f"{POLICY} 'last'"),
    ("moe_mlp", {"plan": [1]}, TypeError, "must be a Plan, got list"),
    ("moe_mlp", {"plan": a_plan(experts=3)}, ValueError, ".offsets must be of shape [experts + 1] = [5], got [4]"),
    (
        "moe_mlp",
        {"plan": a_plan(tokens=2)},
        ValueError,
        ".slot_row must be of shape [tokens, top_k] = [3, 2], got [2, 2]",
    ),
    # dispatch
    ("dispatch", {"x": None}, TypeError, "must be a Tensor of shape [tokens, hidden], got None"),
    ("dispatch", {"experts": ints(4, K)}, ValueError, "must be of as many tokens as x has (3), got [4, 2]"),
    ("dispatch", {"experts": zeros(T, K)}, TypeError, f"{ID} float32"),
    ("dispatch", {"experts": elsewhere(T, K, dtype=torch.int32)}, ValueError, ON_CPU.format("x")),
    ("dispatch", {"num_experts": 0}, ValueError, "must be at least 1, got 0"),
    ("dispatch", {"capacity": -1}, ValueError, "must be at least 0, got -1"),
    ("dispatch", {"drop_policy": "random"}, ValueError, f"{POLICY} 'random'"),
    ("dispatch", {"weights": zeros(T, 1)}, ValueError, "must be of shape [tokens, top_k] = [3, 2], got [3, 1]"),
    ("dispatch", {"mode": "bounded"}, ValueError, "must be 'exact' where group is None, got 'bounded'"),
    ("dispatch", {"name": "layer 3"}, ValueError, "must be None where group is None, got 'layer 3'"),
    ("dispatch", {"group": "nccl"}, TypeError, "must be a ProcessGroup or a DeviceMesh, got str 'nccl'"),
    ("dispatch", {"mode": "loose"}, ValueError, "must be one of 'exact', 'bounded', got 'loose'"),
    ("dispatch", {"rows_per_peer": 3}, ValueError, "must be None where mode is 'exact', got 3"),
    ("dispatch", {"name": 7}, TypeError, "must be a str or None, got int 7"),
]


def test_the_calls_that_are_spoilt_are_good():
    for name in FUNCTIONS:
        getattr(moe_ops, name)(**GOOD[name])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_has_a_bad_input(name):
    spoilt = {next(iter(changed)) for function, changed, *_ in BAD if function == name}
    assert spoilt == set(inspect.signature(getattr(moe_ops, name)).parameters)


def assert_refused(name, changed, error, text):
    argument = next(iter(changed))
    with pytest.raises(error) as caught:
        getattr(moe_ops, name)(**(GOOD[name] | changed))
    assert type(caught.value) is error
    between = "" if text.startswith((".", ",")) else " "
    assert str(caught.value).startswith(f"{name}: {argument}{between}{text}"), str(caught.value)


@pytest.mark.parametrize(
    ("name", "changed", "error", "text"), BAD, ids=[f"{name}-{next(iter(changed))}" for name, changed, *_ in BAD]
)
def test_bad_input(name, changed, error, text):
    assert_refused(name, changed, error, text)


@pytest.mark.parametrize("bad", [bad for bad in BAD if bad[0] == "moe_mlp"], ids=lambda bad: next(iter(bad[1])))
def test_bad_input_of_inference(bad):
    """moe_mlp_inference refuses first; the error is the same."""
    with torch.no_grad():
        assert_refused(*bad)


def test_operators_called_directly_check_shapes_when_traced():
    """Fakes share the wrappers' checks."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        plan = a_plan(tokens=4)
        with pytest.raises(ValueError, match="permute: plan must be of as many tokens as x has"):
            torch.ops.moe_ops.permute(zeros(T, H), plan.row_slot, plan.slot_row)


def test_operators_called_directly_guard_memory():
    plan = a_plan(tokens=4)
    with pytest.raises(RuntimeError, match="slot_row has the wrong shape"):
        torch.ops.moe_ops.permute(zeros(T, H), plan.row_slot, plan.slot_row)


@pytest.mark.parametrize("version", ("2.9.1", "1.13.0", "2.9.0+cu128"))
def test_old_torch_is_refused(version):
    with pytest.raises(ImportError, match=rf"moe_ops needs torch 2.10 or newer, found torch {re.escape(version)}"):
        library.require_torch(version)


@pytest.mark.parametrize("version", ("2.10.0", "2.13.0+cpu", "2.14.1", "3.0.0a0+git1234"))
def test_new_torch_is_accepted(version):
    library.require_torch(version)


def test_missing_libraries_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "directory", lambda: tmp_path)
    with pytest.raises(ImportError, match=rf"{' and '.join(library.LIBRARIES)} not found in .*pip install \."):
        library.load()


def test_unloadable_library_is_named(monkeypatch, tmp_path):
    for name in library.LIBRARIES:
        (tmp_path / name).write_text("no library")
    monkeypatch.setattr(library, "directory", lambda: tmp_path)
    with pytest.raises(ImportError, match=rf"libmoe_ops.so does not load under torch {re.escape(torch.__version__)}"):
        library.load()


@pytest.mark.parametrize("shape", [(4, 16), (2, 3, 4), (4, 7), ()])
@pytest.mark.parametrize("name", ["MoE", "Router"])
def test_tokens_of_another_size_are_refused(name, shape):
    """A multiple of hidden too, which a reshape would take for more tokens."""
    module = moe_ops.nn.MoE(8, 4, 4, 2) if name == "MoE" else moe_ops.nn.Router(8, 4, 2)
    with pytest.raises(ValueError, match=rf"{name}: x must be of shape \[\.\.\., 8\], got"):
        module(torch.randn(shape))


@pytest.mark.parametrize("name", ["route", "permute", "grouped_gemm", "combine", "moe_mlp"])
def test_forward_mode_is_refused(name):
    """torch passes custom operators by, and would return zeros."""
    argument = next(iter(GOOD[name]))
    value = torch.randn(GOOD[name][argument].shape)

    def call(value):
        result = getattr(moe_ops, name)(**(GOOD[name] | {argument: value}))
        return result[0] if name == "route" else result

    for run in (torch.func.jacfwd(call), lambda value: torch.func.jvp(call, (value,), (value,))):
        with pytest.raises(RuntimeError, match=f"{name}: forward-mode differentiation .* is not supported"):
            run(value)
