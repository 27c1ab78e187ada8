"""The fast engine on packed models: the reference's ids and logits, from the same packed bytes, and
those only once.

On a CPU most of it runs on the kernels' plain twins; two steps and a prompt run the kernels in
Triton's interpreter.
"""

import copy
import gc
import json
import os
import subprocess
import sys
import weakref

import numpy as np
import pytest
import small
import torch
from torch import nn

import mistral
from mistral.checkpoints import hugging_face
from mistral.quantization.dequantize import dequantize
from mistral.quantization.ggml_types import GGML_TYPES
from mistral.quantization.packed import Packed, PackedEmbedding, PackedLinear, TiedOutput
from mistral_kernels.decode.step import KERNELS, REFERENCES, DecodeStep, Operations
from mistral_kernels.decoder import Decoder
from mistral_kernels.packed.dequantize import Blocks, unpack, unpack_reference
from mistral_kernels.packed.planes import FAST_KINDS, Planes, repack
from mistral_kernels.prefill.chunk import read_chunk
from mistral_kernels.weights import ToUnpack, unpacked_kinds, weights_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLAIN = DEVICE == "cpu"
GREEDY = mistral.Sampling(temperature=0)
KINDS = {kind.name: kind for kind in GGML_TYPES.values()}
GENUINE = np.load(small.DATA / "gguf/genuine_blocks.npz")
SIZES = dict(
    hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
    head_dim=64, sliding_window=5,
)  # fmt: skip
CLOSE = 2e-5  # float32, of logits up to about 10

# Where a block has float16 scales, and how large they are, so that weights are about 0.03
SCALES = {
    "Q4_0": {0: 8e-3}, "Q8_0": {0: 5e-4}, "Q4_K": {0: 2e-4, 2: 1.5e-3}, "Q5_K": {0: 1e-4, 2: 1.5e-3},
    "Q6_K": {208: 2e-5}, "Q5_0": {0: 4e-3}, "IQ4_NL": {0: 6e-4}, "Q2_K": {80: 3e-3, 82: 4.5e-3}, "Q3_K": {108: 5e-4},
}  # fmt: skip
Q4_K_M = dict(embed_tokens="Q4_K", v_proj="Q6_K", down_proj="Q6_K", lm_head="Q6_K", other="Q4_K")
MIXES = {
    "Q4_K_M": Q4_K_M,
    "Q5_K": dict(other="Q5_K"),
    "Q8_0": dict(other="Q8_0"),
    "Q4_0, embedding and output plain": dict(other="Q4_0", embed_tokens=None, lm_head=None),
    "Q5_0": dict(other="Q5_0"),
    "IQ4_NL": dict(other="IQ4_NL"),
    "Q2_K beside Q3_K and Q4_K": dict(
        v_proj="Q4_K", o_proj="Q3_K", down_proj="Q3_K", lm_head="Q6_K", other="Q2_K"
    ),
    "gate and up differ, one of Q, K, V is plain": dict(
        gate_proj="Q4_K", k_proj=None, other="Q6_K"
    ),
}


def random_blocks(rows, columns, name, seed):
    """Random bytes with scales of a sensible size."""
    kind = KINDS[name]
    generator = torch.Generator().manual_seed(seed)
    count = rows * columns // kind.block_weights
    blocks = torch.randint(
        0, 256, (count, kind.block_bytes), dtype=torch.uint8, generator=generator
    )
    for at, size in SCALES[name].items():
        d = size * (0.5 + torch.rand(count, 1, generator=generator))
        blocks[:, at : at + 2] = d.half().view(torch.uint8)
    return blocks.view(rows, -1)


def packed_model(mix, dtype=torch.float32, **changes):
    """A small model whose matrices are packed as `mix` says, by the last part of their names."""
    model = small.model(torch.float32, **SIZES | changes)
    for seed, (name, module) in enumerate(list(model.named_modules())):
        owner, _, last = name.rpartition(".")
        kind = mix.get(last, mix["other"])
        if isinstance(module, (nn.Linear, nn.Embedding)) and kind:
            blocks = random_blocks(*module.weight.shape, kind, seed)
            embedding = isinstance(module, nn.Embedding)
            packed = (
                PackedEmbedding(blocks, KINDS[kind], torch.float32)
                if embedding
                else PackedLinear(blocks, KINDS[kind])
            )
            setattr(model.get_submodule(owner), last, packed)
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.03)
    if model.config.tie_word_embeddings:
        model.lm_head = TiedOutput(model.model.embed_tokens)
    return model.to(dtype).to(DEVICE).requires_grad_(False)


