"""Three experiments on a character-level MoE transformer and real text, minutes each on two cores.

    python examples/experiments.py collapse --plot collapse.png        # without balancing, and its two cures
    python examples/experiments.py dense --plot dense.png              # against dense models
    python examples/experiments.py specialise --plot specialise.png    # what the experts prefer

What was seen, and on what, stands in examples/EXPERIMENTS.md. The text is the language reference that comes with every
CPython: nine tenths are trained on, losses are those of the last tenth.
"""

from __future__ import annotations

import argparse
import string
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import moe_ops
from train_tiny_lm import LanguageModel, Step, Text, parse, train

SIZES = ["--layers", "2", "--hidden", "64", "--heads", "4", "--inner", "64", "--context", "64", "--batch", "16"]
CLASSES = ("lower", "upper", "digit", "space", "newline", "punctuation")


class Run(NamedTuple):
    """A trained model, what its steps reported, and its loss on text it never saw."""

    model: LanguageModel
    history: list[Step]
    held_out: float

    def load(self, last: int = 20) -> Tensor:
        """[layers, experts] over the last steps, 1 at an even share."""
        return torch.stack([step.load for step in self.history[-last:]]).mean(0)


def split() -> tuple[Text, Text]:
    text = Text.load()
    cut = len(text.ids) * 9 // 10
    return Text(text.ids[:cut], text.alphabet), Text(text.ids[cut:], text.alphabet)


@torch.no_grad()
def evaluate(model: LanguageModel, text: Text, args: argparse.Namespace, batches: int = 20) -> float:
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(batches):
        inputs, targets = text.batch(args.batch, args.context, generator)
        losses.append(F.cross_entropy(model(inputs)[0].flatten(0, 1), targets.flatten()).item())
    return sum(losses) / len(losses)


def run(name: str, options: argparse.Namespace, **changes: Any) -> Run:
    """Trains one model of SIZES, 8 experts of which 2 are chosen, but for the changes."""
    args = parse([*SIZES, "--steps", str(options.steps), "--seed", str(options.seed)])
    vars(args).update(changes)
    train_text, held_out = split()
    torch.manual_seed(args.seed)
    model = LanguageModel(len(train_text.alphabet), args)
    history = list(train(model, train_text, args))
    loss = evaluate(model.eval(), held_out, args)
    seconds = sum(args.batch * args.context / step.tokens_per_second for step in history)
    print(f"{name:<24} held-out loss {loss:.4f}  ({seconds:.0f} s of training)", flush=True)
    return Run(model, history, loss)


def entropy(load: Tensor) -> Tensor:
    """Of every layer, 1 where all experts get the same."""
    share = load / load.sum(-1, keepdim=True)
    return -torch.special.xlogy(share, share).sum(-1) / torch.log(torch.tensor(float(load.shape[-1])))


def collapse(options: argparse.Namespace) -> None:
    # Many small experts and a high learning rate: the first to learn something get all the tokens.
    harsh = {} if options.mild else {"experts": 32, "inner": 16, "lr": 1e-2}
    methods = ("none", "aux", "bias")
    runs = {balance: run(f"balance {balance}", options, balance=balance, **harsh) for balance in methods}
    print(f"{'balance':<8} {'held-out':>8} {'max/mean':>8} {'entropy':>8} {'below a tenth':>13}   (last 20 steps)")
    for name, each in runs.items():
        load = each.load()
        starved = f"{int((load < 0.1).sum())}/{load.numel()}"
        worst, even = load.amax(-1).mean(), entropy(load).mean()
        print(f"{name:<8} {each.held_out:8.4f} {worst:8.2f} {even:8.3f} {starved:>13}")
    if options.plot:
        figure, axes = figure_of(2, 3)
        for (name, each), (above, below) in zip(runs.items(), axes.T, strict=True):
            load = torch.stack([step.load.flatten() for step in each.history], dim=1)  # [layers * experts, steps]
            above.imshow(load.numpy(), aspect="auto", interpolation="nearest", cmap="RdBu_r", vmin=0, vmax=2)
            above.set(title=f"balance: {name}", ylabel="layer, expert")
            below.plot([step.load.amax(-1).mean() for step in each.history])
            below.set(xlabel="step", ylabel="max / mean load", ylim=(0, None))
            below.axhline(1, color="black", linewidth=0.5)
        figure.savefig(options.plot, dpi=100)


