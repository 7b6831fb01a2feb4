"""dispatch, combine and moe_mlp over process groups, against one rank: real processes over Gloo, 1, 2 and 4 of them."""

import time
from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

import moe_ops
import ranks
from accuracy import assert_as_accurate, assert_bitwise_equal
from cases import DEVICE, integers, powers, randn, seeded
from moe_ops import expert_parallel, reference
from moe_ops.exchange.sending import owned

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="Gloo's ranks run on the CPU")
every_world = pytest.mark.parametrize("world", [1, 2, 4])
CPU = torch.device("cpu")


@dataclass
class Problem:
    """A batch spread over ranks; every rank draws all of it, and takes its own part."""

    tokens: list[int]
    experts: int = 7
    top_k: int = 3
    hidden: int = 16
    inner: int = 10
    dtype: torch.dtype = torch.float32
    skew: float = 0.0  # of the choice towards low experts
    bias: bool = False
    exact: bool = False  # whole numbers, whose sums are exact
    seed: int = 0
    options: dict = field(default_factory=dict)

    def __post_init__(self):
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.tokens = self.tokens[: self.world]
        begin, total = sum(self.tokens[: self.rank]), sum(self.tokens)
        self.mine = slice(begin, begin + self.tokens[self.rank])
        self.own = slice(*owned(self.experts, self.rank, self.world))
        draw = integers if self.exact else randn
        scores = torch.rand(total, self.experts, generator=seeded(self.seed), dtype=torch.float64)
        scores += self.skew * torch.arange(self.experts)
        self.ids = scores.argsort(1)[:, : self.top_k].contiguous()
        wide = self.inner if self.options.get("gated") is False else 2 * self.inner
        shapes = {"w_in": (self.experts, wide, self.hidden), "w_out": (self.experts, self.hidden, self.inner)}
        if self.bias:
            shapes |= {"b_in": (self.experts, wide), "b_out": (self.experts, self.hidden)}
        self.inputs = {"x": draw(total, self.hidden, dtype=self.dtype, seed=self.seed)}
        weights = powers if self.exact else randn
        self.inputs["weights"] = weights(total, self.top_k, seed=self.seed + 1)
        if self.dtype == torch.float64:
            self.inputs["weights"] = self.inputs["weights"].double()
        for i, (name, shape) in enumerate(shapes.items()):
            extra = {} if self.exact else {"scale": shape[-1] ** -0.5}
            self.inputs[name] = draw(*shape, dtype=self.dtype, seed=self.seed + 2 + i, **extra)
        self.grad = draw(total, self.hidden, dtype=self.dtype, seed=self.seed + 9)

    def part(self, name, value):
        """This rank's part of what all ranks have together."""
        return value[self.mine if name in ("x", "weights", "y") else self.own]

    def leaves(self):
        return {name: self.part(name, value).clone().requires_grad_() for name, value in self.inputs.items()}

    def spread(self, call):
        """y and all gradients of call(experts, **inputs) on this rank's part."""
        leaves = self.leaves()
        y = call(self.ids[self.mine], **leaves)
        grads = torch.autograd.grad(y, list(leaves.values()), self.grad[self.mine])
        return {"y": y.detach()} | dict(zip(leaves, grads, strict=True))

    def together(self, dtype, **options):
        """This rank's part of what the reference gives for all ranks' tokens and experts."""
        wide = {name: value.to(dtype) if dtype == torch.float64 else value for name, value in self.inputs.items()}
        leaves = {name: value.clone().requires_grad_() for name, value in wide.items()}
        y = reference.moe_mlp(experts=self.ids, **leaves, **self.options, **options)
        grads = torch.autograd.grad(y, list(leaves.values()), self.grad.to(y.dtype), materialize_grads=True)
        everything = {"y": y.detach()} | dict(zip(leaves, grads, strict=True))
        return {name: self.part(name, value) for name, value in everything.items()}

    def mlp(self, experts, **inputs):
        exchange = {name: self.options[name] for name in self.options}
        return expert_parallel.moe_mlp(
            experts=experts, group=dist.group.WORLD, num_experts=self.experts, **inputs, **exchange
        )


