"""prepack: with batch invariance the bits of the weight itself, in every use; what a PackedWeight is, and refuses."""

import pickle
import re
from pathlib import Path

import pytest
import torch

import moe_ops
from accuracy import assert_bitwise_equal
from arguments import GOOD as CALLS
from arguments import INNER, E, H, K, T, half, zeros
from cases import DEVICE, LOW, every_dtype, every_layout, offsets_of, randn
from moe_ops import _C, PackedWeight

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
GOOD = CALLS | {"prepack": {"weight": zeros(E, INNER, H)}}

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="PackedWeights are for the CPU")


# Row counts that are few, many and none; N and K beside the sizes of panels, tiles and blocks of the reduction.
@every_dtype
@pytest.mark.parametrize("biased", (False, True))
@pytest.mark.parametrize(
    "counts, n, k",
    [
        ([5, 0, 60, 1, 13], 37, 41),
        ([13, 2], 300, 700),
        ([2, 1], 1, 1),
        ([200, 0, 12], 256, 320),
        ([1], 33, 6001),
        ([24, 25, 193], 31, 2),
        ([3, 4], 32, 0),
        ([3, 4], 0, 8),
        ([0, 0], 8, 8),
        ([], 8, 8),
    ],
)
def test_grouped_gemm_gives_the_same_bits(counts, n, k, biased, dtype, instruction_set, batch_invariant):
    a = randn(sum(counts) + 2, k, dtype=dtype)
    w = randn(len(counts), n, k, dtype=dtype, seed=1)
    bias = randn(len(counts), n, dtype=dtype, seed=2) if biased else None
    plain = moe_ops.grouped_gemm(a, w, offsets_of(counts), bias=bias)
    packed = moe_ops.grouped_gemm(a, moe_ops.prepack(w), offsets_of(counts), bias=bias)
    assert_bitwise_equal(packed, plain, "with the packed weight")


@every_dtype
@pytest.mark.parametrize("kind", ("concatenated", "interleaved", "plain"))
@pytest.mark.parametrize(
    "tokens, hidden, inner, experts, top_k",
    [(40, 24, 50, 3, 2), (3, 65, 33, 4, 2), (150, 64, 300, 2, 1), (1, 40, 128, 4, 2), (7, 5, 1, 2, 2), (0, 4, 4, 2, 1)],
)
def test_moe_mlp_gives_the_same_bits(
    tokens, hidden, inner, experts, top_k, kind, dtype, instruction_set, batch_invariant
):
    """Ups that begin within a panel, gates and ups that alternate; either weight packed, or both."""
    wide = inner if kind == "plain" else 2 * inner
    x, weights = randn(tokens, hidden, dtype=dtype), randn(tokens, top_k, seed=1)
    ids = torch.arange(tokens * top_k).view(tokens, top_k) % experts
    w_in, w_out = randn(experts, wide, hidden, dtype=dtype, seed=2), randn(experts, hidden, inner, dtype=dtype, seed=3)
    options = {
        "gated": kind != "plain",
        "layout": "interleaved" if kind == "interleaved" else "concatenated",
        "b_in": randn(experts, wide, dtype=dtype, seed=4),
        "b_out": randn(experts, hidden, dtype=dtype, seed=5),
        "limit": 7.0,
    }
    plain = moe_ops.moe_mlp(x, weights, ids, w_in, w_out, **options)
    packed_in, packed_out = moe_ops.prepack(w_in), moe_ops.prepack(w_out)
    for first, second in ((packed_in, packed_out), (packed_in, w_out), (w_in, packed_out)):
        assert_bitwise_equal(moe_ops.moe_mlp(x, weights, ids, first, second, **options), plain, "with packed weights")


