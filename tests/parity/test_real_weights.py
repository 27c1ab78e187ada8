"""A real checkpoint in transformers and llama.cpp: SmolLM2-135M-Instruct, one GGUF for all.

The file has Q4_1 and Q8_0 tensors. transformers and this project unpack them to the same float32
values; llama.cpp multiplies the blocks, and rounds the activations to 8 bits for it.
"""

import copy
import functools

import gguf
import numpy as np
import pytest
import real_model
import real_texts
import torch
from benchmark_parts.llama_cpp_peer import LlamaCpp
from real_model import PATH

import mistral
from mistral.chat.formats import chat_format, encode_chat

pytestmark = real_model.needs_it

T = 1320  # of the long form
T_SHORT = 96
# What the file's chat template puts before a conversation that has no system message
DEFAULT_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
CONVERSATION = [
    {"role": "system", "content": "Answer in one sentence. 你好, naïve 😀"},
    {"role": "user", "content": "What is 12 * 34?\n\n  Think first."},
    {"role": "assistant", "content": "It is 408."},
    {"role": "user", "content": "And 2024 / 4?"},
]


@pytest.fixture(scope="module")
def pair():
    """(model, tokenizer) in float32."""
    return mistral.load(PATH, device="cpu", dtype=torch.float32, sliding_window=None)


@pytest.fixture(scope="module", autouse=True)
def read_once():
    """transformers parses the file for each of config, weights and tokenizer, and makes a table of
    names for each tensor: remember both.
    """
    with pytest.MonkeyPatch.context() as patch:
        # Parsing a mapped file makes an object of NumPy for each string; an array is faster.
        patch.setattr(np, "memmap", lambda path, **_: np.fromfile(path, np.uint8))
        patch.setattr(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))
        patch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
        yield


@pytest.fixture(scope="module")
def theirs():
    """transformers' model of the same file, in float32."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")  # transformers reads no GGUF without it
    return transformers.LlamaForCausalLM.from_pretrained(
        PATH.parent,
        gguf_file=PATH.name,
        dtype=torch.float32,
        attn_implementation="sdpa",
        quantization_config=transformers.GgufConfig(dequantize=True),
    ).eval()


@pytest.fixture(scope="module")
def their_tokenizer():
    """transformers' tokenizer, converted from the same file."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(PATH.parent, gguf_file=PATH.name)


@pytest.fixture(scope="module")
def llama_cpp():
    pytest.importorskip("xllamacpp")
    return LlamaCpp(PATH, n_ctx=512)


@pytest.fixture(scope="module")
def long_ids(pair):
    """English, then Python code, then other languages: [1, T]."""
    return mixed_ids(pair, 1500, T)


@pytest.fixture(scope="module")
def ids(pair):
    """As `long_ids`: [1, T_SHORT]."""
    return mixed_ids(pair, 96, T_SHORT)


def mixed_ids(pair, longest, count):
    texts = real_texts.texts()
    text = "".join(texts[i][:longest] for i in (60, 125, 7, 126, 191))
    found = pair[1].encode(text)
    assert len(found) >= count
    return torch.tensor([found[:count]])


def difference(ours, reference):
    return (ours.double() - reference.double()).abs().max().item()


@torch.inference_mode()
@pytest.mark.parametrize("length", ["ids", pytest.param("long_ids", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)],
)
def test_logits_are_transformers_to_the_last_bit(pair, theirs, request, dtype, length):
    ids = request.getfixturevalue(length)
    ours = pair[0]
    if dtype != torch.float32:
        ours, _ = mistral.load(PATH, device="cpu", dtype=dtype, sliding_window=None)
        frequencies = theirs.model.rotary_emb.inv_freq
        theirs = copy.deepcopy(theirs).to(dtype)
        # `from_pretrained` leaves the rotary frequencies in float32; `to` rounds them.
        theirs.model.rotary_emb.inv_freq = frequencies
    assert difference(ours(ids), theirs(ids, use_cache=False).logits) == 0.0


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_are_those_of_from_pretrained_in_16_bits(long_ids, dtype):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    ours, _ = mistral.load(PATH, device="cpu", dtype=dtype, sliding_window=None)
    theirs = transformers.LlamaForCausalLM.from_pretrained(
        PATH.parent,
        gguf_file=PATH.name,
        dtype=dtype,
        attn_implementation="sdpa",
        quantization_config=transformers.GgufConfig(dequantize=True),
    ).eval()
    assert theirs.model.rotary_emb.inv_freq.dtype == torch.float32
    assert difference(ours(long_ids), theirs(long_ids, use_cache=False).logits) == 0.0


@torch.inference_mode()
@pytest.mark.parametrize(("chunk", "length"), [(1, 5), (7, 20), (30, 70)])
def test_cached_logits_are_those_of_the_whole(pair, ids, chunk, length):
    model, _ = pair
    tokens = ids[:, :length]
    cache = model.new_cache(1, max_tokens=length)
    cached = torch.cat([model(part, cache) for part in tokens.split(chunk, dim=1)], dim=1)
    whole = model(tokens)
    # Logits are up to 40 here, and a matrix product rounds otherwise at another length.
    assert difference(cached, whole) < 5e-4
    assert difference(cached.softmax(-1), whole.softmax(-1)) < 1e-4


@torch.inference_mode()
def test_packed_logits_are_the_unpacked_ones(pair, ids):
    packed, _ = mistral.load(
        PATH, device="cpu", dtype=torch.float32, packed=True, sliding_window=None
    )
    tokens = ids[:, :40]
    assert difference(packed(tokens), pair[0](tokens)) < 1e-4


