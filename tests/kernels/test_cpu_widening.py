"""Types that the CPU engine multiplies as signed bytes, against gguf-py's weights."""

import numpy as np
import pytest
import small
import torch
from torch import nn

from mistral import Decoder
from mistral.quantization.dequantize import dequantize
from mistral.quantization.ggml_types import GGML_TYPES
from mistral.quantization.packed import PackedEmbedding, PackedLinear, TiedOutput

pytest.importorskip("numba")
gguf = pytest.importorskip("gguf")

from mistral_kernels import engines  # noqa: E402
from mistral_kernels.cpu import Decoder as CpuDecoder  # noqa: E402
from mistral_kernels.cpu import compiled, weights  # noqa: E402
from mistral_kernels.cpu.tiles import KINDS  # noqa: E402
from mistral_kernels.cpu.weights import InBytes  # noqa: E402
from mistral_kernels.cpu.widening import WIDENED, integers_and_scales  # noqa: E402

TYPES = {kind.name: kind for kind in GGML_TYPES.values()}
# Where a block has its scale, and the bytes of one for weights near 0.02
SCALES = {
    "IQ1_S": (slice(0, 2), (0x00, 0x20)),
    "IQ1_M": (slice(48, 56), (0x41, 0x02, 0x35, 0x00, 0x1F, 0xC0, 0x77, 0x10)),
    "IQ2_XXS": (slice(0, 2), (0x00, 0x10)),
    "IQ2_XS": (slice(0, 2), (0x00, 0x10)),
    "IQ2_S": (slice(0, 2), (0x00, 0x10)),
    "IQ3_XXS": (slice(0, 2), (0x00, 0x08)),
    "IQ3_S": (slice(0, 2), (0x00, 0x08)),
    "TQ1_0": (slice(52, 54), (0x00, 0x24)),
    "TQ2_0": (slice(64, 66), (0x00, 0x24)),
    "MXFP4": (slice(0, 1), (120,)),
    "NVFP4": (slice(0, 4), (0x10, 0x12, 0x0F, 0x11)),
    "Q2_K": (slice(80, 84), (0x00, 0x14, 0x00, 0x18)),
    "IQ4_NL": (slice(0, 2), (0x00, 0x0C)),
}
MIX = {
    "embed_tokens": "IQ2_S",
    "q_proj": "IQ2_XXS",
    "k_proj": "IQ3_S",
    "v_proj": "MXFP4",
    "o_proj": "TQ2_0",
    "gate_proj": "IQ1_M",
    "up_proj": "IQ4_NL",
    "down_proj": "Q2_K",
    "lm_head": "IQ3_XXS",
}


@pytest.fixture(autouse=True, scope="module")
def compiled_together():
    """All that is compiled here, by several processes, if no earlier run has done it."""
    kinds = ("bytes", "Q2_K", "IQ4_NL")
    names = [f"product of {kind}" for kind in kinds] + ["tiles of Q2_K", "tiles of IQ4_NL"]
    compiled.prepare(["step", "row of bytes", "round rows", *names])


def blocks_of(kind, rows, columns, seed=0):
    """Random bytes with scales as models have them: uint8 [rows, bytes of a row]."""
    generator = torch.Generator().manual_seed(seed)
    size = rows, columns // TYPES[kind].block_weights * TYPES[kind].block_bytes
    blocks = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    where, values = SCALES[kind]
    blocks.view(-1, TYPES[kind].block_bytes)[:, where] = torch.tensor(values, dtype=torch.uint8)
    return blocks


def distance(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


def mixed(tied):
    """A model whose matrices have the types of MIX; a tied one has no output matrix."""
    sizes = dict(hidden_size=256, intermediate_size=512, head_dim=32, num_attention_heads=8)
    model = small.model(torch.float32, **sizes, sliding_window=24, tie_word_embeddings=tied)
    for seed, (name, module) in enumerate(list(model.named_modules())):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            owner, _, last = name.rpartition(".")
            kind = MIX[last]
            blocks = blocks_of(kind, *module.weight.shape, seed)
            packed = (
                PackedEmbedding(blocks, TYPES[kind], torch.float32)
                if last == "embed_tokens"
                else PackedLinear(blocks, TYPES[kind])
            )
            setattr(model.get_submodule(owner), last, packed)
    if tied:
        model.lm_head = TiedOutput(model.model.embed_tokens)
    return model


def test_every_type_that_is_unpacked_has_a_product():
    plain = {"F64", "F32", "F16", "BF16"}
    assert set(KINDS) | set(WIDENED) | plain == set(TYPES)


@pytest.mark.parametrize("kind", WIDENED)
def test_a_weight_is_an_integer_times_a_scale(kind):
    blocks = torch.randint(  # with infinite scales, and NaN
        0,
        256,
        (8, 20 * TYPES[kind].block_bytes),
        generator=torch.Generator().manual_seed(3),
        dtype=torch.uint8,
    )
    blocks = torch.cat((blocks, blocks_of(kind, 8, 20 * TYPES[kind].block_weights)))
    integers, scales = integers_and_scales(blocks, TYPES[kind])
    got = integers.float() * scales[..., None]
    with np.errstate(all="ignore"):
        want = gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind])
    want = torch.from_numpy(want).view_as(got)
    finite = want.isfinite().all(-1)
    assert torch.allclose(got[finite], want[finite], rtol=2e-7, atol=0)
    assert not got[~finite].isfinite().all(-1).any()
    assert finite[8:].all()