@every_dtype
def test_one_packed_weight_serves_every_instruction_set(dtype):
    """The layout is one; only the arithmetic differs."""
    a, w, offsets = randn(30, 90, dtype=dtype), randn(2, 50, 90, dtype=dtype, seed=1), offsets_of([7, 23])
    packed, in_use = moe_ops.prepack(w), _C.instruction_set()
    try:
        for name in _C.instruction_sets():
            _C.use_instruction_set(name)
            both = moe_ops.grouped_gemm(a, packed, offsets), moe_ops.grouped_gemm(a, w, offsets)
            assert_bitwise_equal(*both, name)
    finally:
        _C.use_instruction_set(in_use)


@every_dtype
@pytest.mark.parametrize("n, k", [(289, 501), (161, 5301)])
def test_a_row_does_not_depend_on_the_batch(n, k, dtype, instruction_set):
    """Panels that fill a tile and some that do not; a reduction in one piece and in several; every number of rows."""
    plain = randn(1, n, k, dtype=dtype, seed=1)
    a, w = randn(60, k, dtype=dtype), moe_ops.prepack(plain)
    together = moe_ops.grouped_gemm(a, plain, offsets_of([60]))
    for rows in (*range(1, 17), 25, 26, 37, 60):
        assert_bitwise_equal(moe_ops.grouped_gemm(a[:rows], w, offsets_of([rows])), together[:rows], f"{rows} rows")


@every_dtype
@every_layout
def test_unpack_gives_the_weight_back(layout, dtype):
    w = layout(randn(3, 37, 41, dtype=dtype))
    packed = moe_ops.prepack(w)
    assert (packed.shape, packed.dtype, packed.device) == (w.shape, dtype, w.device)
    assert torch.equal(packed.unpack(), w) and packed.unpack().is_contiguous()


@pytest.mark.parametrize("dtype", LOW)
def test_float32_weights_are_rounded_once(dtype, instruction_set):
    """As grouped_gemm rounds them while it packs."""
    a, w, offsets = randn(30, 41, dtype=dtype), randn(2, 37, 41, seed=1), offsets_of([9, 21])
    packed = moe_ops.prepack(w, dtype=dtype)
    assert packed.dtype == dtype and torch.equal(packed.unpack(), w.to(dtype))
    assert_bitwise_equal(moe_ops.grouped_gemm(a, packed, offsets), moe_ops.grouped_gemm(a, w, offsets), "rounded ahead")
    with torch.autocast("cpu", dtype):
        assert_bitwise_equal(moe_ops.grouped_gemm(a.float(), packed, offsets),
                             moe_ops.grouped_gemm(a.float(), w, offsets), "autocast")  # fmt: skip


@pytest.mark.parametrize(
    "dtype, n, k, padded",
    [(torch.float32, 33, 5, 64 * 5), (torch.bfloat16, 64, 5, 64 * 6), (torch.float64, 33, 5, 48 * 5)],
)
def test_memory_is_as_stated(dtype, n, k, padded):
    packed = moe_ops.prepack(torch.ones(3, n, k, dtype=dtype))
    assert packed.nbytes == 3 * padded * dtype.itemsize == packed.panels.untyped_storage().nbytes()
    assert packed.stand_in.untyped_storage().nbytes() == dtype.itemsize
    assert packed.panels.sum() == 3 * n * k, "what fills up is not zero"


@pytest.mark.skipif(not HUGE_PAGES.exists(), reason="the kernel has no transparent huge pages")
def test_large_panels_ask_for_huge_pages():
    panels = moe_ops.prepack(randn(4, 1024, 1024)).panels
    middle = panels.data_ptr() + panels.nbytes // 2
    mapped = r"^([0-9a-f]+)-([0-9a-f]+) .*?^VmFlags:(.*?)$"
    areas = re.findall(mapped, Path("/proc/self/smaps").read_text(), re.MULTILINE | re.DOTALL)
    assert any(int(begin, 16) <= middle < int(end, 16) and " hg" in flags for begin, end, flags in areas)


def test_it_prints_what_it_is():
    packed = moe_ops.prepack(randn(2, 40, 7, dtype=torch.bfloat16))
    assert repr(packed) == f"PackedWeight([2, 40, 7], bfloat16, {packed.nbytes} bytes)"


