"""Trains a small character-level MoE transformer on the language reference that comes with every CPython.

    python examples/train_tiny_lm.py                                      # 200 steps, a minute or two on two cores
    python examples/train_tiny_lm.py --balance none --plot none.png       # what happens without balancing
    python examples/train_tiny_lm.py --experts-impl naive                 # plain PyTorch: the same curve to rounding

The experts spread over two processes, the same curve; a rank is killed, and training goes on without it:

    torchrun --nproc-per-node 2 examples/train_tiny_lm.py --ep 2
    torchrun --nproc-per-node 2 examples/train_tiny_lm.py --ep 2 --checkpoint saved --kill-rank-at 57
    python examples/train_tiny_lm.py --checkpoint saved --resume          # or torchrun with another number of ranks

The last line printed is the loss of the last step. After a hundred steps or so rounding may send a token to another
expert; from there on the curves of two implementations differ in the third decimal.
"""

from __future__ import annotations

import argparse
import math
import os
import pydoc_data.topics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe_ops
from moe_ops import RouteResult
from parallel import Checkpoints, Ranks


def rotate(x: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021): pair i of x [batch, heads, length, size] turns by position/1000^(2i/size)."""
    length, size = x.shape[-2:]
    angle = torch.arange(length)[:, None] * 1000 ** (-torch.arange(0, size, 2) / size)  # [length, size / 2]
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1)


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, hidden // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [batch, heads, length, hidden / heads] each
        y = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, length, hidden))


class Block(nn.Module):
    """x + attention(norm(x)), then x + MoE(norm(x))."""

    def __init__(self, args: argparse.Namespace, mesh: Any, name: str) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(args.hidden)
        self.attention = Attention(args.hidden, args.heads)
        self.moe_norm = nn.RMSNorm(args.hidden)
        router: dict[str, Any] = {"renormalize": True}
        if args.balance == "bias":
            router |= {"score": "sigmoid", "correction_bias": True}
        options: dict[str, Any] = {"router": router, "impl": args.experts_impl}
        if mesh is not None:
            options |= {"mesh": mesh, "mode": args.ep_mode, "chunks": args.ep_chunks, "name": name}
        self.moe = moe_ops.nn.MoE(args.hidden, args.inner, args.experts, args.top_k, **options)

    def forward(self, x: Tensor) -> tuple[Tensor, RouteResult]:
        x = x + self.attention(self.attention_norm(x))
        y, route = self.moe(self.moe_norm(x), return_route=True)
        return x + y, route


class LanguageModel(nn.Module):
    """Characters [batch, length] to logits [batch, length, characters], and every block's routing."""

    def __init__(self, characters: int, args: argparse.Namespace, mesh: Any = None) -> None:
        super().__init__()
        self.characters = nn.Embedding(characters, args.hidden)
        self.blocks = nn.ModuleList(Block(args, mesh, f"blocks.{i}.moe") for i in range(args.layers))
        self.norm = nn.RMSNorm(args.hidden)
        self.head = nn.Linear(args.hidden, characters, bias=False)
        nn.init.normal_(self.characters.weight, std=0.1)

    def forward(self, ids: Tensor) -> tuple[Tensor, list[RouteResult]]:
        x = self.characters(ids)
        routes = []
        for block in self.blocks:
            x, route = block(x)
            routes.append(route)
        return self.head(self.norm(x)), routes


