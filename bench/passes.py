"""What a bench times: forward, forward and all gradients, one gradient, and the roof in turn with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import device
from report import Report, Variant, relative_error
from roofline import Work
from shapes import Shape

Operands = Sequence[Tensor]
Results = tuple[Tensor, ...]
Pass = Callable[[int], Results]  # of one set of operands


def forward_pass(forward: Callable[[int], Tensor]) -> Pass:
    def run(i: int) -> Results:
        with torch.no_grad():
            return (forward(i),)

    return run


def training_pass(forward: Callable[[int], Tensor], sets: Sequence[Operands], grad: Tensor) -> Pass:
    """Results and gradients: y, then one gradient for each operand of the set that asks for one."""

    def run(i: int) -> Results:
        y = forward(i)
        return (y.detach(), *torch.autograd.grad(y, [t for t in sets[i] if t.requires_grad], grad))

    return run


def gradient_pass(
    forward: Callable[[int], Tensor], sets: Sequence[Operands], operand: int, grad: Tensor
) -> Callable[[int], Tensor]:
    """The gradient of one operand alone, without the forward, whose graph is recorded once per set."""
    results: dict[int, Tensor] = {}

    def run(i: int) -> Tensor:
        if i not in results:
            for at, tensor in enumerate(sets[i]):
                tensor.requires_grad_(at == operand)
            results[i] = forward(i)
        return torch.autograd.grad(results[i], sets[i][operand], grad, retain_graph=True)[0]

    return run


def require_gradients(sets: Sequence[Operands], wanted: bool) -> None:
    for operands in sets:
        for operand in operands:
            if operand.is_floating_point():
                operand.requires_grad_(wanted)


def exact_results(forward: Callable[..., Tensor], operands: Operands, grad: Tensor, train: bool) -> Results:
    """forward in float64, and the gradients. Expert weights [E, ...] stay as they are, for forward to widen one at a
    time: a float64 copy of all may not fit in memory. Their gradients are rounded once.
    """
    wide = [t.detach().double() if t.is_floating_point() and t.dim() < 3 else t.detach() for t in operands]
    require_gradients([wide], train)
    run = (
        training_pass(lambda _: forward(*wide), [wide], grad.double())
        if train
        else forward_pass(lambda _: forward(*wide))
    )
    return run(0)


def roof_in_turn(report: Report, works: Sequence[Work], dtype: torch.dtype, sets: int) -> list[Variant]:
    """The roof that binds, as a variant of the same table: clock and bandwidth of a shared machine move within a run.
    As many multiply-adds as `works` need, in registers alone; or passes over memory that read and write as many bytes
    as each of them, in order, and compute nothing. Nothing on a GPU.
    """
    if device.on_cuda():
        return []
    from moe_ops import _C

    total, name = sum(works, Work()), str(dtype).removeprefix("torch.")
    if report.roofs.arithmetic_seconds(total, name) >= report.roofs.memory_seconds(total):
        return [Variant("same FLOPs in registers", lambda _: _C.multiply_adds(name, total.flops), None, total)]
    passes = [[_C.InOrder(int(work.read), int(work.written)) for work in works] for _ in range(sets)]

    def run(i: int) -> None:
        for each in passes[i]:
            each.run()

    return [Variant("same bytes in order", run, None, total)]


def time_both_passes(
    report: Report,
    name: str,
    shape: Shape,
    dtype: torch.dtype,
    variants: dict[str, Callable[..., Tensor]],
    sets: Sequence[Operands],
    grad: Tensor,
    *,
    exact: Callable[..., Tensor],
    work: Work,
    backward_work: Work,
    missing: dict[str, str] | None = None,
) -> None:
    """Two tables of functions of one set of operands, checked against `exact`, which computes in float64."""
    for train in (False, True):
        works = [work, backward_work] if train else [work]
        total = sum(works, Work())
        require_gradients(sets, train)
        expected = exact_results(exact, sets[0], grad, train)
        table = []
        for variant, function in variants.items():

            def forward(i: int, function: Callable[..., Tensor] = function) -> Tensor:
                return function(*sets[i])

            run = training_pass(forward, sets, grad) if train else forward_pass(forward)

            def check(results: Results, expected: Results = expected) -> float:
                return relative_error(results, expected)

            table.append(Variant(variant, run, check, total))
        table += roof_in_turn(report, works, dtype, len(sets))
        title = f"{name} forward+backward" if train else f"{name} forward"
        report.table(title, shape, dtype, table, sets=len(sets), missing=missing)
