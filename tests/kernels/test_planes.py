"""Blocks in the order of the kernels: the same bits, and back again."""

import packed
import pytest
import torch

from mistral.quantization.ggml_types import GGML_TYPES
from mistral_kernels.packed import planes
from mistral_kernels.packed import tile as packed_tile
from mistral_kernels.packed.planes import (
    FAST_KINDS,
    dense,
    fits,
    repack,
    restore,
    restore_rows,
    row_block_bytes,
)

NAMES = list(packed.KINDS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("rows", "columns"), [(8, 1024), (13, 256), (3, 1536), (33, 2048), (1, 5120)]
)
def test_any_bytes_come_back(name, rows, columns):
    blocks = packed.random_bytes(name, rows, columns, seed=rows)
    made = repack(blocks, packed.KINDS[name])
    assert made.shape == (rows, columns)
    assert torch.equal(restore(made), blocks)
    some = torch.tensor([rows - 1, 0, rows // 2])
    assert torch.equal(restore_rows(made, some), blocks[some])


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0"])
def test_small_blocks_need_no_whole_quarter(name):
    blocks = packed.random_bytes(name, 5, 96)
    assert torch.equal(restore(repack(blocks, packed.KINDS[name])), blocks)


@pytest.mark.parametrize("name", NAMES)
def test_genuine_blocks_come_back_and_have_their_values(name):
    blocks = packed.genuine(name)
    made = repack(blocks, packed.KINDS[name])
    assert torch.equal(restore(made), blocks)
    assert torch.equal(dense(made).double(), packed.exactly(name, blocks))
    assert torch.equal(dense((made, made)), torch.cat((dense(made), dense(made))))


@pytest.mark.parametrize("name", NAMES)
def test_a_matrix_grows_by_less_than_3_percent(name):
    kind = packed.KINDS[name]
    for columns, most in ((1024, 1.03), (4096, 1.007), (14336, 1.002)):
        assert row_block_bytes(kind, columns) <= most * 8 * (
            columns // kind.block_weights * kind.block_bytes
        )
        assert row_block_bytes(kind, columns) % 128 == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("columns", [256, 1024, 14336])
def test_planes_and_kernels_agree_on_where_things_are(name, columns):
    made = repack(packed.random_blocks(name, 3, columns), packed.KINDS[name])
    at = packed_tile.guards_at(name, columns)
    assert packed_tile.row_block_bytes(name, columns) == made.data.shape[1]
    assert torch.equal(made.guards[0], made.data[0, at : at + 32].view(torch.float32))


@pytest.mark.parametrize("name", NAMES)
def test_guards_bring_every_rows_largest_scale_to_the_top_of_half_precision(name):
    blocks = torch.cat([packed.random_blocks(name, 1, 512, scale=10.0**-e) for e in range(5)])
    guards = repack(blocks, packed.KINDS[name]).guards.flatten()[:5]
    most = {"Q4_0": 1, "Q8_0": 1, "Q4_K": 63, "Q5_K": 63, "Q6_K": 128}[name] * 2.0**24
    for row, guard in zip(blocks, guards.tolist()):
        largest = packed.scales(name, row).abs().max().item()
        assert 2**14 <= largest * most * guard <= 2**15
        assert torch.frexp(torch.tensor(guard)).mantissa == 0.5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [float("inf"), float("nan"), -float("inf")])
def test_what_the_kernels_cannot_represent_is_said(name, value):
    blocks = packed.random_blocks(name, 5, 512)
    assert fits(repack(blocks, packed.KINDS[name]))
    packed.put_scale(blocks, name, 3, value)
    made = repack(blocks, packed.KINDS[name])
    assert not fits(made)
    assert made.guards.flatten().isnan().nonzero().flatten().tolist() == [3]
    assert torch.equal(restore(made), blocks)


def test_a_large_matrix_is_moved_in_parts(monkeypatch):
    blocks = packed.random_bytes("Q6_K", 35, 512)
    whole = repack(blocks, packed.KINDS["Q6_K"])
    sizes = []
    pack = planes._pack
    monkeypatch.setattr(planes, "_AT_ONCE", 16 * 512)
    monkeypatch.setattr(
        planes, "_pack", lambda rows, kind: sizes.append(len(rows)) or pack(rows, kind)
    )
    parts = repack(blocks, packed.KINDS["Q6_K"])
    assert sizes == [16, 16, 8]
    assert torch.equal(parts.data, whole.data)
    assert torch.equal(restore(parts), blocks)


def test_what_has_no_planes_is_named():
    kinds = {kind.name: kind for kind in GGML_TYPES.values()}
    with pytest.raises(ValueError, match="Q2_K has no planes; Q4_0, Q4_K, Q5_K, Q6_K, Q8_0 have"):
        repack(torch.zeros(1, 84, dtype=torch.uint8), kinds["Q2_K"])
    with pytest.raises(
        ValueError, match="row of 145 bytes does not consist of whole Q4_K blocks of 144"
    ):
        repack(torch.zeros(1, 145, dtype=torch.uint8), kinds["Q4_K"])
    assert set(FAST_KINDS) <= set(kinds)