class Text(NamedTuple):
    """The training text as one tensor of character ids, and the characters they stand for."""

    ids: Tensor
    alphabet: str

    @classmethod
    def load(cls) -> Text:
        text = "\n\n".join(pydoc_data.topics.topics.values())
        alphabet = "".join(sorted(set(text)))
        number = {character: i for i, character in enumerate(alphabet)}
        return cls(torch.tensor([number[character] for character in text]), alphabet)

    def batch(self, size: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random windows and the same windows one character later, both [size, length]."""
        start = torch.randint(len(self.ids) - length, (size, 1), generator=generator)
        window = self.ids[start + torch.arange(length + 1)]
        return window[:, :-1], window[:, 1:]


class Step(NamedTuple):
    """What one training step reports."""

    number: int  # from 1
    loss: float
    tokens_per_second: float
    load: Tensor  # [layers, experts], 1 where an expert gets its even share of the slots


def train(model: LanguageModel, text: Text, args: argparse.Namespace, ranks: Ranks | None = None) -> Iterator[Step]:
    """Runs the steps, with the balancing that args.balance asks for; ranks share the batches."""
    ranks = ranks or Ranks()
    generator = torch.Generator().manual_seed(args.seed)
    routers = [module for module in model.modules() if isinstance(module, moe_ops.nn.Router)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01)

    def rate(step: int) -> float:
        """A short warm-up, then half a cosine down to a tenth."""
        return min(1.0, (step + 1) / 20) * (0.55 + 0.45 * math.cos(math.pi * step / args.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    checkpoints = Checkpoints(args.checkpoint, model, optimizer, schedule) if args.checkpoint else None
    first = checkpoints.load(generator) if checkpoints and args.resume else 0
    if first >= args.steps:
        raise SystemExit(f"--resume: {args.checkpoint} holds step {first}, nothing is left of --steps {args.steps}")
    parallel = ranks.wrap(model)
    for step in range(first + 1, args.steps + 1):
        if step == args.kill_rank_at:
            ranks.kill_last()
        started = time.perf_counter()
        inputs, targets = text.batch(args.batch, args.context, generator)
        logits, routes = parallel(ranks.share(inputs))
        loss = F.cross_entropy(logits.flatten(0, 1), ranks.share(targets).flatten())
        total = loss
        if args.balance == "aux":
            balance = (moe_ops.losses.load_balancing(r, alpha=args.aux_alpha, group=ranks.group) for r in routes)
            total = loss + sum(balance)
        optimizer.zero_grad()
        total.backward()
        moe_ops.expert_parallel.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        counts = ranks.total(torch.cat([route.counts for route in routes]))  # [layers, experts]
        if args.balance == "bias":
            for router, its in zip(routers, counts, strict=True):
                router.update_bias(its, args.bias_rate)
        load = counts / counts.float().mean(1, keepdim=True)
        loss = ranks.total(loss) / ranks.world
        yield Step(step, loss.item(), inputs.numel() / (time.perf_counter() - started), load)
        if checkpoints and step % args.save_every == 0:
            checkpoints.save(step, generator)


def bars(load: Tensor) -> str:
    """A bar per expert, the layers apart; full height is twice the even share, a dot is an expert without tokens."""
    heights = "·▁▂▃▄▅▆▇█"
    return " ".join("".join(heights[min(8, math.ceil(4 * share))] for share in layer) for layer in load.tolist())


Report = Callable[[Step], None]


@contextmanager
def progress(steps: int) -> Iterator[Report]:
    """A progress bar where rich is installed and someone is looking, plain lines otherwise."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    except ModuleNotFoundError:
        console = None
    else:
        console = Console()

    if console is None or not console.is_terminal:

        def lines(result: Step) -> None:
            step = result.number
            if step % 10 == 0 or step == steps:
                speed = f"{result.tokens_per_second:7.0f} tokens/s"
                print(f"step {step:4d}/{steps}  loss {result.loss:.4f}  {speed}  load {bars(result.load)}", flush=True)

        yield lines
        return

    columns = (
        MofNCompleteColumn(),
        BarColumn(bar_width=8),
        TextColumn("loss [bold]{task.fields[loss]:.4f}[/]  {task.fields[speed]:.0f} tokens/s  {task.fields[load]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("train", total=steps, loss=math.nan, speed=0.0, load="")

        def update(result: Step) -> None:
            speed = result.tokens_per_second
            bar.update(task, completed=result.number, loss=result.loss, speed=speed, load=bars(result.load))

        yield update


def plot(history: list[Step], args: argparse.Namespace) -> None:
    """The loss above, the load of every expert of every layer below, over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(9, 7), layout="constrained")
    above.plot([step.number for step in history], [step.loss for step in history])
    above.set(ylabel="loss (nats per character)", title=f"balance: {args.balance}, final loss {history[-1].loss:.4f}")
    above.grid(alpha=0.3)
    load = torch.stack([step.load.flatten() for step in history], dim=1).numpy()  # [layers * experts, steps]
    extent = (history[0].number - 0.5, history[-1].number + 0.5, len(load) - 0.5, -0.5)
    image = below.imshow(load, aspect="auto", interpolation="nearest", cmap="RdBu_r", vmin=0, vmax=2, extent=extent)
    for layer in range(1, args.layers):
        below.axhline(layer * args.experts - 0.5, color="black", linewidth=1)
    ticks = [(layer + 0.5) * args.experts - 0.5 for layer in range(args.layers)]
    below.set_yticks(ticks, [f"layer {layer}" for layer in range(args.layers)])
    below.set(xlabel="step", title="load per expert")
    figure.colorbar(image, ax=below, extend="max", label="1 is an even share")
    figure.savefig(args.plot, dpi=120)


@torch.no_grad()
def sample(model: LanguageModel, text: Text, length: int, args: argparse.Namespace) -> str:
    """What the model writes after a blank line."""
    generator = torch.Generator().manual_seed(args.seed)
    ids = torch.full((1, 1), text.alphabet.index("\n"))
    for _ in range(length):
        logits, _ = model.eval()(ids[:, -args.context :])
        ids = torch.cat([ids, torch.multinomial(logits[:, -1].softmax(-1), 1, generator=generator)], dim=1)
    return "".join(text.alphabet[i] for i in ids[0, 1:].tolist())


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options; arguments is the command line by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--steps", type=int, default=200)
    add("--seed", type=int, default=0)
    add("--balance", choices=("none", "aux", "bias"), default="aux", help="loss-balancing method (default: aux)")
    add("--experts-impl", choices=("moe_ops", "naive"), default="moe_ops", help="fused operators or plain PyTorch")
    add("--plot", metavar="FILE.png", help="draw the loss and the load per expert (needs matplotlib)")
    add("--sample", type=int, default=0, metavar="N", help="print N characters that the trained model writes")
    add("--layers", type=int, default=4)
    add("--hidden", type=int, default=128)
    add("--heads", type=int, default=4)
    add("--inner", type=int, default=128, help="inner size of one expert")
    add("--experts", type=int, default=8)
    add("--top-k", type=int, default=2)
    add("--context", type=int, default=128, help="characters per window")
    add("--batch", type=int, default=16, help="windows per step")
    add("--lr", type=float, default=3e-3)
    add("--aux-alpha", type=float, default=0.01, help="factor of the load-balancing loss (Fedus et al. 2022)")
    add("--bias-rate", type=float, default=0.003, help="step of the loss-free bias update (Wang et al. 2024)")
    add = parser.add_argument_group("experts spread over processes, under torchrun").add_argument
    add("--ep", type=int, default=0, metavar="N", help="spread the experts over all N processes of torchrun")
    add("--ep-mode", choices=("exact", "bounded"), default="exact")
    add("--ep-chunks", type=int, default=1, help="parts of a batch whose exchange and products overlap")
    add("--timeout", type=float, default=30.0, help="seconds after which a rank that hangs is an error")
    add("--checkpoint", metavar="FOLDER", help="save there every --save-every steps")
    add("--save-every", type=int, default=10, metavar="STEPS")
    add("--resume", action="store_true", help="go on from the newest checkpoint, with any number of ranks")
    add("--kill-rank-at", type=int, default=0, metavar="STEP", help="the last rank dies before this step")
    args = parser.parse_args(arguments)
    if args.steps < 1:
        parser.error(f"argument --steps: expected at least 1, got {args.steps}")
    world = int(os.environ.get("WORLD_SIZE", "0"))
    if args.ep != world and (args.ep or world > 1):
        parser.error(f"argument --ep: expected the number of processes of torchrun ({world}), got {args.ep}")
    if args.batch % max(args.ep, 1):
        parser.error(f"argument --batch: expected a multiple of --ep ({args.ep}), got {args.batch}")
    if args.kill_rank_at and args.ep < 2:
        parser.error(f"argument --kill-rank-at: needs --ep of at least 2, got {args.ep}")
    if args.resume and not args.checkpoint:
        parser.error("argument --resume: needs --checkpoint FOLDER")
    if args.plot and find_spec("matplotlib") is None:
        parser.error("argument --plot: needs matplotlib: pip install matplotlib")
    return args


def main() -> None:
    args = parse()
    torch.manual_seed(args.seed)
    text = Text.load()
    ranks = Ranks(args.ep, args.timeout)
    model = LanguageModel(len(text.alphabet), args, ranks.mesh)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    history: list[Step] = []
    if ranks.rank == 0:
        print(f"{len(text.ids)} characters, {len(text.alphabet)} distinct; {parameters} parameters", flush=True)
    with progress(args.steps) if ranks.rank == 0 else nullcontext(history.count) as report:
        started = time.perf_counter()
        try:
            for result in train(model, text, args, ranks):
                history.append(result)
                report(result)
                started = time.perf_counter()
        except RuntimeError as error:
            if ranks.world == 1:
                raise
            seconds = time.perf_counter() - started
            print(f"rank {ranks.rank}, {seconds:.2f} s after its last step: {error}", file=sys.stderr, flush=True)
            os._exit(1)  # the others are gone: nothing is left to be agreed on
    written = sample(model, text, args.sample, args) if args.sample else ""
    if ranks.rank == 0:
        if args.plot:
            plot(history, args)
        if args.sample:
            print(written)
        print(f"final loss: {history[-1].loss:.4f}")
    ranks.exit()


if __name__ == "__main__":
    main()
