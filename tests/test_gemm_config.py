"""How a grouped GEMM on CUDA is cut: which tiles a problem gets, and the walk over them."""

import ctypes
import sys
from pathlib import Path

import pytest
import torch

from cases import seeded
from moe_ops import _C, library

sys.path.append(str(Path(__file__).parent.parent / "bench"))
from shapes import STANDING

A100, H100 = 108, 132  # processors
SMALL, LARGE = 64, 128  # rows of a tile


def tiles(processors, dtype="bfloat16", rows=65536, experts=128, n=1536, **options):
    return _C.gemm_tiles(processors, dtype, rows, experts, n, **options)


# Of w_in and w_out, on an A100 and on an H100. One token has fewer rows than get tiles at all, unless batch invariance
# wants them.
CHOICES = {
    "quick-wide": [(SMALL, SMALL), (LARGE, SMALL)],
    "quick-fine": [(SMALL, SMALL), (SMALL, SMALL)],
    "one-token": [(SMALL, SMALL), (SMALL, SMALL)],
    "mixtral-slice": [(SMALL, LARGE), (SMALL, LARGE)],
    "mixtral-decode": [(SMALL, SMALL), (SMALL, SMALL)],
    "qwen3-slice": [(SMALL, SMALL), (SMALL, LARGE)],
    "qwen3-512": [(SMALL, SMALL), (SMALL, SMALL)],
    "deepseek-slice": [(SMALL, SMALL), (SMALL, SMALL)],
    "switch-base-8": [(LARGE, LARGE), (SMALL, SMALL)],
    "odd": [(LARGE, SMALL), (LARGE, SMALL)],
    "mixtral-8x7b": [(LARGE, LARGE), (LARGE, LARGE)],
    "qwen3-30b": [(LARGE, LARGE), (LARGE, LARGE)],
    "qwen3-30b-decode": [(SMALL, SMALL), (SMALL, SMALL)],
    "qwen3-next": [(SMALL, SMALL), (SMALL, SMALL)],
    "deepseek-v3-ep8": [(LARGE, LARGE), (LARGE, LARGE)],
    "gpt-oss-20b": [(LARGE, LARGE), (LARGE, LARGE)],
    "olmoe": [(LARGE, LARGE), (LARGE, LARGE)],
    "quick-decode": [(SMALL, SMALL), (SMALL, SMALL)],
    "qwen3-decode": [(SMALL, SMALL), (SMALL, SMALL)],
    "sonic-7b": [(LARGE, LARGE), (LARGE, LARGE)],
    "sonic-30b": [(LARGE, LARGE), (LARGE, LARGE)],
    "qwen3-30b-train": [(LARGE, LARGE), (LARGE, LARGE)],
    "mixtral-8x7b-prefill": [(LARGE, LARGE), (LARGE, LARGE)],
    "gpt-oss-20b-prefill": [(LARGE, LARGE), (LARGE, LARGE)],
    "mixtral-8x7b-decode": [(SMALL, SMALL), (SMALL, SMALL)],
}


@pytest.mark.parametrize("name", STANDING)
def test_choice_for_the_standing_shapes(name):
    shape = STANDING[name]
    widths = shape.inner * (2 if shape.gated else 1), shape.hidden
    for processors, expected in zip((A100, H100), CHOICES[name], strict=True):
        chosen = tuple(tiles(processors, rows=shape.rows, experts=shape.experts, n=n)["rows"] for n in widths)
        assert chosen == expected


def test_choice_by_dtype_and_operands():
    assert tiles(A100, "float16") == tiles(A100, "bfloat16")
    assert tiles(A100, direct=False)["rows"] == SMALL
    exact = tiles(A100, "float32")
    assert not exact["tensor_cores"]
    assert tiles(A100, "float32", allow_tf32=True)["tensor_cores"]
    assert tiles(A100, "float32", allow_tf32=True, direct=False) == exact
    assert tiles(A100, "bfloat16", allow_tf32=True) == tiles(A100, "bfloat16")
    with pytest.raises(ValueError, match="dtype must be float32, bfloat16 or float16, got float64"):
        tiles(A100, "float64")


@pytest.mark.parametrize("processors", [16, A100, H100])
def test_large_tiles_from_96_rows_per_expert_on(processors):
    """Where there are many tiles of either kind."""
    assert tiles(processors, rows=95 * 1024, experts=1024, n=8192)["rows"] == SMALL
    assert tiles(processors, rows=98 * 1024, experts=1024, n=8192)["rows"] == LARGE


