"""llama-server on a GGUF file, in this process: the wheel xllamacpp has it as a class."""

import os
from typing import Self


class LlamaServer:
    """llama.cpp's HTTP server, on a free port of this machine, until the context ends.

    slots    requests that are answered at the same time
    room     tokens of a slot
    threads  CPU threads
    exact    a cache of float32 instead of float16, and attention without its fast path
    address  http://127.0.0.1:PORT

    Raises ImportError if xllamacpp is not installed.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        slots: int,
        room: int,
        threads: int = 1,
        exact: bool = False,
    ):
        try:
            import xllamacpp
        except ImportError:
            raise ImportError("xllamacpp is not installed: pip install xllamacpp") from None
        options = xllamacpp.CommonParams()
        options.model.path = os.fspath(path)
        options.n_parallel = slots
        options.n_ctx = slots * room
        options.cpuparams.n_threads = threads
        options.cpuparams_batch.n_threads = threads
        options.port = 0
        if exact:
            options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            disabled = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
            options.flash_attn_type = disabled
        options.endpoint_metrics = True
        self._server = xllamacpp.Server(options)
        self.address = self._server.listening_address

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._server = None  # its destructor ends the threads