UNEVEN, EVEN, FEW = [9, 0, 5, 13], [8, 8, 8, 8], [0, 3, 0, 0]
PROBLEMS = {
    "plain": {"tokens": EVEN, "experts": 8},
    "uneven": {"tokens": UNEVEN},
    "rank_without_experts": {"tokens": UNEVEN, "experts": 5},
    "fewer_experts_than_ranks": {"tokens": EVEN, "experts": 2, "top_k": 2},
    "one_expert": {"tokens": EVEN, "experts": 1, "top_k": 1},
    "no_tokens": {"tokens": [0, 0, 0, 0]},
    "few_tokens": {"tokens": FEW, "top_k": 1},
    "all_to_the_first": {"tokens": UNEVEN, "experts": 8, "top_k": 2, "skew": 9.0},
    "top_k_is_experts": {"tokens": UNEVEN, "experts": 9, "top_k": 9},
    "biases": {"tokens": UNEVEN, "bias": True},
    "weight_on_input": {"tokens": UNEVEN, "options": {"weight_on": "input"}},
    "plain_activation": {"tokens": UNEVEN, "options": {"gated": False, "activation": "relu2"}},
    "bfloat16": {"tokens": UNEVEN, "dtype": torch.bfloat16, "hidden": 33},
    "float16": {"tokens": UNEVEN, "dtype": torch.float16, "inner": 7},
    "float64": {"tokens": UNEVEN, "dtype": torch.float64},
}
# How many rows a bounded exchange has room for: T may then differ between ranks.
WAYS = [
    {},
    {"chunks": 3},
    {"mode": "bounded", "rows_per_peer": 13},
    {"mode": "bounded", "rows_per_peer": 15, "chunks": 3},
]


def bounded_pair(result, way):
    """y of what moe_mlp returns, nothing dropped."""
    if "rows_per_peer" not in way:
        return result
    y, dropped = result
    assert dropped.item() == 0
    return y


def values():
    for name, sizes in PROBLEMS.items():
        problem = Problem(**sizes)
        oracle, eager = problem.together(torch.float64), problem.together(problem.dtype)
        for way in WAYS:

            def call(experts, problem=problem, way=way, **inputs):
                return bounded_pair(problem.mlp(experts, **inputs, **way), way)

            ours = problem.spread(call)
            for what, value in ours.items():
                assert_as_accurate(value, eager[what], oracle[what], f"{name} {way} {what}")
            for what, again in problem.spread(call).items():
                assert_bitwise_equal(again, ours[what], f"{name} {way} {what}, second run")


@every_world
def test_values_and_gradients_are_those_of_one_rank(world):
    ranks.run(world, values)


def composed(problem, api, w_in, w_out, ids, x, weights, group, early, **options):
    """The same from the verbs, with sums that stay exact."""
    extra = {} if group is None else {"group": group}
    rows, plan = api.dispatch(x, ids, problem.experts, weights=weights if early else None, **options, **extra)
    pre = api.grouped_gemm(rows, w_in, plan.offsets)
    out = api.grouped_gemm(torch.relu(pre[:, : problem.inner]), w_out, plan.offsets)
    return rows, plan, api.combine(out, None if early and group is not None else weights, plan)


