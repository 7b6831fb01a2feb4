"""How a weight gradient is cut on sm_90a: which tiles a problem gets, and the walk over them."""

import ctypes
import sys
from pathlib import Path

import pytest
import torch

from cases import offsets_of, seeded
from moe_ops import _C, library

sys.path.append(str(Path(__file__).parent.parent / "bench"))
from shapes import STANDING

H100 = 132  # processors
WIDE, TALL, SQUARE = (128, 256), (256, 128), (128, 128)


def tiles(*sizes, processors=H100, **options):
    found = _C.weight_grad_tiles(processors, *sizes, **options)
    return found["n"], found["k"]


# Of w_in, whose rows of x are gathered, and of w_out, whose rows of dy are.
CHOICES = {
    "quick-fine": (TALL, WIDE),
    "mixtral-8x7b": (TALL, WIDE),
    "qwen3-30b": (TALL, WIDE),
    "qwen3-next": (TALL, WIDE),
    "deepseek-v3-ep8": (TALL, WIDE),
    "gpt-oss-20b": (TALL, WIDE),
    "sonic-7b": (TALL, WIDE),
    "sonic-30b": (TALL, WIDE),
}


@pytest.mark.parametrize("name", CHOICES)
def test_choice_for_the_standing_shapes(name):
    shape = STANDING[name]
    pre = shape.inner * (2 if shape.gated else 1)
    of_w_in = tiles(shape.experts, pre, shape.hidden, gathers_a=True)
    assert (of_w_in, tiles(shape.experts, shape.hidden, shape.inner)) == CHOICES[name]


def test_the_gathered_side_is_the_narrow_one():
    assert tiles(64, 1024, 1024) == WIDE
    assert tiles(64, 1024, 1024, gathers_a=True) == TALL


def test_narrow_sides_are_not_padded():
    assert tiles(64, 4096, 128) == TALL
    assert tiles(64, 128, 4096, gathers_a=True) == WIDE
    assert tiles(64, 128, 128) == SQUARE
    assert tiles(64, 8, 8) == SQUARE


def test_small_tiles_where_large_ones_leave_processors_idle():
    assert tiles(1, 1024, 2048, processors=64) == WIDE
    assert tiles(1, 1024, 2048, processors=128) == SQUARE


def test_predictions_are_for_these_tiles():
    from predict_sm90 import grad_tiles

    for shape in STANDING.values():
        for processors in (16, H100):
            for n, k in ((2 * shape.inner, shape.hidden), (shape.hidden, shape.inner)):
                for gathers_a in (False, True):
                    predicted = grad_tiles(processors, shape.experts, n, k, gathers_a)
                    assert predicted == tiles(shape.experts, n, k, processors=processors, gathers_a=gathers_a)


def test_what_a_block_holds():
    for sizes in ((64, 4096, 4096), (64, 128, 128)):
        found = _C.weight_grad_tiles(H100, *sizes)
        assert found["threads"] == 384
        assert (found["n"] + found["k"]) * found["depth"] * 2 * found["stages"] <= 192 << 10


@pytest.fixture(scope="module")
def walk(pytestconfig):
    """walk(counts of rows, tiles along n and k, band, blocks): [rounds, blocks, 4] as tile_walk.cpp says."""
    if pytestconfig.getoption("--device") != "simt":
        pytest.skip("the walk is device code: the emulator shows it")
    function = ctypes.CDLL(str(library.directory() / library.LIBRARIES[1])).moe_ops_simt_gradient_tiles
    function.restype = ctypes.c_int64

    def call(counts, n_tiles, k_tiles, band, blocks):
        offsets = offsets_of(counts)
        sizes = ctypes.c_void_p(offsets.data_ptr()), len(counts), ctypes.c_int64(int(offsets[-1]))
        options = n_tiles, k_tiles, band, ctypes.c_uint(blocks)
        out = torch.empty(function(*sizes, *options, None) // blocks, blocks, 4, dtype=torch.int64)
        function(*sizes, *options, ctypes.c_void_p(out.data_ptr()))
        return out

    return call


@pytest.mark.parametrize("counts", [[5], [0, 0, 3], [7, 0, 90, 7, 1, 33], list(range(70))], ids=len)
@pytest.mark.parametrize(("n_tiles", "k_tiles", "band"), [(1, 1, 8), (3, 2, 8), (5, 4, 2)])
@pytest.mark.parametrize("blocks", [1, 3, 7])
def test_walk(counts, n_tiles, k_tiles, band, blocks, walk):
    """Every tile once, most rows first; a round is dealt forwards, the next backwards."""
    found = walk(counts, n_tiles, k_tiles, band, blocks)
    found[1::2] = found[1::2].flip(1)
    met = found.flatten(0, 1).tolist()
    total = len(counts) * n_tiles * k_tiles
    assert all(tile[0] == -1 for tile in met[total:])
    met = met[:total]
    begins = [sum(counts[:expert]) for expert in range(len(counts))]
    assert all((begin, rows) == (begins[expert], counts[expert]) for expert, _, begin, rows in met)
    ranked = sorted(range(len(counts)), key=lambda expert: -counts[expert])
    each = n_tiles * k_tiles
    assert [tile[0] for tile in met] == [expert for expert in ranked for _ in range(each)]
    for first in range(0, total, each):
        within = [tile[1] for tile in met[first : first + each]]
        assert sorted(within) == list(range(each))
        side_by_side = [tile // k_tiles for tile in within[: min(band, n_tiles)]]
        assert side_by_side == list(range(min(band, n_tiles)))


def test_blocks_end_together(walk):
    """Where routing is skewed no block has more than a tile of the largest expert beyond its share."""
    counts = torch.multinomial(torch.arange(1.0, 65), 40000, True, generator=seeded()).bincount(minlength=64).tolist()
    found = walk(counts, 2, 6, 8, H100)
    rows = torch.where(found[..., 0] >= 0, found[..., 3], 0).sum(0)
    assert rows.sum() == 12 * sum(counts)
    assert rows.max() - rows.float().mean() < max(counts)
    in_order = torch.tensor(counts).repeat_interleave(12)
    in_order = torch.nn.functional.pad(in_order, (0, -len(in_order) % H100)).view(-1, H100).sum(0)
    assert rows.max() < in_order.max()