def test_ids_are_llama_cpps(pair, llama_cpp):
    texts = real_texts.texts()
    assert len(texts) == len(set(texts)) == 200
    for text in texts:
        for special in (False, True):
            expected = llama_cpp.tokenize(text, special=special)
            assert pair[1].encode(text, bos=False, special=special) == expected
        assert pair[1].decode(expected, control=True) == text


def test_ids_are_transformers_with_the_published_splitting(pair, their_tokenizer):
    """transformers' converter gives a file of the kind gpt2 the pre-tokenizer of GPT-2.

    This file's is `smollm`, which takes each digit by itself, as the tokenizer.json does that the
    model was published with, and llama.cpp. So the converter is wrong on some texts with digits.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    def encode(text):
        return their_tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    texts = real_texts.texts()
    ours = [pair[1].encode(text, bos=False) for text in texts]
    converted = [encode(text) for text in texts]
    different = [i for i, text in enumerate(texts) if converted[i] != ours[i]]
    assert len(different) < 60
    assert all(any(c.isnumeric() for c in texts[i]) for i in different)
    splitting = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    before = their_tokenizer.backend_tokenizer.pre_tokenizer
    their_tokenizer.backend_tokenizer.pre_tokenizer = splitting
    published = [encode(text) for text in texts]
    their_tokenizer.backend_tokenizer.pre_tokenizer = before
    assert published == ours


@pytest.mark.parametrize("messages", [QUESTION, CONVERSATION[1:], CONVERSATION])
def test_a_conversation_is_read_as_in_llama_cpp(pair, llama_cpp, messages):
    prompt = llama_cpp.chat_prompt(messages)
    assert encode_chat(pair[1], messages) == llama_cpp.tokenize(prompt, special=True)


@pytest.mark.parametrize("messages", [QUESTION, CONVERSATION[1:], CONVERSATION])
def test_a_conversation_is_read_as_by_the_files_template(pair, their_tokenizer, messages):
    # ChatML has no default system message; this file's template has one, and its author's scripts
    # send it unless there is another. Here it is the caller's.
    prompt = their_tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": DEFAULT_SYSTEM}, *messages]
    tokenizer = pair[1]
    assert encode_chat(tokenizer, messages) == tokenizer.encode(prompt, bos=False, special=True)


PROMPT = "The history of the printing press begins in"


def greedy(pair, max_new_tokens):
    """(ids of the prompt, ids of the text that follows)."""
    model, tokenizer = pair
    prompt = tokenizer.encode(PROMPT)
    sampling = mistral.Sampling(temperature=0.0)
    return prompt, list(mistral.generate(model, prompt, sampling, max_new_tokens=max_new_tokens))


@torch.inference_mode()
@pytest.mark.parametrize("count", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_each_greedy_token_is_transformers_most_likely_one(pair, theirs, count):
    prompt, ours = greedy(pair, count)
    logits = theirs(torch.tensor([prompt + ours]), use_cache=False).logits[0]
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == ours
    assert len(ours) == count


@pytest.mark.slow
@torch.inference_mode()
def test_greedy_text_is_that_of_transformers_generate_for_200_tokens(pair, theirs):
    prompt, ours = greedy(pair, 200)
    expected = theirs.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=200, pad_token_id=2
    )
    assert ours == expected[0, len(prompt) :].tolist()


@torch.inference_mode()
def test_it_knows_the_capital_of_france(pair):
    model, tokenizer = pair
    prompt = encode_chat(tokenizer, QUESTION)
    stop = chat_format(tokenizer).stop_ids(tokenizer)
    sampling = mistral.Sampling(temperature=0.0)
    answer = list(mistral.generate(model, prompt, sampling, max_new_tokens=30, stop_tokens=stop))
    assert tokenizer.decode(answer) == "The capital of France is Paris."


@torch.inference_mode()
def test_llama_cpps_logits_are_ours_within_the_rounding_of_its_activations(pair, llama_cpp, ids):
    log_p = pair[0](ids)[0].double().log_softmax(-1)
    log_q = llama_cpp.logits(ids[0].tolist()).double().log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    # Measured: 0.006 nats on average, 0.12 of probability, and 96% of the most likely tokens.
    assert divergence.mean() < 0.02
    assert difference(log_p.exp(), log_q.exp()) < 0.3
    assert (log_p.argmax(-1) == log_q.argmax(-1)).double().mean() > 0.9


@pytest.mark.slow
@torch.inference_mode()
def test_llama_cpps_logits_are_ours_on_the_same_values_in_float32(pair, llama_cpp, ids, tmp_path):
    write_float32(PATH, tmp_path / "float32.gguf")
    ours = pair[0](ids)[0]
    exact = LlamaCpp(tmp_path / "float32.gguf", n_ctx=512).logits(ids[0].tolist())
    rounded = llama_cpp.logits(ids[0].tolist())
    # So the difference on the file itself is the rounding of activations.
    assert difference(exact, ours) < 1e-3
    assert difference(rounded, ours) > 0.5


def write_float32(source, to):
    """The same GGUF with unpacked tensors."""
    file = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(to, "llama")
    for name, field in file.fields.items():
        if name != "general.architecture" and not name.startswith("GGUF."):
            array = field.types[0] == gguf.GGUFValueType.ARRAY
            inner = field.types[-1] if array else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    for tensor in file.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