def verbs(seeds):
    """Random routings, whole numbers: everything must be equal, rows and plans included."""
    for seed in seeds:
        draw = torch.Generator().manual_seed(seed)
        at_most = lambda most: int(torch.randint(0, most + 1, (), generator=draw))  # noqa: E731, B023
        experts = 1 + at_most(9)
        top_k = 1 + at_most(experts - 1)
        sizes = {"tokens": [at_most(9) * at_most(1) for _ in range(4)], "experts": experts, "top_k": top_k}
        p = Problem(**sizes, exact=True, seed=seed, hidden=1 + at_most(8), inner=2)
        wrong = torch.rand(p.ids.shape, generator=draw) < 0.2  # some ids are out of range, some doubled
        p.ids[wrong] = torch.tensor([-1, experts, 0, 1 << 30])[torch.randint(0, 4, p.ids.shape, generator=draw)][wrong]
        policy = ["position", "choice_first", "probability"][at_most(2)]
        options = {"capacity": [None, at_most(6)][at_most(1)], "drop_policy": policy}
        early = policy == "probability" or bool(at_most(1))
        keep = {}

        def call(api, ids, group, p=p, keep=keep, early=early, options=options, **leaves):
            *keep[group], y = composed(p, api, ids=ids, group=group, early=early, **leaves, **options)
            return y

        ours = p.spread(lambda ids, call=call, **leaves: call(moe_ops, ids, dist.group.WORLD, **leaves))
        leaves = {name: value.clone().requires_grad_() for name, value in p.inputs.items()}
        y = call(reference, p.ids, None, **leaves)
        grads = torch.autograd.grad(y, list(leaves.values()), p.grad, materialize_grads=True)
        for name, value in ({"y": y} | dict(zip(leaves, grads, strict=True))).items():
            assert_bitwise_equal(ours[name], p.part(name, value), f"seed {seed} {name}")
        (rows, plan), (all_rows, whole) = keep[dist.group.WORLD], keep[None]
        bounds = whole.offsets[p.own.start : p.own.stop + 1]
        assert_bitwise_equal(plan.offsets, bounds - bounds[0], f"seed {seed} offsets")
        assert_bitwise_equal(plan.counts, whole.counts[p.own], f"seed {seed} counts")
        assert_bitwise_equal(rows[: plan.offsets[-1]], all_rows[bounds[0] : bounds[-1]], f"seed {seed} rows")
        assert not rows[plan.offsets[-1] :].any()


@every_world
def test_random_routings_with_capacity(world):
    """A capacity drops what one rank with all tokens would drop."""
    ranks.run(world, verbs, range(12))


@pytest.mark.long
@every_world
def test_many_random_routings(world):
    ranks.run(world, verbs, range(12, 400))


class Count(torch.utils._python_dispatch.TorchDispatchMode):
    """Bytes that all_to_all_single sends to other ranks, by dtype."""

    def __init__(self, rank):
        super().__init__()
        self.rank, self.bytes, self.calls = rank, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops._c10d_functional.all_to_all_single.default:
            x, _, send, _ = args
            rows = sum(n for rank, n in enumerate(send) if rank != self.rank)
            self.bytes[x.dtype] = self.bytes.get(x.dtype, 0) + rows * x[0:1].numel() * x.element_size() * bool(len(x))
            self.calls += 1
        return func(*args, **(kwargs or {}))


