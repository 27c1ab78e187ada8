"""llama.cpp in this process: its C functions, in the library of the wheel xllamacpp.

The wheel's own Python interface is a server, which returns probabilities of new tokens. The C
functions return the logits of every position. Source: llama.cpp, include/llama.h
"""

import ctypes
import os
from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

from mistral.quantization.ggml_types import GGML_TYPES, GgmlType

_FLOAT32 = 0  # ggml's number of the type
_DISABLED = 0


class _ModelParams(ctypes.Structure):
    """llama_model_params, of which nothing is changed here: only its size must be large enough."""

    _fields_ = [("words", ctypes.c_uint64 * 64)]


class _ContextParams(ctypes.Structure):
    """llama_context_params up to the last field that is set here; the rest is passed through."""

    _fields_ = [
        ("n_ctx", ctypes.c_uint32),
        ("n_batch", ctypes.c_uint32),
        ("n_ubatch", ctypes.c_uint32),
        ("n_seq_max", ctypes.c_uint32),
        ("n_rs_seq", ctypes.c_uint32),
        ("n_outputs_max", ctypes.c_uint32),
        ("n_outputs_max_per_seq", ctypes.c_uint32),
        ("n_threads", ctypes.c_int32),
        ("n_threads_batch", ctypes.c_int32),
        ("kinds", ctypes.c_int32 * 4),  # of context, rotary scaling, pooling and attention
        ("flash_attn", ctypes.c_int32),
        ("rotary", ctypes.c_float * 8),
        ("cb_eval", ctypes.c_void_p),
        ("cb_eval_user_data", ctypes.c_void_p),
        ("type_k", ctypes.c_int32),
        ("type_v", ctypes.c_int32),
        ("rest", ctypes.c_uint64 * 64),
    ]


