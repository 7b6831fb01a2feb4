"""moe_mlp's promises: what is kept for backward, the same bits every time, tokens that do not see each other."""

import pytest
import torch

import moe_ops
from accuracy import assert_bitwise_equal, compare, place
from calls import GPT_OSS, MLP, moe_mlp, random_tensors
from cases import DEVICE, DTYPES, INF, Case, crowded, distinct, randn, some_dropped

LARGE = Case("large", tokens=300, experts=7, top_k=3, hidden=200, inner=90, choose=crowded)


def kept_for_backward(case, dtype, device, names=MLP, weight_dtype=None, gated=True, **options):
    """(bytes kept besides the inputs, names of the inputs kept): each storage once."""
    tensors = random_tensors(case, dtype, gated, weight_dtype)
    leaves = {n: place(t, device).requires_grad_(n in names) for n, t in tensors.items()}
    inputs = {t.untyped_storage().data_ptr(): name for name, t in leaves.items()}
    kept, others = set(), {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() in inputs:
            kept.add(inputs[storage.data_ptr()])
        else:
            others[storage.data_ptr()] = storage.nbytes(), t  # held, so that no address is used twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = moe_mlp(case.ids(), gated=gated, **options)(moe_ops, **leaves)
        y.sum().backward()
    return sum(size for size, _ in others.values()), kept


def plan_bytes(case):
    return 4 * (case.experts + 1 + 2 * case.tokens * case.top_k + case.experts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("options", [{}, {"weight_on": "input"}, {"capacity": 50}], ids=["output", "input", "capacity"])
def test_memory_law(dtype, gated, options, device):
    """Kept: the pre-activation, the plan and what was given. No gathered x, no activation, no expert output."""
    extra, kept = kept_for_backward(LARGE, dtype, device, gated=gated, **options)
    rows, wide = LARGE.tokens * LARGE.top_k, LARGE.inner * (2 if gated else 1)
    assert extra <= rows * wide * dtype.itemsize + plan_bytes(LARGE)
    assert extra >= rows * wide * dtype.itemsize, "the hooks did not see the pre-activation"
    assert kept >= {"x", "w_in", "w_out"}


def test_memory_law_with_float32_weights(device):
    """No rounded copy of the weights is kept."""
    extra, _ = kept_for_backward(LARGE, torch.bfloat16, device, weight_dtype=torch.float32)
    assert extra <= LARGE.tokens * LARGE.top_k * 2 * LARGE.inner * 2 + plan_bytes(LARGE)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_kept_without_gradients(mode, device):
    tensors = {n: place(t, device).requires_grad_() for n, t in random_tensors(LARGE).items()}
    expected = moe_mlp(LARGE.ids(), **GPT_OSS)(moe_ops, **tensors)
    kept = []
    with mode(), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
        y = moe_mlp(LARGE.ids(), **GPT_OSS)(moe_ops, **tensors)
    assert_bitwise_equal(y, expected)
    assert not kept and not y.requires_grad


def test_inference_mode_of_the_whole_path(device):
    """Tensors made in inference mode go through every operator."""
    with torch.inference_mode():
        x, logits = place(randn(20, 16), device), place(randn(20, 5), device)
        w_in, w_out = place(randn(5, 24, 16), device), place(randn(5, 16, 12), device)
        weights, experts = moe_ops.route(logits, 2)
        rows, plan = moe_ops.dispatch(x, experts, 5)
        pre = moe_ops.grouped_gemm(rows, w_in, plan.offsets)
        inner = torch.nn.functional.silu(pre[:, :12]) * pre[:, 12:]
        y = moe_ops.combine(moe_ops.grouped_gemm(inner, w_out, plan.offsets), weights, plan)
        fused = moe_ops.moe_mlp(x, weights, experts, w_in, w_out)
    torch.testing.assert_close(fused, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_on", ["output", "input"])
def test_any_number_of_threads_and_run_to_run(dtype, weight_on, device, threads, instruction_set):
    gradients = {"result": randn(LARGE.tokens, LARGE.hidden, seed=9)}
    tensors, call = random_tensors(LARGE, dtype), moe_mlp(LARGE.ids(), weight_on=weight_on)
    first = compare(call, tensors, device, MLP, gradients=gradients)
    leaves = {n: place(t, device).requires_grad_() for n, t in tensors.items()}
    for count in (1, 2, 3, 3, 8):
        torch.set_num_threads(count)
        y = call(moe_ops, **leaves)
        grads = torch.autograd.grad(y, list(leaves.values()), place(gradients["result"].to(dtype), device))
        assert_bitwise_equal(y, first["result"], f"y with {count} threads")
        for name, grad in zip(leaves, grads, strict=True):
            assert_bitwise_equal(grad, first[f"grad {name}"], f"grad {name} with {count} threads")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("across", [False, True])
def test_a_token_does_not_depend_on_the_others(across, dtype, device, instruction_set, switches):
    """Alone, in a small batch, in another order: the same bits, in y and in the gradients of x and of its weights.

    Batch invariance is asked for up to 64 rows in all."""
    case = Case("", tokens=120, experts=5, top_k=2, hidden=130, inner=70, choose=distinct)
    tensors, ids, gradient = random_tensors(case, dtype), case.ids(), randn(120, 130, dtype=dtype, seed=9)
    if across:  # so that backward reads weights along its reduction
        tensors |= {n: tensors[n].mT.contiguous().mT for n in ("w_in", "w_out")}

    def run(tokens):
        part = tensors | {n: tensors[n][tokens] for n in ("x", "weights")}
        part = {n: place(t.clone(), device).requires_grad_() for n, t in part.items()}
        y = moe_mlp(ids[tokens])(moe_ops, **part)
        grads = torch.autograd.grad(y, [part["x"], part["weights"]], place(gradient[tokens], device))
        return y, *grads

    together = run(torch.arange(120))
    for tokens in ([0], [77], [5, 6, 7], list(range(33)), list(range(40, 105)), list(range(119, -1, -1))):
        moe_ops.set_batch_invariant(2 * len(tokens) <= 64)
        for name, mine, all_ in zip(("y", "grad x", "grad weights"), run(torch.tensor(tokens)), together, strict=True):
            assert_bitwise_equal(mine, all_[tokens], f"{name} of {len(tokens)} tokens")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["concatenated", "interleaved"])
@pytest.mark.parametrize("kind", ["along", "across", "packed"])
def test_few_tokens_of_a_wide_layer(kind, layout, dtype, device, instruction_set, switches):
    """As few tokens as the CPU has loops of their own for: gates and ups in several tiles, K in several pieces."""
    if kind == "packed" and DEVICE != "cpu":
        pytest.skip("PackedWeights are for the CPU")
    hidden, inner = 5500 if DEVICE == "cpu" else 300, 130
    w_in = place(randn(1, 2 * inner, hidden, dtype=dtype, scale=0.02), device)
    w_out = place(randn(1, hidden, inner, dtype=dtype, seed=1), device)
    x, weights = place(randn(30, hidden, dtype=dtype, seed=2), device), place(torch.ones(30, 1), device)
    ids = torch.zeros(30, 1, dtype=torch.int64)
    moe_ops.set_batch_invariant(True)
    together = moe_mlp(ids, layout=layout)(moe_ops, x, weights, w_in, w_out)
    if kind == "across":
        w_in = w_in.mT.contiguous().mT
    elif kind == "packed":
        w_in = moe_ops.prepack(w_in)
    for tokens in (1, 2, 4, 12, 13):
        few = moe_mlp(ids[:tokens], layout=layout)(moe_ops, x[:tokens], weights[:tokens], w_in, w_out)
        assert_bitwise_equal(few, together[:tokens], f"{tokens} tokens")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["concatenated", "interleaved"])
@pytest.mark.parametrize("tokens", [1, 3, 4, 6])
def test_few_tokens_are_accurate(tokens, layout, dtype, device, instruction_set):
    """Without batch invariance, dot products where rows are few enough: gates and ups in several tiles, K in blocks."""
    hidden, inner = 5800 if DEVICE == "cpu" else 300, 130
    tensors = {
        "x": randn(tokens, hidden, dtype=dtype),
        "weights": torch.ones(tokens, 1),
        "w_in": randn(1, 2 * inner, hidden, dtype=dtype, seed=1, scale=0.02),
        "w_out": randn(1, hidden, inner, dtype=dtype, seed=2),
    }
    compare(moe_mlp(torch.zeros(tokens, 1, dtype=torch.int64), layout=layout), tensors, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1, 3])
