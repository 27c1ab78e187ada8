"""Short chunks of a packed model: the reference's logits and texts, and no matrix is unpacked in
memory.

On a CPU the kernels run in Triton's interpreter if their values are checked, and otherwise their
plain twins.
"""

import copy
import math

import pytest
import small
import torch
from test_packed_decoder import PLAIN, Q4_K_M, assert_close, packed_model

import mistral
from mistral.engine.speculation import LookupDecoder
from mistral_kernels.decode.step import DecodeStep
from mistral_kernels.decoder import Decoder
from mistral_kernels.packed.dequantize import unpack_reference
from mistral_kernels.packed.short_linear import scale_rows_reference, short_linear_reference
from mistral_kernels.prefill import chunk as prefill
from mistral_kernels.prefill.attention import attend_chunk_reference
from mistral_kernels.prefill.chunk import read_chunk
from mistral_kernels.prefill.short_attention import attend_short_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GREEDY = mistral.Sampling(temperature=0)
MIX = dict(v_proj="Q8_0", down_proj="Q8_0", other="Q4_0")
TINY = dict(
    vocab_size=16, eos_token_id=(0,), hidden_size=32, intermediate_size=32, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16,
)  # fmt: skip


def tokens(*shape, seed=0):
    return small.tokens(*shape, seed=seed, vocab_size=16).to(DEVICE)


class Pair:
    """A packed model read by `read_chunk` and, with the same bytes, by its own forward."""

    def __init__(self, mix=MIX, batch_size=1, **changes):
        self.model = packed_model(mix, **TINY | changes)
        self.twin = copy.deepcopy(self.model)
        self.workspace = DecodeStep(self.model, self.model.new_cache(batch_size, slack=1)).workspace
        if PLAIN:
            self.workspace._unpack = unpack_reference
        self.caches = [model.new_cache(batch_size, slack=1) for model in (self.model, self.twin)]

    def prefill(self, chunk, lengths=None):
        """Read a chunk both ways; the logits of rows that read something must be close.

        Was anything unpacked?
        """
        self.workspace._memory.fill_(math.nan)
        last_only = lengths is not None
        ours = read_chunk(self.model, chunk, self.caches[0], lengths, self.workspace, last_only)
        theirs = self.twin(chunk, self.caches[1], lengths, last_only)
        read = [b for b in range(len(chunk)) if not last_only or lengths[b]]
        assert ours.shape == theirs.shape
        assert_close(ours[read], theirs[read])
        keys, twins = (cache.keys[:, :, :, : cache.num_slots] for cache in self.caches)
        assert_close(keys, twins)
        return not self.workspace._memory.isnan().all()


def test_chunks_of_2_to_16_tokens_far_beyond_the_window_are_the_models_forward():
    pair = Pair()
    for T in (2, 9, 16):
        assert not pair.prefill(tokens(1, T, seed=T))
    assert pair.caches[0].lengths == [27]
    assert pair.caches[0].window == 5


def test_a_ragged_batch():
    pair = Pair(batch_size=3)
    for seed, lengths in enumerate(([5, 2, 0], [1, 5, 3])):
        assert not pair.prefill(tokens(3, 5, seed=seed), lengths)
    assert pair.caches[0].lengths == [6, 7, 3]


@pytest.fixture
def plain_twins(monkeypatch):
    """Instead of the kernels that read a chunk: quick on a CPU."""

    def short_linear(*arguments):
        x, inverse, weight, outputs = arguments
        multiplied.append(len(outputs))
        matrix = tuple(weight) if isinstance(weight, list) else weight
        short_linear_reference(x, inverse, matrix, outputs)

    multiplied = []
    monkeypatch.setattr(prefill, "scale_rows", scale_rows_reference)
    monkeypatch.setattr(prefill, "short_linear", short_linear)
    monkeypatch.setattr(prefill, "joint_linear", short_linear)
    monkeypatch.setattr(prefill, "attend_chunk", attend_chunk_reference)
    monkeypatch.setattr(prefill, "attend_short", attend_short_reference)
    return multiplied


def test_the_kinds_of_a_q4_k_m_file(plain_twins):
    sizes = dict(hidden_size=256, intermediate_size=256, num_attention_heads=16)
    assert not Pair(Q4_K_M, **sizes).prefill(tokens(1, 3))
    assert plain_twins == [3] * 5  # Q, K and V; O; gate and up; down; the logits


@pytest.mark.parametrize(
    ("B", "T", "short"),
    [
        (1, 1, True),
        (1, 17, True),
        (1, 64, True),
        (1, 65, False),
        (2, 32, True),
        (2, 33, False),
        (3, 22, False),
    ],
)
def test_up_to_64_rows_are_multiplied_as_they_are_and_more_are_unpacked(B, T, short, plain_twins):
    unpacks = Pair(batch_size=B).prefill(tokens(B, T), [T] * B)
    assert unpacks is not short
    # Q, K and V; O; gate and up; down; and of any prompt the rows whose logits are asked for
    assert plain_twins == ([B * T] * 4 if short else []) + [B]