def test_it_is_a_copy_without_a_gradient():
    w = torch.nn.Parameter(randn(2, 8, 8))
    packed, before = moe_ops.prepack(w), w.detach().clone()
    w.data.zero_()
    assert torch.equal(packed.unpack(), before) and not packed.panels.requires_grad


def test_it_survives_a_file(tmp_path):
    w = randn(2, 37, 41, dtype=torch.bfloat16)
    packed = moe_ops.prepack(w)
    torch.save(tuple(packed), tmp_path / "weight.pt")
    for loaded in (pickle.loads(pickle.dumps(packed)), PackedWeight(*torch.load(tmp_path / "weight.pt"))):
        assert isinstance(loaded, PackedWeight) and torch.equal(loaded.unpack(), w)
        assert loaded.stand_in.untyped_storage().nbytes() == 2


BAD = [
    ("prepack", {"weight": [[[1.0]]]}, TypeError, "must be a Tensor of shape [experts, n, k], got list"),
    ("prepack", {"weight": zeros(E, H)}, ValueError, "must be of shape [experts, n, k], got [4, 6]"),
    (
        "prepack",
        {"weight": zeros(E, INNER, H, dtype=torch.int32)},
        TypeError,
        "must be of dtype float32, bfloat16, float16 or float64, got int32",
    ),
    ("prepack", {"weight": GOOD["prepack"]["weight"].to("meta")}, ValueError, "must be on the CPU, got meta"),
    ("prepack", {"dtype": torch.int32}, TypeError, "must be None, float32, bfloat16, float16 or float64, got int32"),
    (
        "prepack",
        {"dtype": "bfloat16"},
        TypeError,
        "must be None, float32, bfloat16, float16 or float64, got str 'bfloat16'",
    ),
    (
        "grouped_gemm",
        {"w": moe_ops.prepack(half(E, INNER, H))},
        TypeError,
        "must have the dtype of a (float32), got bfloat16",
    ),
    (
        "grouped_gemm",
        {"w": moe_ops.prepack(zeros(E, INNER, H)), "a": half(T * K, H)},
        TypeError,
        ", a PackedWeight, must have the dtype of a (bfloat16), as prepack(weight, dtype=torch.bfloat16) makes it, got "
        "float32",
    ),
    (
        "grouped_gemm",
        {"w": moe_ops.prepack(zeros(E, INNER, 7))},
        ValueError,
        "must be of shape [experts, n, 6] to fit a, got [4, 5, 7]",
    ),
    (
        "moe_mlp",
        {"w_in": moe_ops.prepack(zeros(E, 2 * INNER, H)), "x": half(T, H)},
        TypeError,
        ", a PackedWeight, must have the dtype of x (bfloat16), as prepack(weight, dtype=torch.bfloat16) makes it, got "
        "float32",
    ),
]


@pytest.mark.parametrize(("name", "changed", "error", "text"), BAD)
def test_bad_input(name, changed, error, text):
    argument = next(iter(changed))
    with pytest.raises(error) as caught:
        getattr(moe_ops, name)(**(GOOD[name] | changed))
    between = "" if text.startswith(",") else " "
    assert str(caught.value).startswith(f"{name}: {argument}{between}{text}"), str(caught.value)


GRADIENT = "is a PackedWeight, which has no gradient, and an operand requires one"


@pytest.mark.parametrize("needed", ("a", "bias"))
def test_grouped_gemm_refuses_gradients(needed):
    tensors = {"a": randn(6, 8), "bias": randn(2, 4)}
    tensors[needed].requires_grad_()
    packed = moe_ops.prepack(randn(2, 4, 8))
    with pytest.raises(RuntimeError, match=f"grouped_gemm: w {GRADIENT}"):
        moe_ops.grouped_gemm(tensors["a"], packed, offsets_of([2, 4]), bias=tensors["bias"])
    with torch.no_grad():
        moe_ops.grouped_gemm(tensors["a"], packed, offsets_of([2, 4]), bias=tensors["bias"])
    with pytest.raises(RuntimeError, match="moe_ops::grouped_gemm: a PackedWeight has no gradient"):
        torch.ops.moe_ops.grouped_gemm(
            tensors["a"], packed.stand_in, offsets_of([2, 4]), tensors["bias"], None, None, packed.panels, False, False
        )


