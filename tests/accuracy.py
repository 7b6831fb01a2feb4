"""The accuracy law: ours may be no further from the float64 reference than twice eager, plus one rounding.

Eager is the reference run in the tested dtype. Both the largest and the root-mean-square error are held to it.
"""

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

import moe_ops
from moe_ops import reference

FACTOR = 2.0
# In float64 oracle and eager are one run, so its own roundings are allowed for, as so many units in the last place.
FLOAT64_ULPS = 64
NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "largest": lambda error: error.abs().max(),
    "rms": lambda error: error.square().mean().sqrt(),
}

Call = Callable[..., Tensor | tuple[Tensor, ...] | dict[str, Tensor]]


def place(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device, with its strides and offset."""
    if tensor.device.type == device.type:
        return tensor
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    flat = torch.as_strided(tensor, (size,), (1,), 0)
    return flat.to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def assert_as_accurate(
    ours: Tensor, eager: Tensor, oracle: Tensor, what: str = "result", norms: tuple[str, ...] = tuple(NORMS)
) -> None:
    """Fails where ours breaks the law, and where it differs in shape, dtype, or in which elements are not finite."""
    ours, eager, oracle = ours.detach().cpu(), eager.detach().cpu(), oracle.detach().cpu()
    assert ours.shape == oracle.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(oracle.shape)}"
    assert ours.dtype == eager.dtype, f"{what}: dtype {ours.dtype}, expected {eager.dtype}"
    finite = oracle.isfinite()
    assert torch.equal(finite, eager.isfinite()), f"{what}: the case overflows {eager.dtype}"
    assert torch.equal(
        torch.where(finite, 0.0, ours.double()).nan_to_num(1e300, 2e300, -2e300),
        torch.where(finite, 0.0, oracle.double()).nan_to_num(1e300, 2e300, -2e300),
    ), f"{what}: other elements are infinite or NaN than in the reference"
    expected = torch.where(finite, oracle.double(), 0.0)
    our_error = (torch.where(finite, ours.double(), 0.0) - expected).flatten()
    eager_error = (torch.where(finite, eager.double(), 0.0) - expected).flatten()
    if expected.numel() == 0:
        return
    info = torch.finfo(ours.dtype)
    rounding = info.eps / 2 * (FLOAT64_ULPS if ours.dtype == torch.float64 else 1)
    for name in norms:
        norm = NORMS[name]
        error, theirs = norm(our_error).item(), norm(eager_error).item()
        allowed = FACTOR * theirs + rounding * norm(expected).item() + info.smallest_normal * info.eps
        worst = int(our_error.abs().nan_to_num(torch.inf).argmax())
        assert error <= allowed, (
            f"{what}: {name} error {error:.3e}, allowed {allowed:.3e} (eager {theirs:.3e}); "
            f"worst at {worst}: {ours.flatten()[worst].item()}, expected {expected.flatten()[worst].item()}"
        )


def assert_close(ours: Tensor, expected: Tensor, rtol: float, atol: float) -> None:
    """Two ways to compute the same: within these tolerances in float64, within torch's in another dtype."""
    within = {"rtol": rtol, "atol": atol} if ours.dtype == torch.float64 else {}
    torch.testing.assert_close(ours, expected, **within)


def assert_bitwise_equal(ours: Tensor, expected: Tensor, what: str = "result") -> None:
    """Same shape, dtype and values; NaN equals NaN, -0.0 equals 0.0."""
    ours, expected = ours.detach().cpu(), expected.detach().cpu()
    assert ours.dtype == expected.dtype, f"{what}: dtype {ours.dtype}, expected {expected.dtype}"
    assert ours.shape == expected.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(expected.shape)}"
    differ = (ours != expected) & ~(ours.isnan() & expected.isnan())
    if differ.any():
        at = differ.nonzero()[0].tolist()
        raise AssertionError(
            f"{what}: {int(differ.sum())} of {differ.numel()} elements differ, the first at {at}: "
            f"{ours[tuple(at)].item()}, expected {expected[tuple(at)].item()}"
        )


def run(
    call: Call,
    api: ModuleType,
    tensors: dict[str, Tensor],
    differentiate: tuple[str, ...],
    gradients: dict[str, Tensor],
    grad_layout: Callable[[Tensor], Tensor] = lambda grad: grad,
) -> dict[str, Tensor]:
    """What call(api, **tensors) returns, by name, and the gradient of each tensor in differentiate, as "grad name".

    gradients: the outgoing gradient of each floating-point output; missing ones are drawn, in float64, and kept there.
    """
    leaves = dict(tensors)
    for name in differentiate:
        leaves[name] = tensors[name].detach().requires_grad_()
    out = call(api, **leaves)
    if isinstance(out, Tensor):
        out = {"result": out}
    elif not isinstance(out, dict):
        out = {str(i): value for i, value in enumerate(out)}
    results = {name: value.detach() for name, value in out.items()}
    if not differentiate:
        return results
    roots = {name: value for name, value in out.items() if value.requires_grad}
    assert roots, "no output requires a gradient"
    for name, value in roots.items():
        if name not in gradients:
            generator = torch.Generator().manual_seed(len(gradients))
            gradients[name] = torch.randint(-4, 5, value.shape, generator=generator).double() / 4
    grads = torch.autograd.grad(
        list(roots.values()),
        [leaves[name] for name in differentiate],
        [grad_layout(place(gradients[name].to(value.dtype), value.device)) for name, value in roots.items()],
        materialize_grads=True,
    )
    return results | {f"grad {name}": grad for name, grad in zip(differentiate, grads, strict=True)}


def references(
    call: Call, tensors: dict[str, Tensor], differentiate: tuple[str, ...], gradients: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the reference gives in float64, and in the dtypes of the tensors. Missing gradients are drawn and kept."""
    doubles = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
    oracle = run(call, reference, doubles, differentiate, gradients)
    return oracle, run(call, reference, tensors, differentiate, gradients)


def hold(
    ours: dict[str, Tensor], eager: dict[str, Tensor], oracle: dict[str, Tensor], exact: bool = False
) -> dict[str, Tensor]:
    """Holds each result to the law, and returns them all. Integers must be equal; with `exact`, everything must."""
    assert ours.keys() == oracle.keys()
    for name, value in ours.items():
        if not value.is_floating_point():
            assert_bitwise_equal(value, oracle[name], name)
        elif exact:
            assert_bitwise_equal(value, oracle[name].to(eager[name].dtype), name)
        else:
            assert_as_accurate(value, eager[name], oracle[name], name)
    return ours


def compare(
    call: Call,
    tensors: dict[str, Tensor],
    device: torch.device,
    differentiate: tuple[str, ...] = (),
    exact: bool = False,
    gradients: dict[str, Tensor] | None = None,
    grad_layout: Callable[[Tensor], Tensor] = lambda grad: grad,
) -> dict[str, Tensor]:
    """Runs call(api, **tensors) with moe_ops and with the reference, and holds values and gradients to the law.

    exact: the case has few enough bits that every sum is exact, so results must be equal. Integers always must.
    grad_layout: how the outgoing gradients lie in memory when ours gets them.
    """
    gradients = {} if gradients is None else gradients
    oracle, eager = references(call, tensors, differentiate, gradients)
    placed = {name: place(t, device) for name, t in tensors.items()}
    ours = run(call, moe_ops, placed, differentiate, gradients, grad_layout)
    return hold(ours, eager, oracle, exact)