def test_all_logits_of_a_long_chunk_are_unpacked_for(plain_twins):
    assert Pair().prefill(tokens(1, 65))
    assert plain_twins == []


def test_kinds_without_kernels_are_unpacked_for_short_chunks_too(plain_twins):
    assert Pair(dict(MIX, o_proj="Q5_0", lm_head=None)).prefill(tokens(1, 4))
    assert plain_twins == [4] * 3  # Q, K and V; gate and up; down


def test_a_tied_output(plain_twins):
    assert not Pair(tie_word_embeddings=True).prefill(tokens(1, 4))
    assert plain_twins == [4] * 5


def lookup_decoder(model, graph=None):
    """Around the kernels' decoder; on a CPU its short chunks alone run kernels."""
    decoder = Decoder(model, plain=PLAIN, graph=graph)
    decoder._plain = False
    if PLAIN:
        decoder._step.workspace._unpack = unpack_reference
    return LookupDecoder(decoder)


@pytest.mark.parametrize("seed", [0, 1])
def test_lookup_gives_the_greedy_text_of_plain_decoding(seed, plain_twins):
    model = packed_model(MIX, **TINY | dict(sliding_window=12))
    arguments = dict(max_new_tokens=60, stop_tokens=())
    prompt = tokens(12, seed=seed).tolist()
    plain = list(
        mistral.generate(mistral.Decoder(copy.deepcopy(model)), prompt, GREEDY, **arguments)
    )
    # plain twins copy from the host, which no graph can
    lookup = lookup_decoder(model, graph=False)
    assert list(mistral.generate(lookup, prompt, GREEDY, **arguments)) == plain
    assert lookup.tokens_a_forward > 1.2
    assert 9 in plain_twins


@pytest.mark.slow
def test_lookup_with_the_kernels_themselves():
    model = packed_model(MIX, **TINY)
    arguments = dict(max_new_tokens=10, stop_tokens=())
    plain = list(
        mistral.generate(
            mistral.Decoder(copy.deepcopy(model)), [4, 5, 6, 4, 5], GREEDY, **arguments
        )
    )
    lookup = lookup_decoder(model)
    assert list(mistral.generate(lookup, [4, 5, 6, 4, 5], GREEDY, **arguments)) == plain
    assert lookup.forwards < lookup.plain_forwards


def replay(decoder):
    """Make a decoder repeat the work that it was first given under a name, as a graph does.

    Returns the names of the work that was repeated.
    """
    works = {}
    repeated = []

    def run(name, work):
        if name in works:
            repeated.append(name)
        works.setdefault(name, work)()

    decoder.works.run = run
    return repeated


LENGTHS = (3, 9, 13, 18, 3, 1, 9, 13, 32, 3, 9, 40, 13, 47, 25)


@pytest.mark.parametrize(
    "lengths", [(3, 13, 3, 18, 3, 9, 13), pytest.param(LENGTHS, marks=pytest.mark.slow)]
)
def test_what_a_graph_of_a_short_chunk_repeats_reads_the_new_tokens_wherever_the_ring_is(lengths):
    model = small.model(torch.float32, **TINY | dict(sliding_window=20)).to(DEVICE)
    reference = mistral.Decoder(model, slack=16)
    decoder = Decoder(copy.deepcopy(model), slack=16, plain=True)
    decoder._plain = False
    repeated = replay(decoder)
    for seed, T in enumerate(lengths):
        chunk = tokens(T, seed=seed).tolist()
        assert_close(decoder.verify(chunk), reference.verify(chunk))
        for engine in (decoder, reference):
            engine.rewind(seed % 3)
            engine.step(GREEDY)
        assert decoder.lengths == reference.lengths
    assert decoder.lengths[0] > 20 + 17  # the ring has wrapped
    assert {"chunk of 4", "chunk of 14"} <= set(repeated)
    assert lengths != LENGTHS or "chunk of 32" in repeated


def test_what_a_graph_of_a_padded_chunk_repeats_reads_each_row_to_its_own_end():
    model = small.model(torch.float32, **TINY | dict(sliding_window=40)).to(DEVICE)
    reference = mistral.Decoder(model, 2, slack=2)
    decoder = Decoder(copy.deepcopy(model), 2, slack=2, plain=True)
    decoder._plain = False
    repeated = replay(decoder)
    for seed, counts in enumerate(([3, 17], [31, 5], [0, 20], [9, 31])):
        for engine in (decoder, reference):
            engine.prefill([ids[:n] for ids, n in zip(tokens(2, 32, seed=seed).tolist(), counts)])
        assert_close(decoder.logits, reference.logits)
        assert decoder.lengths == reference.lengths
        for engine in (decoder, reference):
            engine.rewind([2, 1])
            engine.step(GREEDY)
    assert {"chunk of 24, last logits", "chunk of 32, last logits"} <= set(repeated)