def test_no_processor_multiplies_two_large_tiles_while_others_have_none():
    """One tile more than there are processors: three turns of small tiles cost less than two of large ones."""
    full = H100 - 1  # and one half, behind the last row
    assert tiles(H100, rows=full * LARGE, experts=1, n=128)["rows"] == LARGE
    assert tiles(H100, rows=(full + 1) * LARGE, experts=1, n=128)["rows"] == SMALL


# Columns of a tile on an H100, 256 where two warpgroups share it and 128 where they take turns: of w_in, of w_out, and
# of the first GEMM of the backward pass.
HOPPER_CHOICES = {
    "quick-fine": (128, 256, 128),
    "mixtral-slice": (256, 128, 128),
    "qwen3-slice": (128, 256, 128),
    "mixtral-8x7b": (256, 256, 256),
    "qwen3-30b": (256, 256, 128),
    "qwen3-next": (256, 256, 128),
    "deepseek-v3-ep8": (256, 256, 256),
    "gpt-oss-20b": (256, 256, 128),
    "sonic-7b": (256, 128, 128),
    "sonic-30b": (256, 256, 256),
    "mixtral-8x7b-prefill": (256, 256, 256),
}


def on_hopper(shape, processors=H100):
    pre = shape.inner * (2 if shape.gated else 1)
    gemms = [
        (pre, shape.hidden, "activate"),
        (shape.hidden, shape.inner, "store"),
        (shape.inner, shape.hidden, "activate_backward"),
    ]
    sizes = {"rows": shape.rows, "experts": shape.experts, "arch": 90}
    return [(n, k, epilogue, tiles(processors, n=n, k=k, epilogue=epilogue, **sizes)) for n, k, epilogue in gemms]


@pytest.mark.parametrize("name", HOPPER_CHOICES)
def test_choice_on_hopper(name):
    """Where the products of a tile take long, consumers share it, as that fetches less for a product; where its
    epilogue does, they take turns, so that it is hidden."""
    chosen = [each for *_, each in on_hopper(STANDING[name])]
    assert tuple(each["cols"] for each in chosen) == HOPPER_CHOICES[name]
    assert all(each["rows"] == 128 and each["depth"] == 64 for each in chosen)


def test_predictions_on_hopper_are_for_these_tiles():
    from predict_sm90 import takes_turns

    for shape in STANDING.values():
        for processors in (16, H100):
            for n, k, epilogue, chosen in on_hopper(shape, processors):
                turns = takes_turns(processors, shape.rows, shape.experts, n, k, epilogue)
                assert turns == (chosen["cols"] == 128), (shape.name, n, k, epilogue)


def test_epilogues_by_name():
    with pytest.raises(ValueError, match="epilogue must be store, activate or activate_backward, got add"):
        tiles(H100, arch=90, k=64, epilogue="add")
    with pytest.raises(ValueError, match="epilogue must be"):
        tiles(H100, epilogue="add")


# Experts have two tiles of rows and more, so that neighbouring blocks multiply the same weights.
FETCH_FOR_ONE_ANOTHER = {
    "mixtral-8x7b",
    "qwen3-30b",
    "deepseek-v3-ep8",
    "gpt-oss-20b",
    "olmoe",
    "sonic-7b",
    "sonic-30b",
    "qwen3-30b-train",
    "mixtral-8x7b-prefill",
    "gpt-oss-20b-prefill",
}


@pytest.mark.parametrize("name", STANDING)
def test_clusters_on_hopper(name):
    shape = STANDING[name]
    sizes = {"rows": shape.rows, "experts": shape.experts, "n": shape.hidden, "k": shape.inner}
    assert tiles(H100, **sizes, arch=90)["cluster"] == (2 if name in FETCH_FOR_ONE_ANOTHER else 1)
    assert tiles(H100, **sizes, arch=90, gathers=True)["cluster"] == 1
    assert tiles(H100, **sizes)["cluster"] == 1


def test_clusters_where_the_card_has_room_for_them():
    """Up to a sixteenth of the processors may idle for them; 0: the driver could not tell."""
    for clusters, expected in ((66, 2), (62, 2), (61, 1), (0, 1)):
        assert tiles(H100, arch=90, k=2048, clusters=clusters)["cluster"] == expected