def assert_close(ours, theirs):
    assert (ours - theirs).abs().max() < CLOSE * theirs.abs().max()


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES.keys())
def test_reads_steps_and_rewinds_give_what_the_reference_gives_with_the_same_bytes(mix):
    model = packed_model(mix)
    reference = mistral.Decoder(model, 2)
    fast = Decoder(copy.deepcopy(model), 2, plain=PLAIN)
    rows = small.tokens(2, 8).tolist()
    for work in (
        lambda d: d.prefill([rows[0], rows[1][:3]]),
        lambda d: [d.step(GREEDY).tolist() for _ in range(4)],  # past the window of 5
        lambda d: d.rewind([3, 1]),
        lambda d: d.prefill([[7], []]),
        lambda d: [d.step(GREEDY).tolist() for _ in range(2)],
    ):
        assert work(reference) == work(fast)
        assert reference.lengths == fast.lengths
        assert_close(fast.logits, reference.logits)


# The short form ends just past the window of 9.
FILES = ["q4_k_m", "iq4_xs"]
LONG = [("q8_0", 30), ("q4_k_m", 30), ("q2_k", 30), ("iq4_xs", 30), ("demo", 12)]


@pytest.mark.parametrize(
    ("name", "steps"),
    [(name, 6) for name in FILES] + [pytest.param(*case, marks=pytest.mark.slow) for case in LONG],
)
def test_greedy_text_of_a_packed_file_is_the_references(name, steps):
    source = "demo" if name == "demo" else small.DATA / f"gguf/{name}.gguf"
    options = dict(packed=True, device=DEVICE, dtype=torch.float32)
    if name != "demo":
        options |= dict(sliding_window=9)
    texts = []
    for engine in (mistral.Decoder, lambda model: Decoder(model, plain=PLAIN)):
        model, _ = mistral.load(source, **options)
        prompt = small.tokens(7, vocab_size=model.config.vocab_size).tolist()
        text = mistral.generate(engine(model), prompt, GREEDY, max_new_tokens=steps, stop_tokens=())
        texts.append(list(text))
    assert texts[0] == texts[1]


def test_what_no_kernel_takes_is_unpacked_and_named():
    weights = weights_of(packed_model(MIXES["Q2_K beside Q3_K and Q4_K"]))
    layer = weights.layers[0]
    assert isinstance(layer.qkv, ToUnpack)
    assert [type(part) for part in layer.qkv.parts] == [Blocks, Blocks, Planes]
    assert isinstance(weights.head, Planes)
    assert unpacked_kinds(weights) == ["Q2_K", "Q3_K", "Q4_K"]
    assert unpacked_kinds(weights_of(packed_model(Q4_K_M))) == []


def test_a_tied_matrix_is_in_memory_once():
    model = packed_model(Q4_K_M, tie_word_embeddings=True)
    tokens = small.tokens(1, 9).to(DEVICE)
    logits = model(tokens)
    weights = weights_of(model)
    assert weights.head is weights.embedding
    assert torch.equal(model(tokens), logits)


def test_the_packed_bytes_are_in_memory_once_and_the_model_still_works():
    sizes = dict(hidden_size=1024, intermediate_size=1024, head_dim=128, num_attention_heads=8)
    model = packed_model(Q4_K_M | dict(o_proj="Q5_0"), **sizes)
    tokens = small.tokens(1, 9).to(DEVICE)
    logits = model(tokens)
    layers = [module for module in model.modules() if isinstance(module, Packed)]
    released = [weakref.ref(layer.blocks) for layer in layers if layer.kind.name in FAST_KINDS]
    bytes_before = sum(layer.blocks.nbytes for layer in layers)
    untouched = model.model.layers[0].self_attn.o_proj.blocks

    decoder = Decoder(model, plain=PLAIN)
    gc.collect()
    assert len(released) == 8
    assert all(block() is None for block in released)
    assert model.model.layers[0].self_attn.o_proj.blocks is untouched
    storages = {}
    for thing in gc.get_objects():
        if (
            issubclass(type(thing), torch.Tensor)
            and thing.dtype == torch.uint8
            and thing.numel() > 10_000
        ):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    # guards, and the rows that fill up 101 to 104
    assert bytes_before <= sum(storages.values()) <= 1.03 * bytes_before

    assert torch.equal(model(tokens), logits)
    again = Decoder(model, plain=PLAIN)
    assert again._step.weights.layers[0].down is decoder._step.weights.layers[0].down