def test_a_graph_reads_a_chunk_whose_pads_have_no_room():
    model = small.model(torch.float32, **TINY | dict(sliding_window=None)).to(DEVICE)
    reference = mistral.Decoder(model, max_tokens=40)
    decoder = Decoder(copy.deepcopy(model), max_tokens=40, plain=True)
    decoder._plain = False
    repeated = replay(decoder)
    for seed, T in enumerate((17, 20, 3)):  # two are padded to 32 tokens
        for engine in (decoder, reference):
            engine.prefill([tokens(T, seed=seed).tolist()])
        assert_close(decoder.logits, reference.logits)
    for engine in (decoder, reference):
        engine.rewind(17)
        engine.prefill([tokens(17, seed=4).tolist()])  # 40 slots are full: no pad has room
    assert_close(decoder.logits, reference.logits)
    assert repeated == ["chunk of 32, last logits"] * 2


def test_what_a_graph_repeats_of_rows_of_one_length_reads_all_of_them():
    model = small.model(torch.float32, **TINY | dict(sliding_window=7)).to(DEVICE)
    reference = mistral.Decoder(model, 3, slack=2)
    decoder = Decoder(copy.deepcopy(model), 3, slack=2, plain=True)
    decoder._plain = False
    repeated = replay(decoder)
    for seed in range(3):
        for engine in (decoder, reference):
            engine.prefill(tokens(3, 5, seed=seed).tolist())
        assert_close(decoder.logits, reference.logits)
    assert repeated == ["chunk of 5, last logits"] * 2


@pytest.mark.parametrize(("T", "options"), [(4, {}), (19, {}), (19, dict(sliding_window=30))])
def test_a_chunk_that_is_broken_off_counts_as_one_that_was_not_read(T, options, monkeypatch):
    model = small.model(torch.float32, **TINY | dict(sliding_window=None) | options).to(DEVICE)
    decoder = Decoder(model, max_tokens=None if options else 60, slack=20, plain=True)
    decoder._plain = False
    chunk = tokens(T).tolist()
    before = tokens(25, seed=1).tolist()
    decoder.prefill([before + chunk])
    expected = decoder.logits
    decoder.rewind(T)
    normalised = prefill._normalised

    def interrupted(norm, x):
        if norm is model.model.norm:
            raise KeyboardInterrupt
        return normalised(norm, x)

    monkeypatch.setattr(prefill, "_normalised", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decoder.prefill([chunk])
    monkeypatch.undo()
    assert decoder.lengths == [25 + T]
    assert_close(decoder.logits, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("mix", [None, Q4_K_M])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_graphs_of_short_chunks_give_what_their_launches_give(mix, batch_size):
    if mix:
        model = packed_model(mix, torch.bfloat16, sliding_window=20)
    else:
        model = small.model(torch.bfloat16, **TINY | dict(sliding_window=20)).to(DEVICE)
    decoders = [
        Decoder(copy.deepcopy(model), batch_size, slack=16, graph=graph) for graph in (None, False)
    ]
    for seed in range(16):
        chunk = tokens(
            batch_size, (3, 5, 13, 40)[seed % (4 if batch_size == 1 else 2)], seed=seed
        ).tolist()
        if batch_size == 1 and seed < 9:
            assert_close(*(decoder.verify(chunk[0]) for decoder in decoders))
        else:
            for decoder in decoders:
                decoder.prefill(chunk)
            assert_close(*(decoder.logits for decoder in decoders))
        for decoder in decoders:
            decoder.rewind(seed % 3)
            decoder.step(GREEDY)


@pytest.fixture
def without_kernels(monkeypatch):
    """(model, workspace, cache), with zeros for what the kernels compute."""
    pair = Pair()
    pair.workspace._unpack = lambda planes, out, rows=None: out.zero_()
    monkeypatch.setattr(prefill, "scale_rows", lambda inputs: (inputs, inputs))
    for name in ("short_linear", "joint_linear"):
        monkeypatch.setattr(prefill, name, lambda *arguments: arguments[-1].zero_())
    for name in ("attend_chunk", "attend_short"):
        monkeypatch.setattr(prefill, name, lambda *arguments, **_: arguments[7].zero_())
    return pair.model, pair.workspace, pair.caches[0]


def test_a_short_chunk_never_waits_for_the_device(without_kernels, no_host_reads):
    model, workspace, cache = without_kernels
    for T in (9, 3, 16, 33):
        read_chunk(model, tokens(1, T), cache, None, workspace, last_only=False)


@pytest.mark.gpu
def test_a_short_chunk_on_a_gpu_never_waits():
    model = packed_model(Q4_K_M, torch.bfloat16)
    workspace = DecodeStep(model, model.new_cache(1, slack=1)).workspace
    cache = model.new_cache(1, slack=1)
    chunk = small.tokens(1, 9).to(DEVICE)
    read_chunk(model, chunk, cache, None, workspace)
    torch.cuda.set_sync_debug_mode("error")
    try:
        read_chunk(model, chunk, cache, None, workspace)
    finally:
        torch.cuda.set_sync_debug_mode("default")