def test_hopper_takes_what_it_can_copy():
    for options in ({"dtype": "float32"}, {"dtype": "float32", "allow_tf32": True}, {"direct": False}):
        assert tiles(H100, arch=90, k=2048, **options) == tiles(H100, **options)
    assert tiles(H100, arch=80, k=2048) == tiles(H100)
    assert tiles(H100, arch=90, k=2048, dtype="float16") == tiles(H100, arch=90, k=2048)


def test_sizes_of_nothing():
    for sizes in ({"rows": 0}, {"experts": 0}, {"n": 0}, {"rows": 2**31 - 1, "experts": 2**31 - 2, "n": 2**40}):
        assert tiles(H100, **sizes)["rows"] in (SMALL, LARGE)
        assert tiles(H100, **sizes, arch=90, k=2**40)["rows"] == 128


@pytest.fixture(scope="module")
def walk(pytestconfig):
    """walk(offsets, rows, cols, tile rows, tile columns, blocks): [most tiles, 6] as tile_walk.cpp says."""
    if pytestconfig.getoption("--device") != "simt":
        pytest.skip("the walk is device code: the emulator shows it")
    function = ctypes.CDLL(str(library.directory() / library.LIBRARIES[1])).moe_ops_simt_tiles
    function.restype = ctypes.c_int64

    def call(offsets, rows, cols, tile_rows, tile_cols, blocks):
        starts = torch.tensor(offsets, dtype=torch.int32)
        sizes = ctypes.c_void_p(starts.data_ptr()), len(offsets) - 1, ctypes.c_int64(rows), ctypes.c_int64(cols)
        out = torch.empty(function(*sizes, tile_rows, tile_cols, blocks, None), 6, dtype=torch.int64)
        function(*sizes, tile_rows, tile_cols, blocks, ctypes.c_void_p(out.data_ptr()))
        return out

    return call


def expected_walk(offsets, rows, cols, tile_rows, tile_cols):
    """Experts in order, their offsets read from 0, within 0..rows, never falling, then the rows of none; 16 row tiles
    pass one column of tiles before the next, and where neighbours have one in common they multiply the same weights."""
    out, begin = [], 0
    for expert, offset in enumerate([*offsets[1:], rows]):
        end = max(begin, min(offset, rows))
        first_rows = range(begin, end, tile_rows)
        for group in range(0, len(first_rows), 16):
            for col in range(0, max(cols, 1), tile_cols):
                together = first_rows[group : group + 16]
                for row in together:
                    like = (row > together[0]) + 2 * (row < together[-1])
                    out.append([expert, row, col, min(tile_rows, end - row), min(tile_cols, cols - col), like])
        begin = end
    return out


@pytest.mark.parametrize(
    ("offsets", "rows", "cols"),
    [
        ([0, 20, 20, 37], 40, 20),
        ([0], 5, 3),
        ([7, -3, 9, 5, 90], 30, 9),
        ([0, 700], 700, 40),
        ([0, 0, 0], 0, 7),
        ([0, 3, 9], 9, 0),
        ([0, *range(0, 700, 7)], 710, 10),
        ([0, *range(0, 700, 7)], 350, 10),
    ],
)
@pytest.mark.parametrize("blocks", [1, 3, 7])
def test_walk(offsets, rows, cols, blocks, walk):
    expected = expected_walk(offsets, rows, cols, 16, 8)
    found = walk(offsets, rows, cols, 16, 8, blocks).tolist()
    assert found[: len(expected)] == expected
    assert all(tile[0] == -1 for tile in found[len(expected) :])


@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3-512", "qwen3-30b-decode", "qwen3-next", "odd"])
def test_walk_over_the_standing_shapes(name, walk):
    """As the launch cuts them, with experts of random sizes."""
    shape = STANDING[name]
    counts = torch.multinomial(torch.rand(shape.experts, generator=seeded()), shape.rows, True, generator=seeded())
    offsets = [0, *torch.bincount(counts, minlength=shape.experts).cumsum(0).tolist()]
    tile = tiles(H100, rows=shape.rows, experts=shape.experts, n=shape.hidden)
    found = walk(offsets, shape.rows, shape.hidden, tile["rows"], tile["cols"], H100 * tile["blocks"]).tolist()
    expected = expected_walk(offsets, shape.rows, shape.hidden, tile["rows"], tile["cols"])
    assert found[: len(expected)] == expected
    assert all(tile[0] == -1 for tile in found[len(expected) :])