def test_a_model_whose_blocks_became_planes_is_not_saved_by_halves(tmp_path):
    model = packed_model(Q4_K_M)
    weights_of(model)
    with pytest.raises(ValueError, match="the model is packed"):
        hugging_face.save(model, None, tmp_path)
    with pytest.raises(
        ValueError, match="is packed; load the checkpoint without packed=True and quantize"
    ):
        pytest.importorskip("gguf")
        from mistral.checkpoints import gguf_export

        gguf_export.export(model, small.true_tokenizer(), tmp_path / "m.gguf", "F16")


def test_infinite_scales_differ_in_nothing_from_the_reference():
    model = packed_model(Q4_K_M)
    up = model.model.layers[0].mlp.up_proj
    up.blocks[3, :2] = torch.tensor([torch.inf]).half().view(torch.uint8)
    tokens = small.tokens(1, 3)[0].tolist()
    reference = mistral.Decoder(model)
    fast = Decoder(copy.deepcopy(model), plain=PLAIN)
    for decoder in (reference, fast):
        decoder.prefill([tokens[:2]])
        decoder.prefill([tokens[2:]])
    assert fast.unpacked_kinds == ["Q4_K"]
    assert torch.equal(reference.logits.isnan(), fast.logits.isnan())
    assert fast.logits.isnan().any()


@pytest.mark.parametrize("n", [6, pytest.param(12, marks=pytest.mark.slow)])
def test_half_precision_is_at_least_as_close_to_float32_as_the_references_own(n):
    exact = packed_model(Q4_K_M)
    coarse = packed_model(Q4_K_M, torch.bfloat16)
    tokens = small.tokens(1, n)[0].tolist()
    wanted = exact(torch.tensor([tokens], device=DEVICE))[0, -1].float()
    errors = []
    for decoder in (mistral.Decoder(copy.deepcopy(coarse)), Decoder(coarse, plain=PLAIN)):
        for id in tokens:
            decoder.prefill([[id]])
        errors.append((decoder.logits[0].float() - wanted).abs().mean().item())
    assert errors[1] <= 1.05 * errors[0]
    assert decoder._step.weights.activations == torch.float16


