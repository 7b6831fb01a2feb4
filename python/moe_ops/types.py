"""What the operators return and take: named tuples of tensors, which torch treats as pytrees; how a weight lies.

A *slot* is one (token, k) pair, numbered token * K + k; a *row* is a slot's place in expert order.
"""

from typing import NamedTuple

import torch


class Plan(NamedTuple):
    """Where each slot's row stands: a stable sort of the slots by expert. All tensors are int32.

    Rows of one expert keep slot order. Dropped slots (capacity, ids outside 0..E-1) sort behind offsets[E], in slot
    order. For token choice R = T * K and width = K; other routings may have any R: row_slot then numbers slots of
    slot_row's own width.

    Attributes:
        offsets: [E + 1], exclusive prefix: the rows of expert e are offsets[e] .. offsets[e + 1].
        row_slot: [R], the slot of each row.
        slot_row: [T, width], the row of each slot, -1 where it was dropped.
        counts: [E], rows per expert after drops.
    """

    offsets: torch.Tensor
    row_slot: torch.Tensor
    slot_row: torch.Tensor
    counts: torch.Tensor

    @property
    def row_token(self) -> torch.Tensor:
        """[R], the token of each row."""
        return self.row_slot // max(self.slot_row.shape[1], 1)


class ExpertParallelPlan(NamedTuple):
    """Where the rows of a dispatch over a process group stand, here and on the way back.

    N tokens have come to this rank, each once; E_local experts are its own.

    Attributes:
        offsets: [E_local + 1] int32, exclusive prefix: the rows of local expert e are offsets[e] .. offsets[e + 1].
        counts: [E_local] int32, rows per local expert after drops.
        received: the Plan of the N tokens that came: slot_row [N, K], row_slot [R].
        sent: the Plan of this rank's tokens over ranks: slot_row [T, K], row_slot [S]; one row per token and rank.
        weights: [N, K] float32 or float64, the received tokens' weights, where dispatch was given any.
        dropped: [] int64, rows of this rank that did not fit in a bounded exchange; 0 in an exact one.
        send, receive: rows to and from each rank.
        group, rank, world: the name of the process group, this rank in it, and its size.
        name: of the layer, in errors.
    """

    offsets: torch.Tensor
    counts: torch.Tensor
    received: Plan
    sent: Plan
    weights: torch.Tensor | None
    dropped: torch.Tensor
    send: list[int]
    receive: list[int]
    group: str
    rank: int
    world: int
    name: str | None


class RouteResult(NamedTuple):
    """What route returns with stats=True. Real tensors are float32, or float64 for float64 logits.

    Attributes:
        weights: [T, K], the weight of each choice.
        experts: [T, K] int32, the chosen experts, best first, distinct within a row.
        counts: [S, E] int32, how many slots of a segment chose an expert, before any drop.
        mean_prob: [S, E], the mean over a segment's tokens of the router's probabilities; 0 for an empty segment.
        logsumexp: [T], logsumexp of the (soft-capped) logits.
    """

    weights: torch.Tensor
    experts: torch.Tensor
    counts: torch.Tensor
    mean_prob: torch.Tensor
    logsumexp: torch.Tensor


class NoisyRouteResult(NamedTuple):
    """RouteResult and the smooth load of `nn.NoisyTopKRouter`.

    Attributes:
        weights, experts, counts, mean_prob, logsumexp: as in RouteResult.
        load: [E], how many tokens an expert gets, expected over the noise (Shazeer et al. 2017, equation 10); without
            noise the counts, which have no gradient.
    """

    weights: torch.Tensor
    experts: torch.Tensor
    counts: torch.Tensor
    mean_prob: torch.Tensor
    logsumexp: torch.Tensor
    load: torch.Tensor


class PackedWeight(NamedTuple):
    """An expert weight [E, N, K] packed by moe_ops.prepack, for grouped_gemm and moe_mlp without gradients.

    The layout is the same for every instruction set of the CPU, so that a PackedWeight can be kept in a file.

    Attributes:
        panels: [E, panels, steps, columns, values]: a panel holds 32 (float64: 16) of the N rows, a step one value of
            each along K (bfloat16 and float16: two). N and K are filled up with zeros.
        stand_in: [E, N, K], one element expanded: the weight's shape, dtype and device without its values.
    """

    panels: torch.Tensor
    stand_in: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        """[E, N, K]."""
        return self.stand_in.shape

    @property
    def dtype(self) -> torch.dtype:
        """What products are formed in: the dtype of the rows it multiplies."""
        return self.panels.dtype

    @property
    def device(self) -> torch.device:
        return self.panels.device

    @property
    def nbytes(self) -> int:
        """Memory: that of E, N and K with N rounded up to 32 (float64: 16), and K to 2 in bfloat16 and float16."""
        return self.panels.nbytes

    def __repr__(self) -> str:
        return f"PackedWeight({list(self.shape)}, {str(self.dtype).removeprefix('torch.')}, {self.nbytes} bytes)"

    def unpack(self) -> torch.Tensor:
        """The weight [E, N, K] again, contiguous; its bits are those that were packed."""
        _, n, k = self.shape
        values = self.panels.transpose(2, 3).flatten(1, 2).flatten(2)  # [E, N, K] with the zeros
        return values[:, :n, :k].contiguous()


def lies_transposed(w: torch.Tensor) -> bool:
    """Whether an expert weight [E, N, K] lies in memory as [E, K, N], without gaps.

    So does its gradient then: a parameter keeps it in its own layout, and a copy takes longer than the product. Fakes
    foretell with it what lies_transposed of csrc/ops/gemm_operands.h decides.
    """
    experts, n, k = w.shape
    return n > 1 and k > 1 and w.stride(1) == 1 and w.stride(2) == n and (experts < 2 or w.stride(0) == n * k)