@pytest.mark.parametrize("name", ("w_in", "w_out"))
def test_moe_mlp_refuses_gradients(name):
    w = {"w_in": randn(2, 8, 6), "w_out": randn(2, 6, 4)}
    w[name] = moe_ops.prepack(w[name])
    x, weights = randn(3, 6), randn(3, 1).requires_grad_()
    with pytest.raises(RuntimeError, match=f"moe_mlp: {name} {GRADIENT}"):
        moe_ops.moe_mlp(x, weights, torch.zeros(3, 1, dtype=torch.int32), **w)


def test_panels_of_another_shape_are_refused_by_the_operator():
    """What a hand-made PackedWeight cannot do: read beside its memory."""
    packed, other = moe_ops.prepack(randn(2, 40, 8)), moe_ops.prepack(randn(2, 32, 8))
    with pytest.raises(RuntimeError, match="grouped_gemm: panels has the wrong shape"):
        moe_ops.grouped_gemm(randn(6, 8), PackedWeight(other.panels, packed.stand_in), offsets_of([2, 4]))


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
@pytest.mark.parametrize("dynamic", (False, True))
def test_compiled(dynamic, backend):
    """A PackedWeight as an argument, through a graph without a break."""

    def layer(x, weights, experts, w_in, w_out):
        return moe_ops.moe_mlp(x, weights, experts, w_in, w_out).tanh()

    w_in, w_out = moe_ops.prepack(randn(2, 20, 6)), moe_ops.prepack(randn(2, 6, 10))
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=backend)
    for tokens in (3, 9):
        args = (randn(tokens, 6), randn(tokens, 1), torch.arange(tokens)[:, None] % 2, w_in, w_out)
        torch.testing.assert_close(compiled(*args), layer(*args))


def test_packing_itself_compiles():
    w = randn(2, 40, 8)
    packed = torch.compile(lambda w: moe_ops.prepack(w).panels, fullgraph=True, backend="aot_eager")(w)
    assert_bitwise_equal(packed, moe_ops.prepack(w).panels)


@pytest.mark.parametrize("bias", (False, True))
def test_experts_and_layers_pack_in_place(bias, batch_invariant):
    layer = moe_ops.nn.MoE(16, 24, 4, 2, shared_inner=8, bias=bias)
    x = randn(2, 5, 16)
    with torch.no_grad():
        before = layer(x)
        assert layer.prepack() is layer
        assert_bitwise_equal(layer(x), before, "packed in place")
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), before)
        layer.prepack()  # again: nothing is left to do
    assert isinstance(layer.experts.w_in, PackedWeight) and isinstance(layer.shared.w_out, PackedWeight)
    left = {name.rpartition(".")[2] for name, _ in layer.named_parameters()}
    assert left == {"weight"} | ({"b_in", "b_out"} if bias else set())
    with pytest.raises(RuntimeError, match=GRADIENT):
        layer(x)
    with pytest.raises(RuntimeError, match="prepacked cannot be drawn anew"):
        layer.experts.reset_parameters()


def test_experts_round_while_packing(batch_invariant):
    experts = moe_ops.nn.Experts(4, 16, 24)
    x, weights, ids = randn(5, 16, dtype=torch.bfloat16), randn(5, 1), torch.arange(5)[:, None] % 4
    with torch.no_grad():
        before = experts(x, weights, ids)
        assert_bitwise_equal(experts.prepack(dtype=torch.bfloat16)(x, weights, ids), before, "rounded ahead")


def test_naive_experts_do_not_pack():
    with pytest.raises(ValueError, match="Experts: impl must be 'moe_ops' to prepack, got 'naive'"):
        moe_ops.nn.Experts(4, 16, 24, impl="naive").prepack()