# Two steps in the interpreter take half a minute. The long form's second one has a full window.
@pytest.mark.parametrize("steps", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_kernels_themselves_give_the_references_logits(steps):
    sizes = dict(sliding_window=1, intermediate_size=256, num_key_value_heads=1)
    if steps == 1:
        sizes |= dict(num_attention_heads=2)
    model = packed_model(Q4_K_M | dict(o_proj="Q5_0"), **sizes)
    tokens = small.tokens(2, steps).to(DEVICE)
    wanted = model(tokens)[:, -1]
    cache = model.new_cache(2, slack=1)
    twin_cache = model.new_cache(2, slack=1)
    step = DecodeStep(model, cache, KERNELS)
    twin = DecodeStep(model, twin_cache, REFERENCES)
    for t in range(steps):
        for one in (step, twin):
            one.tokens.copy_(tokens[:, t])
            one.run(torch.full((2,), t, device=DEVICE))
        assert_close(step.logits, twin.logits)
    assert_close(step.logits, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("F", [256, 512])
def test_a_prompt_is_unpacked_matrix_by_matrix_into_the_same_memory(F):
    sizes = dict(sliding_window=3, intermediate_size=F)
    model = packed_model(Q4_K_M | dict(o_proj="Q5_0"), **sizes)
    reference = copy.deepcopy(model)
    cache = model.new_cache(1, slack=1)
    theirs = reference.new_cache(1, slack=1)
    workspace = DecodeStep(model, cache).workspace
    tokens = small.tokens(1, 5).to(DEVICE)
    assert_close(
        read_chunk(model, tokens, cache, None, workspace, last_only=False),
        reference(tokens, theirs),
    )
    assert_close(cache.keys[:, :, :, :-1], theirs.keys[:, :, :, :-1])
    # The largest matrix of a layer, and no more.
    assert workspace._memory.numel() == F * 256


@pytest.mark.parametrize("name", FAST_KINDS)
def test_matrices_are_unpacked_to_ggmls_bits(name):
    kind = KINDS[name]
    genuine = torch.from_numpy(
        np.resize(GENUINE[name], (9, 256 // kind.block_weights * kind.block_bytes)).copy()
    )
    random_bytes = torch.randint(
        0, 256, (9, 1280 // kind.block_weights * kind.block_bytes), dtype=torch.uint8
    )
    for blocks in (genuine.to(DEVICE), random_bytes.to(DEVICE)):
        planes = repack(blocks, kind)
        rows = torch.tensor([8, 0, 3], device=DEVICE)
        for dtype in (torch.float32, torch.float16):
            wanted = dequantize(blocks, kind).to(dtype)
            for function in (unpack, unpack_reference):
                whole = torch.empty_like(wanted)
                some = torch.empty_like(wanted[:3])
                function(planes, whole)
                function(planes, some, rows)
                assert torch.equal(whole.nan_to_num(7), wanted.nan_to_num(7))
                assert torch.equal(some.nan_to_num(7), wanted[rows].nan_to_num(7))


@pytest.mark.gpu
@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize(
    "mix", [Q4_K_M, dict(other="Q2_K"), dict(other="IQ4_NL")], ids=["Q4_K_M", "Q2_K", "IQ4_NL"]
)
def test_a_graph_gives_the_bits_of_single_launches(mix, pdl):
    if pdl and not (9, 0) <= torch.cuda.get_device_capability() < (12, 0):
        pytest.skip("these kernels launch dependently on compute capability 9.0 to 11.x")
    model = packed_model(mix, torch.bfloat16)
    texts = []
    for graph in (True, False):
        decoder = Decoder(model, 2, graph=graph, pdl=pdl and graph)
        decoder.prefill([[4, 5, 6], [7]])
        steps = [decoder.step(mistral.Sampling(seed=3)) for _ in range(20)]
        texts.append((torch.stack(steps), decoder.logits))
    assert all(torch.equal(*both) for both in zip(*texts))


@pytest.mark.gpu
def test_a_7b_in_four_bits_with_its_whole_window_takes_5_4_gb():
    from benchmark_parts.sizes import make_model

    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    reserved = torch.cuda.memory_reserved()
    decoder = Decoder(make_model("7b", torch.device("cuda"), torch.bfloat16, "Q4_K_M"))
    decoder.prefill([small.tokens(1, 5000, vocab_size=32000)[0].tolist()])
    for _ in range(4):
        decoder.step(GREEDY)
    assert torch.cuda.max_memory_reserved() - reserved < 5.4e9


COMPILE = """
import json, torch
from benchmark_parts.sizes import config
from compile_ahead import compile_ahead, unpack_kernel
from mistral_kernels.packed.planes import FAST_KINDS
VARIANTS = [(90, torch.bfloat16, False), (80, torch.float16, True)]
for kind in FAST_KINDS if FULL else ("Q4_K", "Q6_K"):
    for target, dtype, chosen in VARIANTS if FULL else VARIANTS[:1]:
        made = compile_ahead(unpack_kernel(config("7b"), kind, chosen), dtype, target)
        facts = dict(kind=kind, spilled=made.spilled, registers=made.registers, shared=made.shared)
        facts |= dict(loads=made.count("LDG.E.128"), stores=made.count("STG.E.128"), all=len(made.sass))
        print(json.dumps(facts))
"""


@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_unpacking_compiles_and_moves_16_bytes_at_a_time(full):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    program = [sys.executable, "-c", f"FULL = {full}\n{COMPILE}"]
    result = subprocess.run(program, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(lines) == (2 * len(FAST_KINDS) if full else 2)
    for made in lines:
        # 1,024 lines of 8 weights on 128 threads: 8 stores each, and as many loads, or twice that
        # with high bits
        assert made["spilled"] == 0, made
        assert made["stores"] == 8, made
        assert made["loads"] == (16 if made["kind"] in ("Q5_K", "Q6_K") else 8), made
        # Instructions per weight; the bytes leave time for 17 to 19.
        assert made["all"] / 64 < 18, made


def test_a_kernel_whose_weights_were_just_unpacked_is_not_launched_early():
    """It would load them before they are written."""
    model = packed_model(MIXES["Q2_K beside Q3_K and Q4_K"])
    early = {}

    def recorder(name):
        def operation(*arguments, **options):
            early[name] = options
            getattr(REFERENCES, name)(*arguments)

        return operation

    operations = Operations(*map(recorder, Operations._fields))
    DecodeStep(model, model.new_cache(1), operations, pdl=True).run(
        torch.zeros(1, dtype=torch.int64, device=DEVICE)
    )
    unpacked = {name for name, options in early.items() if not options}
    assert unpacked == {"embed", "unpack", "qkv", "project", "gate_up"}
    assert early["attend"] == early["head"] == {"pdl": True}


def test_gate_and_up_of_two_types_are_unpacked():
    """A tile of their kernel has rows of both."""
    mix = MIXES["gate and up differ, one of Q, K, V is plain"]
    assert isinstance(weights_of(packed_model(mix)).layers[0].gate_up, ToUnpack)
    assert isinstance(weights_of(packed_model(Q4_K_M)).layers[0].gate_up, tuple)
