"""Unpacking ggml's blocks: gguf-py's values to the bit, on random and on llama.cpp's blocks."""

import gguf
import numpy as np
import pytest
import small
import torch
import torch.nn.functional as F

from mistral import CheckpointError
from mistral.quantization.dequantize import FUNCTIONS, dequantize, unpack
from mistral.quantization.ggml_types import GGML_TYPES, GgmlType, ggml_type
from mistral.quantization.packed import Keeper, PackedEmbedding, PackedLinear

BY_NAME = {kind.name: kind for kind in GGML_TYPES.values()}
GENUINE = np.load(small.DATA / "gguf/genuine_blocks.npz")


def reference(data, kind):
    with np.errstate(all="ignore"):
        return gguf.dequantize(data, gguf.GGMLQuantizationType[kind.name])


def assert_same_bits(ours, theirs):
    assert ours.shape == theirs.shape
    ours = ours.numpy()
    same = (ours.view(np.int32) == theirs.view(np.int32)) | (np.isnan(ours) & np.isnan(theirs))
    assert same.all()


@pytest.mark.parametrize("name", sorted(set(BY_NAME) - {"F64"}))
def test_random_bytes_give_gguf_pys_bits(name):
    # Random scales include infinities, nans and subnormal numbers.
    kind = BY_NAME[name]
    generator = np.random.default_rng(0)
    data = generator.integers(0, 256, (3, 7, 11 * kind.block_bytes), dtype=np.uint8)
    assert_same_bits(dequantize(torch.from_numpy(data), kind), reference(data, kind))


@pytest.mark.parametrize("name", GENUINE.files)
def test_genuine_blocks_give_gguf_pys_bits(name):
    data = GENUINE[name]
    weights = dequantize(torch.from_numpy(data), BY_NAME[name])
    assert_same_bits(weights, reference(data, BY_NAME[name]))
    assert weights.isfinite().all()


def test_the_types_that_mistral_files_hold_are_unpacked_here():
    names = "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS"
    ours = set(names.split())
    assert set(FUNCTIONS) == ours | {"F64"}
    assert ours - {"F32"} <= set(GENUINE.files)


@pytest.mark.parametrize("name", sorted(set(BY_NAME) - set(FUNCTIONS)))
def test_a_packed_embedding_of_a_type_that_gguf_py_unpacks(name):
    kind = BY_NAME[name]
    blocks = np.random.default_rng(0).integers(0, 256, (7, kind.block_bytes), dtype=np.uint8)
    embedding = PackedEmbedding(torch.from_numpy(blocks), kind, torch.float32)
    tokens = torch.tensor([[0, 6], [1, 0]])
    assert_same_bits(embedding(tokens), reference(blocks, kind)[tokens])


def test_block_sizes_are_ggufs():
    for number, kind in GGML_TYPES.items():
        assert gguf.GGMLQuantizationType(number).name == kind.name
        assert tuple(gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)]) == kind[1:]


def test_unpack_is_the_drawing_in_its_docstring():
    a = 1
    b = 2
    c = 3
    d = 4
    assert unpack(torch.tensor([[b << 4 | a, d << 4 | c]], dtype=torch.uint8), 4, 2).tolist() == [
        [a, c, b, d]
    ]
    assert unpack(torch.tensor([[0b11100100]], dtype=torch.uint8), 2, 1).tolist() == [[0, 1, 2, 3]]


def test_one_q4_0_block_by_hand():
    # d = 0.5; low nibbles 0, high ones 9
    block = torch.tensor([[0x00, 0x38, *([0x90] * 16)]], dtype=torch.uint8)
    assert dequantize(block, BY_NAME["Q4_0"]).tolist() == [[-4.0] * 16 + [0.5] * 16]


@pytest.mark.parametrize("number", [4, 5, 9, 15, 31, 36, 41, 99])
def test_types_that_are_not_read_are_refused_with_the_tensors_name(number):
    with pytest.raises(CheckpointError, match=f"blk.0.x is stored as ggml type {number}"):
        ggml_type(number, "blk.0.x")
    with pytest.raises(CheckpointError, match="no way is known to unpack ggml type Q0_9"):
        dequantize(torch.zeros(1, 18, dtype=torch.uint8), GgmlType("Q0_9", 32, 18))


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q4_K", "Q6_K", "IQ4_NL"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_packed_layers_are_layers_with_the_unpacked_weights(name, dtype, monkeypatch):
    from mistral.quantization import packed

    kind = BY_NAME[name]
    per_row = 2 * 256 // kind.block_weights
    rows = np.resize(GENUINE[name], (13, per_row * kind.block_bytes))
    blocks = torch.from_numpy(rows.copy())
    weight = dequantize(blocks, kind).to(dtype)
    monkeypatch.setattr(packed, "weights_at_once", lambda device: 5 * 512)  # 5 rows, 5 rows, 3 rows
    x = torch.randn(2, 3, 512, dtype=dtype)
    wanted = F.linear(x, weight)
    error = (PackedLinear(blocks, kind)(x) - wanted).abs().max() / wanted.abs().max()
    # other pieces may be summed in another order
    assert error < (1e-2 if dtype.itemsize == 2 else 1e-6)
    tokens = torch.tensor([[0, 12, 3], [3, 3, 1]])
    embedding = PackedEmbedding(blocks, kind, torch.float32).to(dtype)
    assert torch.equal(embedding(tokens), weight[tokens])
    assert embedding.blocks.dtype == torch.uint8


@pytest.mark.parametrize("id", [-1, 13])
def test_an_id_outside_a_packed_table_is_an_error_as_in_a_plain_one(id):
    kind = BY_NAME["Q8_0"]
    embedding = PackedEmbedding(
        torch.zeros(13, kind.block_bytes, dtype=torch.uint8), kind, torch.float32
    )
    with pytest.raises(IndexError):
        embedding(torch.tensor([[3, id]]))


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_a_gpu_gives_the_same_bits(name):
    data = torch.randint(0, 256, (64, 4 * BY_NAME[name].block_bytes), dtype=torch.uint8)
    ours = dequantize(data.cuda(), BY_NAME[name]).cpu()
    theirs = dequantize(data, BY_NAME[name])
    assert ((ours == theirs) | (ours.isnan() & theirs.isnan())).all()


def test_products_are_those_of_weights_rounded_to_the_dtype_of_the_input():
    kind = GGML_TYPES[2]
    blocks = torch.randint(0, 256, (24, 64 // 32 * 18), dtype=torch.uint8)
    blocks.view(-1, 18)[:, :2] = torch.tensor([0.01]).half().view(torch.uint8)
    layer = PackedLinear(blocks, kind)
    x = torch.randn(3, 64).bfloat16()
    weight = dequantize(blocks, kind).bfloat16()
    assert torch.equal(layer(x), F.linear(x, weight))


def test_a_layer_that_is_moved_takes_its_blocks_back():
    """`model.to` moves registered tensors, and a keeper's are not registered."""
    blocks = torch.arange(36, dtype=torch.uint8).view(2, 18)

    class Keeps(Keeper):
        def blocks(self):
            return blocks

    layer = PackedLinear(blocks.clone(), GGML_TYPES[2])
    layer.hand_over(Keeps())
    assert layer.blocks is None
    layer.to(torch.float16)
    assert layer.keeper is None
    assert torch.equal(layer.blocks, blocks)