def traffic():
    p = Problem(tokens=[40, 40, 40, 40], experts=8, top_k=4, hidden=64, dtype=torch.bfloat16)
    each = -(-p.experts // p.world)
    pairs = [
        {(t, int(e) // each) for t, row in enumerate(p.ids) for e in row if int(e) // each != rank}
        for rank in range(p.world)
    ]
    begin = p.mine.start
    out = sum(begin <= t < p.mine.stop for t, _ in pairs[p.rank])  # (token, rank) pairs that leave this rank,
    come = sum(not begin <= t < p.mine.stop and int(r) == p.rank for t, r in set().union(*pairs))  # and that come here
    row = p.hidden * 2
    for chunks in (1, 3):
        leaves = p.leaves()
        with Count(p.rank) as forward:
            y = p.mlp(p.ids[p.mine], **leaves, chunks=chunks)
        assert forward.bytes[torch.bfloat16] == (out + come) * row, "rows there and sums back"
        assert forward.bytes[torch.int32] == out * 2 * p.top_k * 4, "ids and weights"
        with Count(p.rank) as backward:
            torch.autograd.grad(y, list(leaves.values()), p.grad[p.mine])
        assert backward.bytes[torch.bfloat16] == (out + come) * row, "gradients of the sums there and of the rows back"
        assert backward.bytes[torch.float32] == come * p.top_k * 4, "gradients of the weights"
        assert (forward.calls, backward.calls) == (3 * chunks, 3 * chunks)


@every_world
def test_no_byte_more_than_needed(world):
    """A row travels once to each other rank that needs it; beside rows only 8 * top_k bytes each."""
    ranks.run(world, traffic)


def memory():
    """Backward keeps, of floats, the tokens that came, their weights, their pre-activations, and the experts."""
    p = Problem(tokens=UNEVEN, experts=8, top_k=4)
    kept = {}

    def pack(value):
        if value.is_floating_point():
            kept[value.data_ptr()] = value.nbytes
        return value

    inputs = p.leaves()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        y = p.mlp(p.ids[p.mine], **inputs)
    mine = (p.ids >= p.own.start) & (p.ids < p.own.stop)
    tokens, slots = int(mine.any(1).sum()), int(mine.sum())
    values = tokens * (p.hidden + p.top_k) + slots * 2 * p.inner + inputs["w_in"].numel() + inputs["w_out"].numel()
    assert sum(kept.values()) == 4 * values
    assert y.shape == inputs["x"].shape


@every_world
def test_memory_kept_for_backward(world):
    ranks.run(world, memory)


def anomaly():
    """Autograd must not look for NaN in a gradient that is still on its way: memory is NaN until something arrives."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    p = Problem(tokens=[9, 9])
    with torch.autograd.detect_anomaly():
        y = p.mlp(p.ids[p.mine], **p.leaves())
        time.sleep(0.1 * p.rank)
        y.sum().backward()


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_anomaly_mode():
    ranks.run(2, anomaly)


def compiled(backend, mode, verb, chunks, sizes):
    torch._dynamo.config.capture_scalar_outputs = mode == "exact"

    def layer(experts, x, weights, w_in, w_out):
        group = dist.group.WORLD
        if verb == "moe_mlp":
            exchange = {"group": group, "num_experts": 7, "mode": mode, "chunks": chunks}
            return expert_parallel.moe_mlp(x, weights, experts, w_in, w_out, **exchange)
        rows, plan = moe_ops.dispatch(x, experts, 7, group=group, mode=mode, weights=weights)
        pre = moe_ops.grouped_gemm(rows, w_in, plan.offsets)
        return moe_ops.combine(moe_ops.grouped_gemm(pre[:, :10], w_out, plan.offsets), None, plan)

    fast = torch.compile(layer, fullgraph=True, backend=backend, dynamic=True if len(sizes) > 1 else None)
    for tokens in sizes:
        problem = Problem(tokens=tokens)
        eager = problem.spread(layer)
        for name, value in problem.spread(fast).items():
            torch.testing.assert_close(value, eager[name], msg=lambda m, name=name: f"{name}: {m}")


def test_compile_of_a_bounded_exchange_without_a_graph_break():
    ranks.run(2, compiled, "aot_eager", "bounded", "moe_mlp", 1, [[8, 8]])


@pytest.mark.long
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("verb", ["moe_mlp", "dispatch"])
@pytest.mark.parametrize("mode", ["exact", "bounded"])
def test_compile_with_any_number_of_tokens(mode, verb, backend):
    """Exact mode asks for torch._dynamo.config.capture_scalar_outputs, as it reads the counts."""
    sizes = [[9, 4], [13, 5]] if mode == "exact" else [[8, 8], [11, 11]]
    started = ranks.start(2, compiled, backend, mode, verb, 1 + (verb == "moe_mlp"), sizes, timeout=900.0)
    assert [error for _, error in ranks.gather(*started, patience=900.0)] == [None, None]


def modes_of_torch():
    p = Problem(tokens=UNEVEN, options={"chunks": 2})
    plain = p.spread(p.mlp)
    for reentrant in (False, True):

        def checkpointed(experts, reentrant=reentrant, **inputs):
            call = lambda *values: p.mlp(experts, **dict(zip(inputs, values, strict=True)))  # noqa: E731
            return checkpoint(call, *inputs.values(), use_reentrant=reentrant)

        again = {} if reentrant else p.spread(checkpointed)
        if reentrant:  # knows .backward alone
            leaves = p.leaves()
            checkpointed(p.ids[p.mine], **leaves).backward(p.grad[p.mine])
            again = {name: leaf.grad for name, leaf in leaves.items()}
        for name, value in again.items():
            assert_bitwise_equal(value, plain[name], f"checkpoint (reentrant={reentrant}) {name}")
    leaves = p.leaves()
    with torch.no_grad():
        y = p.mlp(p.ids[p.mine], **leaves)
    assert not y.requires_grad
    assert_bitwise_equal(y, plain["y"], "no_grad")
    with torch.inference_mode():
        assert_bitwise_equal(p.mlp(p.ids[p.mine], **leaves), plain["y"], "inference_mode")
    with torch.autocast("cpu", torch.bfloat16), Count(p.rank) as sent:
        y = p.mlp(p.ids[p.mine], **leaves)
    assert y.dtype == torch.bfloat16 and torch.float32 not in sent.bytes, "autocast's dtype travels"
    half = {name: value.bfloat16() if name == "x" else value for name, value in leaves.items()}
    assert_bitwise_equal(y, p.mlp(p.ids[p.mine], **half), "autocast")
    seen = []
    y = p.mlp(p.ids[p.mine], **leaves, shared=lambda: seen.append(1) or leaves["x"] * 2)
    assert_bitwise_equal(y, plain["y"] + 2 * leaves["x"], "shared")
    assert seen == [1]


@every_world
def test_checkpointing_no_grad_inference_and_autocast(world):
    ranks.run(world, modes_of_torch)


def too_small():
    """A token loses its experts of a rank where it does not fit; the first tokens stay, and the loss is counted."""
    p = Problem(tokens=[10] * 4, experts=8, top_k=3)
    each, room, lost = -(-p.experts // p.world), 4, 0
    kept = p.ids.clone()
    for start in range(0, len(kept), 10):
        for rank in range(p.world):
            of_rank = kept[start : start + 10] // each == rank
            beyond = of_rank.any(1) & (of_rank.any(1).cumsum(0) > room)
            lost += int(beyond.sum()) if start == p.mine.start else 0
            kept[start : start + 10][of_rank & beyond.unsqueeze(1)] = -1
    y, dropped = p.mlp(p.ids[p.mine], **p.leaves(), mode="bounded", rows_per_peer=room)
    assert dropped.item() == lost and (lost > 0)
    assert_bitwise_equal(y, p.mlp(kept[p.mine], **p.leaves()))
    rows, plan = moe_ops.dispatch(
        p.leaves()["x"], p.ids[p.mine], 8, group=dist.group.WORLD, mode="bounded", rows_per_peer=room
    )
    exact_rows, exact = moe_ops.dispatch(p.leaves()["x"], kept[p.mine], 8, group=dist.group.WORLD)
    assert plan.dropped.item() == lost and exact.dropped.item() == 0
    assert rows.shape[0] == p.world * room * p.top_k and not rows[plan.offsets[-1] :].any()
    assert_bitwise_equal(plan.offsets, exact.offsets)
    assert_bitwise_equal(rows[: len(exact_rows)], exact_rows)


@every_world
def test_bounded_exchange_counts_what_does_not_fit(world):
    ranks.run(world, too_small)