@pytest.mark.parametrize("scale, held", [(0x3C, [0.0] * 16), (0x7C, [torch.nan] * 16)])
def test_zeros_are_zeros_unless_their_scale_is_infinite(scale, held):
    blocks = torch.full((1, 66), 0x55, dtype=torch.uint8)
    blocks[0, 64:] = torch.tensor([0, scale])
    integers, scales = integers_and_scales(blocks, TYPES["TQ2_0"])
    assert not integers.any()
    assert torch.equal(scales.nan_to_num(7), torch.tensor([held]).nan_to_num(7))


@pytest.mark.parametrize("kind", WIDENED)
def test_a_product_is_within_3e_5_of_float64_and_the_blocks_stay(kind):
    columns = 3 * TYPES[kind].block_weights  # with blocks of 32 an odd number of groups
    blocks = blocks_of(kind, 61, columns)
    layer = InBytes(blocks, TYPES[kind])
    want = gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind])
    want = torch.from_numpy(want).double()
    for rows in (1, 6, 65):
        x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
        assert distance(layer.linear(x, TYPES[kind]), x.double() @ want.T) < 3e-5
    assert layer.blocks() is blocks
    assert torch.equal(layer.rows(torch.tensor([60, 0])), blocks[[60, 0]])


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_of_nine_types_has_the_reference_logits(tied):
    m = mixed(tied)
    before = {name: values.clone() for name, values in m.state_dict().items()}
    reference = Decoder(m, 2, 100)
    prompts = [small.tokens(1, n, seed=n)[0].tolist() for n in (9, 40)]
    chunks = (prompts, [[3], [7]], [[5], [1]])
    want = []
    for chunk in chunks:
        reference.prefill(chunk)
        want.append(reference.logits)
    decoder, line = engines.open_engine("cpu", m, 2, 100)
    for chunk, logits in zip(chunks, want):
        decoder.prefill(chunk)
        assert distance(decoder.logits, logits) < 1e-3
    after = m.state_dict()
    assert all(torch.equal(after[name], values) for name, values in before.items())
    kinds = "IQ1_M, IQ2_S, IQ2_XXS" if tied else "IQ1_M, IQ2_XXS"
    kinds += ", IQ3_S, MXFP4, TQ2_0" if tied else ", IQ3_S, IQ3_XXS, MXFP4, TQ2_0"
    assert f"; {kinds} multiplied as bytes, with " in line
    assert "times the file's memory" in line
    again = CpuDecoder(m, 1, 100)  # shares the bytes
    again.prefill(prompts[:1])
    assert again._weights.matrices[0].equal(decoder._weights.matrices[0])


def test_bytes_for_which_there_is_no_memory_are_said_and_nothing_is_widened(monkeypatch):
    m = mixed(tied=False)
    asked = []
    monkeypatch.setattr(weights, "has_room", lambda needed, device: asked.append(needed))
    said = []
    decoder, line = engines.open_engine("auto", m, 1, 100, say=said.append)
    assert type(decoder) is Decoder
    assert "not cpu: IQ1_M, IQ2_XXS, IQ3_S, IQ3_XXS, MXFP4, TQ2_0 as bytes would take" in line
    assert said == []
    assert m.lm_head.keeper is None
    # 10 bits a weight; rows are padded to 8
    attention = 256 * (256 + 64 + 64) + 256 * 256
    assert asked[0] * 8 / 10 == 3 * (attention + 512 * 256) + 104 * 256


def test_widening_is_said_before_it_is_done():
    said = []
    engines.open_engine("cpu", mixed(tied=True), 1, 100, say=said.append)
    assert said[0].startswith("unpacking IQ1_M, IQ2_S, IQ2_XXS, IQ3_S, MXFP4, TQ2_0 to bytes")


def test_a_row_of_an_embedding_is_the_reference_row():
    m = mixed(tied=True)
    want = dequantize(m.model.embed_tokens.blocks[[3, 99]], TYPES["IQ2_S"])
    decoder = CpuDecoder(m, 1, 100)
    out = torch.empty(4, 256)
    decoder._weights.embed(torch.tensor([3, 99]), out)
    assert distance(out[:2], want) < 1e-6