def dense(options: argparse.Namespace) -> None:
    moe = parse(SIZES)
    active, total = moe.top_k * moe.inner, moe.experts * moe.inner
    runs = {
        f"MoE, {moe.top_k} of {moe.experts} experts": run("MoE", options, balance="aux"),
        "dense, same active": run("dense, same active", options, balance="none", experts=1, top_k=1, inner=active),
        "dense, same total": run("dense, same total", options, balance="none", experts=1, top_k=1, inner=total),
    }
    for name, each in runs.items():
        parameters = sum(p.numel() for p in each.model.parameters())
        layer = each.model.blocks[0].moe.experts
        used = parameters - len(each.model.blocks) * (layer.num_experts - each.model.blocks[0].moe.router.top_k) * (
            layer.w_in[0].numel() + layer.w_out[0].numel()
        )
        print(f"{name:<24} {parameters / 1e6:.2f}M parameters, {used / 1e6:.2f}M active: {each.held_out:.4f}")
    if options.plot:
        figure, ((axis,),) = figure_of(1, 1)
        for name, each in runs.items():
            losses = torch.tensor([step.loss for step in each.history])
            smooth = losses.unfold(0, min(10, len(losses)), 1).mean(1)
            axis.plot(smooth, label=f"{name}, held out {each.held_out:.3f}")
        axis.set(xlabel="step", ylabel="training loss (nats per character, mean of 10)", ylim=(None, 3.2))
        axis.legend()
        figure.savefig(options.plot, dpi=100)


def class_of(alphabet: str) -> Tensor:
    """[characters], which of CLASSES each belongs to."""
    groups = (string.ascii_lowercase, string.ascii_uppercase, string.digits, " ", "\n")
    return torch.tensor([next((i for i, group in enumerate(groups) if c in group), 5) for c in alphabet])


def information(counts: Tensor) -> float:
    """How much of the entropy of a token's class its expert tells, from counts [classes, experts]."""
    joint = counts.double() / counts.sum()
    of_class, of_expert = joint.sum(1, keepdim=True), joint.sum(0, keepdim=True)
    mutual = torch.special.xlogy(joint, joint) - torch.special.xlogy(joint, of_class * of_expert)
    return float(mutual.sum() / -torch.special.xlogy(of_class, of_class).sum())


@torch.no_grad()
def watch(each: Run, text: Text, shuffled: bool) -> moe_ops.RouterHealth:
    """The model over held-out text, the classes of its characters kept apart; or classes dealt out at random."""
    health = moe_ops.RouterHealth(each.model, classes=CLASSES)
    generator = torch.Generator().manual_seed(2)
    classes = class_of(text.alphabet)
    for _ in range(10):
        inputs, _ = text.batch(16, 128, generator)
        ids = classes[inputs].flatten()
        with health.token_classes(ids[torch.randperm(len(ids), generator=generator)] if shuffled else ids):
            each.model(inputs)
        health.step()
    health.detach()
    return health


def specialise(options: argparse.Namespace) -> None:
    each = run("balance aux", options, balance="aux")
    _, text = split()
    health, chance = watch(each, text, shuffled=False), watch(each, text, shuffled=True)
    print(health.table())
    for name, layer in health.layers.items():
        told, luck = information(layer.by_class), information(chance.layers[name].by_class)
        print(f"{name}: an expert tells {100 * told:.1f} % of a character's class ({100 * luck:.1f} % by chance)")
        lift = health.specialisation(name) * layer.num_experts
        for class_name, row in zip(CLASSES, lift, strict=True):
            best = int(row.argmax())
            print(f"    {class_name:<12} most to expert {best}: {row[best]:.1f} times an even share")
    if options.plot:
        health.plot(options.plot)


def figure_of(rows: int, columns: int) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (1 + 4 * columns, 1 + 3.5 * rows)
    return plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)


def main() -> None:
    experiments = {"collapse": collapse, "dense": dense, "specialise": specialise}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=experiments)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mild", action="store_true", help="collapse: 8 experts and train_tiny_lm's learning rate")
    parser.add_argument("--plot", metavar="FILE.png", help="needs matplotlib")
    options = parser.parse_args()
    experiments[options.experiment](options)


if __name__ == "__main__":
    main()
