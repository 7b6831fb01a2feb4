"""RouterHealth as text and as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_ops.monitor.layer import LayerSummary

if TYPE_CHECKING:
    from moe_ops.monitor.health import RouterHealth

HEIGHTS = "·▁▂▃▄▅▆▇█"
WIDEST = 32  # experts that are drawn one by one


def bars(load: list[float]) -> str:
    """A bar per expert, full at twice the even share, a dot where it got nothing; many are ranked and thinned."""
    if len(load) > WIDEST:
        ranked = sorted(load, reverse=True)
        load = [ranked[i * len(ranked) // WIDEST] for i in range(WIDEST - 1)] + ranked[-1:]
    return "".join(HEIGHTS[0 if share == 0 else min(8, max(1, round(4 * share)))] for share in load)


def table(summaries: dict[str, LayerSummary]) -> str:
    """A line per layer: see LayerSummary for what the columns mean."""
    head = ("layer", "tokens", "max/mean", "entropy", "dead", "dropped", "logits rms", "max", "load")
    rows = [
        (
            name, str(s.tokens), f"{s.max_over_mean:.2f}", f"{s.entropy:.3f}", f"{s.dead}/{len(s.load)}",
            f"{100 * s.dropped:.1f} %", f"{s.logsumexp_rms:.2f}", f"{s.logsumexp_max:.2f}", bars(s.load),
        )
        for name, s in summaries.items()
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    text = [[head[0].ljust(widths[0]), *(h.rjust(w) for h, w in zip(head[1:-1], widths[1:-1], strict=True)), head[-1]]]
    for row in rows:
        middle = (cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True))
        text.append([row[0].ljust(widths[0]), *middle, row[-1]])
    return "\n".join("  ".join(line) for line in text)


def plot(health: RouterHealth, file: str) -> None:
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ImportError("RouterHealth.plot: needs matplotlib: pip install matplotlib") from None
    layers = health.whole()
    if not layers:
        raise ValueError("RouterHealth.plot: nothing was counted yet")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = 2 + bool(health.classes)
    size = (4.5 * columns, 1 + 2.2 * len(layers))
    figure, axes = plt.subplots(len(layers), columns, figsize=size, layout="constrained", squeeze=False)
    for row, name in zip(axes, layers, strict=True):
        counts = health.history(name).double().cpu()  # [steps, E]
        load = counts / counts.mean(1, keepdim=True).clamp(min=1e-9)
        image = row[0].imshow(load.T.numpy(), aspect="auto", interpolation="nearest", cmap="RdBu_r", vmin=0, vmax=2)
        row[0].set(title=name, xlabel="step", ylabel="expert")
        figure.colorbar(image, ax=row[0], extend="max", label="load")
        row[1].plot(load.amax(1).numpy())
        row[1].axhline(1, color="black", linewidth=0.5)
        row[1].set(title="max / mean", xlabel="step")
        if health.classes:
            preference(figure, row[2], health, name)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def preference(figure: Any, axis: Any, health: RouterHealth, name: str) -> None:
    """Which experts a class goes to, over what all tokens do."""
    share = health.specialisation(name)
    counts = health.whole()[name].by_class.sum(0).double().cpu()
    lift = share / (counts / counts.sum().clamp(min=1)).clamp(min=1e-9)
    image = axis.imshow(lift.numpy(), aspect="auto", interpolation="nearest", cmap="PuOr_r", vmin=0, vmax=2)
    axis.set_yticks(range(len(health.classes)), health.classes)
    axis.set(title="share over mean share", xlabel="expert")
    figure.colorbar(image, ax=axis, extend="max")
