"""grouped_gemm: every expert's rows times its weight; gradients of rows, weights and biases."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_ops
from accuracy import assert_as_accurate, assert_bitwise_equal, compare, place, run
from calls import GEMM, gathered, product
from cases import (
    DEVICE,
    DTYPES,
    LOW,
    NAN,
    constant,
    crowded,
    every_case,
    every_dtype,
    every_layout,
    input_layouts,
    integers,
    layouts,
    offsets_of,
    on_cpu,
    randn,
    same_rows,
    some_dropped,
    stored_weights,
)
from moe_ops import reference


@every_case
@every_dtype
@pytest.mark.parametrize("gather", [False, True])
def test_values_and_gradients(case, dtype, gather, device, instruction_set):
    ids = case.ids()
    rows = case.tokens if gather else ids.numel()
    tensors = {
        "a": integers(rows, case.hidden, dtype=dtype, limit=1),
        "w": integers(case.experts, case.inner, case.hidden, dtype=dtype, seed=1, limit=1),
        "bias": integers(case.experts, case.inner, dtype=dtype, seed=2),
    }
    call = gathered(ids, case.experts) if gather else product(reference.plan(ids, case.experts).offsets)
    compare(call, tensors, device, GEMM, exact=True)


# Row counts, N and K beside the sizes of tiles and vectors.
SHAPES = [
    ([5, 0, 64, 1, 13], 37, 41),
    ([63, 65, 2], 64, 64),
    ([16, 15, 17, 31, 33], 96, 100),
    ([300], 130, 260),
    ([9, 7], 32, 4096),
    ([50, 7], 4096, 32),
    ([5000], 16, 24),
]


@every_dtype
@pytest.mark.parametrize("counts, n, k", SHAPES)
def test_accuracy(dtype, counts, n, k, device, instruction_set):
    offsets = offsets_of(counts)
    tensors = {
        "a": randn(sum(counts) + 3, k, dtype=dtype),
        "w": randn(len(counts), n, k, dtype=dtype, seed=1, scale=k**-0.5),
        "bias": randn(len(counts), n, dtype=dtype, seed=2),
    }
    gradients = {"result": randn(sum(counts) + 3, n, seed=3)}
    compare(product(offsets), tensors, device, GEMM, gradients=gradients)


@every_dtype
@pytest.mark.parametrize("n, k", [(1, 90), (2, 90), (90, 1), (90, 2), (1, 1)])
def test_thin_shapes(dtype, n, k, device, instruction_set):
    """Nearly matrix times vector."""
    a, w = integers(60, k, dtype=dtype, limit=1), integers(7, n, k, dtype=dtype, seed=1, limit=1)
    tensors = {"a": a, "w": w, "bias": integers(7, n, dtype=dtype, seed=2)}
    compare(product(offsets_of([3, 4, 7, 8, 9, 12, 14])), tensors, device, GEMM, exact=True)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("gather", [False, True])
def test_float32_weights_under_low_tokens(dtype, gather, device, instruction_set, switches):
    """Weights are rounded to the dtype of a; their gradient is float32, and is not rounded."""
    moe_ops.set_batch_invariant(DEVICE == "cpu")  # where fewer rows are dot products of float32 weights
    ids = some_dropped(30, 5, 2)
    tensors = {
        "a": randn(30 if gather else 60, 40, dtype=dtype),
        "w": randn(5, 24, 40, seed=1),
        "bias": randn(5, 24, seed=2),
    }
    call = gathered(ids, 5) if gather else product(reference.plan(ids, 5).offsets)
    gradients = {"result": randn(60, 24, seed=3)}
    out = compare(call, tensors, device, GEMM, gradients=gradients)
    assert out["grad w"].dtype == torch.float32 and out["grad bias"].dtype == torch.float32
    rounded = compare(call, tensors, device)["result"]
    again = compare(call, tensors | {"w": tensors["w"].to(dtype)}, device)["result"]
    assert_bitwise_equal(rounded, again, "weights rounded to the dtype of a")
    grad = out["grad w"]
    assert (grad != grad.to(dtype)).float().mean() > 0.5, "the gradient kept only the bits of a low dtype"


@every_layout
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gather", [False, True])
def test_layouts(layout, dtype, gather, device, instruction_set):
    ids = some_dropped(12, 5, 2)
    tensors = {
        "a": integers(12 if gather else 24, 10, dtype=dtype, limit=1),
        "w": integers(5, 7, 10, dtype=dtype, seed=1, limit=1),
        "bias": integers(5, 7, dtype=dtype, seed=2),
    }
    call = gathered(ids, 5) if gather else product(reference.plan(ids, 5).offsets)
    plain = compare(call, tensors, device, GEMM, exact=True)
    moved = {name: layout(t) for name, t in tensors.items()}
    ours = compare(call, moved, device, GEMM, exact=True, grad_layout=layout)
    for name in plain:
        assert_bitwise_equal(ours[name], plain[name], name)


@pytest.mark.parametrize("expand", [same_rows, constant])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_expanded_inputs_and_gradient(expand, dtype, device, instruction_set):
    """Stride 0, as broadcasting and sum().backward() make it."""
    tensors = {
        "a": expand(integers(20, 10, dtype=dtype)),
        "w": expand(integers(3, 7, 10, dtype=dtype, seed=1)),
        "bias": expand(integers(3, 7, dtype=dtype, seed=2)),
    }
    gradients = {"result": expand(integers(20, 7, seed=3).double())}
    call = product(offsets_of([4, 0, 11]))
    compare(call, tensors, device, GEMM, exact=True, gradients=gradients, grad_layout=expand)


@pytest.mark.parametrize("needs", [("a",), ("w",), ("bias",), ("a", "w"), ("a", "bias"), ("w", "bias")])
def test_each_subset_of_gradients(needs, device, instruction_set):
    tensors = {"a": integers(20, 10), "w": integers(3, 7, 10, seed=1), "bias": integers(3, 7, seed=2)}
    compare(product(offsets_of([4, 0, 11])), tensors, device, needs, exact=True)


@pytest.mark.parametrize(
    "offsets",
    [
        [3, 5, 9, 20],
        [0, -4, 9, 20],
        [0, 9, 5, 20],
        [0, 30, 4, 12],
        [-7, -3, -2, -1],
        [0, 5, 5, 2**31 - 1],
        [7, 7, 7, 7],
    ],
)
def test_wrong_offsets_stay_in_their_buffers(offsets, device, instruction_set):
    """Read from 0, clamped to 0..R and non-decreasing, whatever they say."""
    tensors = {"a": integers(20, 10), "w": integers(3, 7, 10, seed=1), "bias": integers(3, 7, seed=2)}
    compare(product(torch.tensor(offsets, dtype=torch.int32)), tensors, device, GEMM, exact=True)


def test_no_experts_no_rows_no_columns(device, instruction_set):
    for rows, experts, n, k in [(4, 0, 3, 5), (0, 3, 3, 5), (4, 2, 0, 5), (4, 2, 3, 0), (0, 0, 0, 0)]:
        tensors = {"a": integers(rows, k), "w": integers(experts, n, k)}
        needs = ("a", "w") if experts else ()
        compare(product(offsets_of([rows // 2] * experts)), tensors, device, needs, exact=True)


def test_rows_beyond_int32(device, pytestconfig):
    """Offsets end at 2^31 - 1; the walk over tiles counts rows as they do, and says so."""
    a = torch.zeros(1, 1, device=device).expand(2**31, 1)
    w, offsets = torch.zeros(1, 0, 1, device=device), torch.zeros(2, dtype=torch.int32, device=device)
    if pytestconfig.getoption("--device") == "cpu":
        assert moe_ops.grouped_gemm(a, w, offsets).shape == (2**31, 0)
        return
    with pytest.raises((RuntimeError, ValueError), match=r"fewer than 2\^31 rows, got 2147483648"):
        moe_ops.grouped_gemm(a, w, offsets)


def test_nan_stays_where_it_belongs(device, instruction_set):
    """A row's NaN reaches that row and its expert's weight gradient; rows behind the last expert reach nothing."""
    counts = [20, 0, 15]
    a, w = randn(40, 33), randn(3, 18, 33, seed=1)
    eager = reference.grouped_gemm(a, w, offsets_of(counts))
    clean = reference.grouped_gemm(a.double(), w.double(), offsets_of(counts))
    a[7, 5] = NAN
    a[35:] = NAN
    w[1] = NAN  # an expert without rows
    a_, w_ = place(a, device).requires_grad_(), place(w, device).requires_grad_()
    out = moe_ops.grouped_gemm(a_, w_, place(offsets_of(counts), device))
    assert out[7].isnan().all() and out[35:].count_nonzero() == 0
    others = [r for r in range(40) if r != 7]
    assert_as_accurate(out[others], eager[others], clean[others])
    gradient = torch.ones_like(out)
    gradient[35:] = NAN
    out.backward(gradient)
    assert a_.grad.isfinite().all() and a_.grad[35:].count_nonzero() == 0
    assert w_.grad[1].count_nonzero() == 0 and w_.grad[2].isfinite().all()
    assert w_.grad[0].isnan().sum() == 18 and w_.grad[0][:, 5].isnan().all()


BEHIND = [(64, 31), (64, 33), (200, 63), (64, 351), (200, 351), *([(40, 5123)] if DEVICE == "cpu" else [])]


@pytest.mark.parametrize("n, k", BEHIND)
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_lies_behind_rows_and_weights_is_not_multiplied(n, k, across, dtype, device, instruction_set):
    whole = integers(2, n, k + 1, dtype=dtype, limit=1)
    whole[:, :, k] = NAN
    if across:
        whole = whole.transpose(1, 2).contiguous().transpose(1, 2)
    weights = [whole] if dtype == torch.float64 else [whole, whole.float()]
    for w, count in itertools.product(weights, (1, 2, 4, 5, 6, 9, 10, 11, 12, 13, 40, 100, 200)):
        a = integers(2 * count, k + 1, dtype=dtype, seed=1, limit=1)
        a[:, k] = NAN
        exact = torch.cat([x @ e.T for x, e in zip(a[:, :k].double().split(count), w[..., :k].double(), strict=True)])
        rows, offsets = place(a, device)[:, :k], place(offsets_of([count] * 2), device)
        ours = moe_ops.grouped_gemm(rows, place(w, device)[:, :, :k], offsets)
        assert_bitwise_equal(ours, exact.to(dtype), f"{count} rows")


def weight_gradient(device, counts, n, k, dtype, out):
    """Ours, added to, and exact: sums of integers."""
    grad, a = integers(sum(counts), n, dtype=dtype, limit=1), integers(sum(counts), k, dtype=dtype, seed=1, limit=1)
    parts = zip(grad.double().split(counts), a.double().split(counts), strict=True)
    exact = torch.stack([left.T @ right for left, right in parts])
    grad, a, offsets = place(grad, device), place(a, device), place(offsets_of(counts), device)
    ours = torch.ops.moe_ops.grouped_gemm_weight_grad(grad, a, offsets, None, 1, out, False)
    if out != torch.float32:
        return ours, None, exact.to(out)
    added = torch.ones_like(ours)
    torch.ops.moe_ops.grouped_gemm_weight_grad_(added, grad, a, offsets, None, 1, False)
    return ours, added, exact.to(out)


OUTPUTS = [*((dtype, dtype) for dtype in DTYPES), *((dtype, torch.float32) for dtype in LOW)]


@pytest.mark.parametrize("dtype, out", OUTPUTS)
@pytest.mark.parametrize("n, k", [(200, 330), (7, 64), (193, 257)])
def test_weight_gradients_of_any_number_of_rows(n, k, dtype, out, device, instruction_set):
    ours, added, exact = weight_gradient(device, [13, 95, 0, 96, 97, 700, 1], n, k, dtype, out)
    assert_bitwise_equal(ours, exact)
    if added is not None:
        assert_bitwise_equal(added, exact + 1, "added to ones")


@on_cpu
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16])
def test_weight_gradients_below_the_smallest_normal_number(out, instruction_set):
    """Beside zeros and normal numbers."""
    grad = integers(400, 200, dtype=torch.float32, limit=1) * 2.0**-70
    a = integers(400, 330, dtype=torch.float32, seed=1, limit=1) * torch.where(torch.arange(330) % 90 < 50, 1, 2.0**-63)
    ours = torch.ops.moe_ops.grouped_gemm_weight_grad(grad, a, offsets_of([400]), None, 1, out, False)
    assert_bitwise_equal(ours[0], (grad.double().T @ a.double()).to(out))


@pytest.mark.skipif(DEVICE != "cpu", reason="large, for what the CPU does with large outputs")
@pytest.mark.parametrize("dtype, out", [*OUTPUTS, (torch.float32, torch.float64)])
@pytest.mark.parametrize("k", [1056, 72])
def test_large_weight_gradients(k, dtype, out, device, instruction_set):
    """More than is kept in a cache, in whole lines or not, each element in its place."""
    n = 8_000_000 // (3 * k) + 5
    ours, _, exact = weight_gradient(device, [30, 0, 170], n, k, dtype, out)
    assert ours.nbytes > 8 << 20
    assert_bitwise_equal(ours, exact)


@pytest.mark.parametrize("k", [200, 9001])
@pytest.mark.parametrize("across", [False, True])
@every_dtype
def test_a_row_does_not_depend_on_the_others(dtype, across, k, device, instruction_set, switches):
    """The same bits whether an expert has one row or many; batch invariance is asked for up to 64 in all."""
    a, w = place(randn(100, k, dtype=dtype), device), place(randn(2, 70, k, dtype=dtype, seed=1), device)
    if across:
        w = w.mT.contiguous().mT
    together = moe_ops.grouped_gemm(a, w, place(offsets_of([0, 100]), device))
    for part in (1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 15, 25, 31, 64, 65, 99):
        moe_ops.set_batch_invariant(part <= 64)
        alone = moe_ops.grouped_gemm(a[:part], w, place(offsets_of([0, part]), device))
        assert_bitwise_equal(alone, together[:part], f"{part} rows")
    shifted = moe_ops.grouped_gemm(a, w[[1, 0]], place(offsets_of([100, 0]), device))
    assert_bitwise_equal(shifted, together)


@on_cpu
@pytest.mark.parametrize("k", [1, 40, 1030, 12001])
@pytest.mark.parametrize("n", [1, 31, 300])
@stored_weights
def test_dot_products_are_exact_where_sums_are(dtype, stored, n, k, instruction_set, switches):
    """Whole numbers, exact in any order: few rows equal many, each sum in its place."""
    a, w = integers(8, k, dtype=dtype), integers(1, n, k, dtype=stored, seed=1)
    moe_ops.set_batch_invariant(True)
    expected = moe_ops.grouped_gemm(a, w, offsets_of([8]))
    moe_ops.set_batch_invariant(False)
    for rows in range(1, 9):
        ours = moe_ops.grouped_gemm(a[:rows], w, offsets_of([rows]))
        assert_bitwise_equal(ours, expected[:rows], f"{rows} rows")


@on_cpu
@pytest.mark.parametrize("k", [1030, 6000, 9000])
@stored_weights
def test_few_rows_are_dot_products_up_to(dtype, stored, k, instruction_set, switches):
    """One row again and again, under a bias that leaves of its sums what rounding would hide: another order differs."""
    most, pairs = 6 if stored in LOW else 4, (dtype, instruction_set) == (torch.bfloat16, "avx512_bf16")
    if instruction_set.startswith("avx512") and stored.itemsize * (1 + pairs) == max(dtype.itemsize, 4):
        most = min(most, {1030: 6, 6000: 3, 9000: 2}[k])
    (row, others), w = randn(10, k, dtype=dtype).split((1, 9)), randn(3, 300, k, dtype=stored, seed=1)
    bias = -moe_ops.grouped_gemm(row, w, offsets_of([1, 0, 0])) * torch.ones(3, 1)

    def product(rows, batch_invariant):
        moe_ops.set_batch_invariant(batch_invariant)
        a, offsets = torch.cat([row.expand(rows, -1), others]), offsets_of([rows, 0, 9])
        return moe_ops.grouped_gemm(a, w, offsets, bias=bias)[:rows]

    many, few = product(most + 1, False)[:1], product(1, False)
    assert not torch.equal(many, few), "the switch changes nothing"
    for rows in range(1, most + 1):
        assert_bitwise_equal(product(rows, False), few.expand(rows, -1), f"{rows} rows")
    for rows in range(1, most + 2):
        assert_bitwise_equal(product(rows, True), many.expand(rows, -1), f"{rows} rows, batch invariance")


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float16])  # no product of it vanishes
@pytest.mark.parametrize("k", [1, 3, 40])
def test_a_vanishing_sum_has_one_sign(k, dtype, device, instruction_set, switches):
    """Products too small for the dtype, under a bias of -0.0: zeros of the same sign, whatever the number of rows."""
    tiny = torch.finfo(dtype).tiny
    w = place(torch.full((1, 40, k), -tiny, dtype=dtype), device)
    bias = place(torch.full((1, 40), -0.0, dtype=dtype), device)
    moe_ops.set_batch_invariant(True)
    signs = set()
    for rows in (1, 2, 12, 13, 40):
        a = place(torch.full((rows, k), tiny, dtype=dtype), device)
        out = moe_ops.grouped_gemm(a, w, place(offsets_of([rows]), device), bias=bias).cpu()
        assert not out.any()
        signs |= set(out.signbit().flatten().tolist())
    assert len(signs) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_threads_and_run_to_run(dtype, device, threads, instruction_set):
    ids = crowded(200, 9, 2)
    tensors = {
        "a": randn(200, 130, dtype=dtype),
        "w": randn(9, 150, 130, dtype=dtype, seed=1),
        "bias": randn(9, 150, seed=2),
    }
    gradients = {"result": randn(400, 150, seed=3)}
    results = []
    for count in (1, 2, 3, 3):
        torch.set_num_threads(count)
        results.append(compare(gathered(ids, 9), tensors, device, GEMM, gradients=gradients))
    for other in results[1:]:
        for name in other:
            assert_bitwise_equal(other[name], results[0][name], name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agrees_with_grouped_mm_of_torch(dtype, device, instruction_set):
    """Independent code; it wants strides of 16 bytes and contiguous gradients, and takes every row."""
    counts = [16, 0, 24, 8]
    a, w = randn(48, 64, dtype=dtype), randn(4, 32, 64, dtype=dtype, seed=1)
    gradient = randn(48, 32, dtype=dtype, seed=2)

    def theirs(a, w):
        a, w = a.clone().requires_grad_(), w.clone().requires_grad_()
        out = torch.nn.functional.grouped_mm(a, w.transpose(1, 2), offs=offsets_of(counts)[1:])
        return out.detach(), *torch.autograd.grad(out, (a, w), gradient.to(out.dtype))

    a_, w_ = place(a, device).requires_grad_(), place(w, device).requires_grad_()
    out = moe_ops.grouped_gemm(a_, w_, place(offsets_of(counts), device))
    ours = out, *torch.autograd.grad(out, (a_, w_), place(gradient, device))
    call, doubles = product(offsets_of(counts)), {"a": a.double(), "w": w.double()}
    oracle = run(call, reference, doubles, ("a", "w"), {"result": gradient})
    for name, mine, other in zip(("result", "grad a", "grad w"), ours, theirs(a, w), strict=True):
        assert_as_accurate(mine, other, oracle[name], name)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(data=st.data())
def test_property(data):
    counts = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=6))
    n, k, tail = data.draw(st.integers(1, 50)), data.draw(st.integers(1, 50)), data.draw(st.integers(0, 3))
    dtype = data.draw(st.sampled_from(DTYPES))
    weight_dtype = data.draw(st.sampled_from([dtype, torch.float32])) if dtype in LOW else dtype
    seed = data.draw(st.integers(0, 1000))
    tensors = {
        "a": integers(sum(counts) + tail, k, dtype=dtype, seed=seed, limit=1),
        "w": integers(len(counts), n, k, dtype=weight_dtype, seed=seed + 1, limit=1),
        "bias": integers(len(counts), n, dtype=weight_dtype, seed=seed + 2),
    }
    if data.draw(st.booleans()):
        del tensors["bias"]
    tensors = {name: data.draw(input_layouts)(t) for name, t in tensors.items()}
    call, cpu = product(offsets_of(counts)), torch.device("cpu")
    compare(call, tensors, cpu, tuple(tensors), exact=True, grad_layout=data.draw(layouts))