class _Batch(ctypes.Structure):
    """llama_batch: n_tokens tokens of one sequence, and for which of them logits are wanted."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.c_void_p),  # NULL: the next positions
        ("n_seq_id", ctypes.c_void_p),
        ("seq_id", ctypes.c_void_p),  # NULL: sequence 0
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


class _Message(ctypes.Structure):
    """llama_chat_message."""

    _fields_ = [("role", ctypes.c_char_p), ("content", ctypes.c_char_p)]


_LOG_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_silent = _LOG_CALLBACK(lambda level, text, data: None)  # kept: llama.cpp only points to it


@cache
def library() -> ctypes.CDLL:
    """llama.cpp's functions with their result types.

    Raises ImportError if xllamacpp is not installed, or if its structures are not those above.
    """
    try:
        import xllamacpp.xllamacpp as extension
    except ImportError:
        raise ImportError("xllamacpp is not installed: pip install xllamacpp") from None
    functions = ctypes.CDLL(extension.__file__)
    functions.llama_log_set(_silent, None)
    functions.llama_backend_init()
    functions.llama_model_default_params.restype = _ModelParams
    functions.llama_context_default_params.restype = _ContextParams
    for name in (
        "llama_model_load_from_file",
        "llama_model_get_vocab",
        "llama_init_from_model",
        "llama_get_memory",
    ):
        getattr(functions, name).restype = ctypes.c_void_p
    functions.llama_get_logits.restype = ctypes.POINTER(ctypes.c_float)
    functions.llama_model_chat_template.restype = ctypes.c_char_p
    functions.llama_print_system_info.restype = ctypes.c_char_p
    functions.llama_supports_gpu_offload.restype = ctypes.c_bool
    functions.ggml_quantize_chunk.restype = ctypes.c_size_t
    defaults = functions.llama_context_default_params()
    known = (defaults.n_batch, defaults.n_ubatch, defaults.type_k, defaults.type_v)
    if known != (2048, 512, 1, 1) or defaults.rotary[2] != -1.0:
        raise ImportError(
            "this xllamacpp has another llama_context_params: "
            "install the version in constraints.txt"
        )
    return functions


def quantize(values: Tensor, kind: GgmlType) -> Tensor:
    """Rows of values to packed rows, by llama.cpp's own rounding without an importance matrix.

    values  float32 [rows, columns] on the CPU, columns in whole blocks -> uint8 [rows, row bytes]
    """
    rows, columns = values.shape
    packed = torch.empty(rows, columns // kind.block_weights * kind.block_bytes, dtype=torch.uint8)
    number = next(number for number, known in GGML_TYPES.items() if known == kind)
    library().ggml_quantize_chunk(
        number,
        ctypes.c_void_p(values.contiguous().data_ptr()),
        ctypes.c_void_p(packed.data_ptr()),
        ctypes.c_int64(0),  # the first value
        ctypes.c_int64(rows),
        ctypes.c_int64(columns),
        None,
    )
    return packed


class LlamaCpp:
    """A GGUF file in llama.cpp: one sequence, a cache of float32 or of llama.cpp's float16.

    n_ctx    the longest sequence
    threads  CPU threads; a build with a GPU runs all layers there
    """

    def __init__(self, path: str | os.PathLike, n_ctx: int, threads: int = 1, exact: bool = True):
        self._lib = library()
        self.on_gpu = self._lib.llama_supports_gpu_offload()
        name = os.fspath(path).encode()
        parameters = self._lib.llama_model_default_params()
        self._model = ctypes.c_void_p(self._lib.llama_model_load_from_file(name, parameters))
        if not self._model:
            raise ValueError(f"llama.cpp could not load {path}")
        self._vocab = ctypes.c_void_p(self._lib.llama_model_get_vocab(self._model))
        self.vocab_size = self._lib.llama_vocab_n_tokens(self._vocab)
        options = self._lib.llama_context_default_params()
        options.n_ctx = n_ctx
        options.n_outputs_max = 0  # 0: no bound on the positions whose logits are wanted
        options.n_outputs_max_per_seq = 0
        options.n_threads = options.n_threads_batch = threads
        if exact:
            options.type_k = options.type_v = _FLOAT32
            options.flash_attn = _DISABLED
        self._context = ctypes.c_void_p(self._lib.llama_init_from_model(self._model, options))
        if not self._context:
            raise ValueError(f"llama.cpp could not make a context of {n_ctx} tokens")
        self._chunk = options.n_batch

    @property
    def vector_units(self) -> str:
        """The CPU's vector instructions that this build uses: a wheel must run on old CPUs, too."""
        words = self._lib.llama_print_system_info().decode().replace(" = 1", "").split(" | ")
        known = [word for word in words if word.startswith(("AVX", "AMX", "NEON", "SVE"))]
        return " ".join(known)

    def __del__(self):
        if getattr(self, "_context", None):
            self._lib.llama_free(self._context)
        if getattr(self, "_model", None):
            self._lib.llama_model_free(self._model)

    def logits(self, ids: Sequence[int]) -> Tensor:
        """[T, V] float32, of a new sequence."""
        self.reset()
        return self.append_all(ids)

    def reset(self) -> None:
        """Forget the sequence."""
        memory = ctypes.c_void_p(self._lib.llama_get_memory(self._context))
        self._lib.llama_memory_clear(memory, ctypes.c_bool(True))

    def append(self, ids: Sequence[int]) -> Tensor:
        """Append ids to the sequence; the logits after the last one, [V] float32."""
        for i in range(0, len(ids), self._chunk):
            last = self._decode(ids[i : i + self._chunk], every=False)
        return last[0]

    def append_all(self, ids: Sequence[int]) -> Tensor:
        """Append ids to the sequence; the logits after each of them, [T, V] float32."""
        starts = range(0, len(ids), self._chunk)
        return torch.cat([self._decode(ids[i : i + self._chunk], every=True) for i in starts])

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """The ids of a text without a token at its begin; special: control tokens are read."""
        raw = text.encode()
        room = len(raw) + 2
        found = (ctypes.c_int32 * room)()
        flags = ctypes.c_bool(False), ctypes.c_bool(special)
        count = self._lib.llama_tokenize(self._vocab, raw, len(raw), found, room, *flags)
        if count < 0:
            raise ValueError(f"llama.cpp needs {-count} ids for {len(raw)} bytes")
        return found[:count]

    def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Messages as llama.cpp writes them for the file's chat template, up to the answer.

        This is its own writer of the formats that it knows, not the template itself.
        """
        template = self._lib.llama_model_chat_template(self._model, None)
        chat = (_Message * len(messages))(
            *[_Message(m["role"].encode(), m["content"].encode()) for m in messages]
        )
        written = ctypes.create_string_buffer(2**16)
        length = self._lib.llama_chat_apply_template(
            template, chat, ctypes.c_size_t(len(chat)), ctypes.c_bool(True), written, len(written)
        )
        if not 0 <= length <= len(written):
            raise ValueError("llama.cpp does not know this chat template, or the text is too long")
        return written.raw[:length].decode()

    def _decode(self, ids: Sequence[int], every: bool) -> Tensor:
        n = len(ids)
        wanted = [1] * n if every else [0] * (n - 1) + [1]
        batch = _Batch(
            n_tokens=n,
            token=(ctypes.c_int32 * n)(*ids),
            logits=(ctypes.c_int8 * n)(*wanted),
        )
        code = self._lib.llama_decode(self._context, batch)
        if code:
            raise ValueError(f"llama.cpp could not compute {n} tokens (code {code})")
        rows = n if every else 1
        pointer = self._lib.llama_get_logits(self._context)
        values = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float * (rows * self.vocab_size)))
        return torch.frombuffer(bytearray(values.contents), dtype=torch.float32).view(rows, -1)
