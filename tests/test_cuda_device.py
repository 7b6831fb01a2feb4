"""What only a CUDA device has: streams, graphs, more than one device. `pytest --device cuda` runs it."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import moe_ops
from accuracy import assert_bitwise_equal
from samples import INNER, E, H, K, Maker, T


@pytest.fixture(autouse=True)
def only_cuda(device):
    if device.type != "cuda":
        pytest.skip("needs --device cuda")


def leaves(device):
    make = Maker(device, torch.bfloat16, grad=True)
    return make(T, H), make(E, H), make(E, 2 * INNER, H), make(E, H, INNER)


def forward_and_backward(x, router, w_in, w_out):
    """Every verb and the fused path, with their gradients."""
    weights, experts = moe_ops.route(x @ router.t(), K, renormalize=True)
    rows, plan = moe_ops.dispatch(x, experts, E, capacity=4)
    by_verbs = moe_ops.grouped_gemm(
        moe_ops.grouped_gemm(rows, w_in, plan.offsets)[:, :INNER].tanh(), w_out, plan.offsets
    )
    y = moe_ops.combine(by_verbs, weights, plan) + moe_ops.moe_mlp(x, weights, None, w_in, w_out, plan=plan)
    return y, *torch.autograd.grad(y.float().square().sum(), (x, router, w_in, w_out))


def test_graph_replays_with_new_tokens(device):
    """Another stream than torch's, a wait for the device or memory from elsewhere would break the capture."""
    static = leaves(device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        forward_and_backward(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = forward_and_backward(*static)
    for shift in (0.0, 1.0, -0.5):
        with torch.no_grad():
            static[0].copy_((leaves(device)[0] + shift).flip(0))
        graph.replay()
        for replayed, eager in zip(outputs, forward_and_backward(*static), strict=True):
            assert_bitwise_equal(replayed, eager)


def test_streams_give_the_same_bits(device):
    expected = forward_and_backward(*leaves(device))
    streams = [torch.cuda.Stream() for _ in range(3)]
    results = []
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results.append(forward_and_backward(*leaves(device)))
    torch.cuda.synchronize()
    for result in results:
        for ours, theirs in zip(result, expected, strict=True):
            assert_bitwise_equal(ours, theirs)


def test_threads_give_the_same_bits(device):
    """Forward and backward at once from several threads, each with a stream of its own."""
    expected = forward_and_backward(*leaves(device))

    def work(_):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            result = forward_and_backward(*leaves(device))
        stream.synchronize()
        return result

    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(work, range(8)):
            for ours, theirs in zip(result, expected, strict=True):
                assert_bitwise_equal(ours, theirs)


def test_a_device_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    expected = forward_and_backward(*leaves(torch.device("cuda", 0)))
    for ours, theirs in zip(forward_and_backward(*leaves(torch.device("cuda", 1))), expected, strict=True):
        assert ours.device.index == 1
        assert_bitwise_equal(ours, theirs)
    assert torch.cuda.current_device() == 0


def test_the_diagnosis_checks_every_operator_on_the_device():
    run = subprocess.run([sys.executable, "-m", "moe_ops"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    checks = [line for line in run.stdout.splitlines() if line.startswith("check: ")]
    assert len([line for line in checks if ", cuda:0" in line and " ok" in line]) * 2 == len(checks)


@pytest.mark.parametrize("value", ["off", "2"])
def test_the_switch_of_early_launches_is_0_or_1(value):
    program = "import torch, moe_ops; moe_ops.route(torch.zeros(4, 8, device='cuda'), 2)"
    environment = {**os.environ, "MOE_OPS_CUDA_EARLY": value}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert run.returncode != 0
    assert f"MOE_OPS_CUDA_EARLY must be 0 or 1, got '{value}'" in run.stderr


def test_float64_is_refused(device):
    with pytest.raises(ValueError, match="route: float64 is supported on the CPU only"):
        moe_ops.route(torch.zeros(T, E, device=device, dtype=torch.float64), K)