@pytest.mark.parametrize("packed", [False, True])
def test_an_infinite_route_weight(packed, hidden, dtype, device, instruction_set, switches):
    """It scales a row and nothing behind it: infinite for any number of tokens, not NaN."""
    if packed and DEVICE != "cpu":
        pytest.skip("PackedWeights are for the CPU")
    w_in, w_out = (place(torch.ones(1, *shape, dtype=dtype), device) for shape in ((32, hidden), (hidden, 32)))
    if packed:
        w_in, w_out = moe_ops.prepack(w_in), moe_ops.prepack(w_out)
    for tokens in (1, 13, 40):
        call = moe_mlp(torch.zeros(tokens, 1, dtype=torch.int64), weight_on="input", activation="relu", gated=False)
        x = place(torch.ones(tokens, hidden, dtype=dtype), device)
        y = call(moe_ops, x, place(torch.full((tokens, 1), INF), device), w_in, w_out)
        assert y.isposinf().all(), f"{tokens} tokens"


def test_gradients_accumulate_like_any_other(device):
    """Two passes through the same weights add up, and a weight used twice gets both."""
    case = Case("", tokens=20, choose=some_dropped)
    tensors = {n: place(t, device).requires_grad_() for n, t in random_tensors(case).items()}
    once = torch.autograd.grad(moe_mlp(case.ids())(moe_ops, **tensors).sum(), tensors["w_in"])[0]
    y = moe_mlp(case.ids())(moe_ops, **tensors) + moe_mlp(case.ids())(moe_ops, **tensors)
    assert_bitwise_equal(torch.autograd.grad(y.sum(), tensors["w_in"])[0], 2 * once)


@pytest.mark.parametrize(("tokens", "plan_kernels"), [(50, 1), (2100, 3)])
@pytest.mark.parametrize(("biased", "backward_kernels"), [(False, 6), (True, 8)])
def test_number_of_kernels(biased, backward_kernels, tokens, plan_kernels, device, launches):
    """Forward: the plan, two GEMMs, combine. Backward: two GEMMs, the sums of the score gradient, two weight gradients,
    combine, and two bias gradients."""
    case = Case("", tokens=tokens)
    tensors = {n: place(t, device).requires_grad_() for n, t in random_tensors(case).items()}
    if not biased:
        del tensors["b_in"], tensors["b_out"]
    before = launches()
    y = moe_mlp(case.ids())(moe_ops, **tensors)
    assert launches() - before == plan_kernels + 3
    before = launches()
    torch.autograd.grad(y.sum(), list(tensors.values()))
    assert launches() - before == backward_kernels
