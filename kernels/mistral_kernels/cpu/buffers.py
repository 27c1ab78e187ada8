"""The memory that the threads of a step share, and the table of its addresses."""

from collections.abc import Sequence

import torch

from mistral.cache import RollingCache
from mistral.model import Mistral
from mistral_kernels.cpu import compiled
from mistral_kernels.cpu.activations import Activations
from mistral_kernels.cpu.layout import (
    MAX_COLUMNS,
    ORDERS,
    PHASE_BYTES,
    VALUE_BYTES,
    Addresses,
    Sizes,
    shares_of,
)
from mistral_kernels.cpu.weights import Weights

_NO_WINDOW = 1 << 40


class Buffers:
    """What one decoder's step reads and writes, apart from the weights.

    sizes, addresses  the records of layout.py, int64
    """

    def __init__(self, model: Mistral, cache: RollingCache, threads: int, weights: Weights):
        config, rotary = model.config, model.model.rotary
        D, N, K = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        H, F = config.head_dim, config.intermediate_size
        C = MAX_COLUMNS
        dtype = str(cache.keys.dtype).removeprefix("torch.")
        self._eps = torch.tensor([config.rms_norm_eps])
        sizes = Sizes(
            layers=config.num_hidden_layers,
            D=D,
            N=N,
            K=K,
            H=H,
            F=F,
            S=cache.num_slots,
            window=cache.window or _NO_WINDOW,
            batch=cache.batch_size,
            cell=VALUE_BYTES[dtype],
            eps=self._eps.data_ptr(),
        )
        most_shares = max(shares_of(c, K, threads) for c in range(1, C + 1))
        self.x = torch.zeros(C, D)
        self._attention_factor = torch.tensor([rotary.attention_factor])
        self._frequencies = rotary.frequencies.float().contiguous()
        self._cos = torch.zeros(C, H // 2)
        self._sin = torch.zeros(C, H // 2)
        self.logits = torch.zeros(C, 8 * weights.vocab_tiles)
        self.tickets = torch.zeros(8, dtype=torch.int64)
        self._threads = threads
        self._orders = torch.zeros(ORDERS, dtype=torch.int64)
        phases = 5 * config.num_hidden_layers + 1
        self._phases = torch.zeros(PHASE_BYTES * phases // 8, dtype=torch.int64)
        self._normed = Activations(torch.zeros(C, D))
        self._attended = Activations(torch.zeros(C, N * H))
        self._gated = Activations(torch.zeros(C, F))
        self._qkv = torch.zeros(C, (N + 2 * K) * H)
        self._queries = torch.zeros(C, N, H)
        self._parts = torch.zeros(C * N * most_shares * (H + 8))
        self._up = torch.zeros(C, F)
        self._added = torch.zeros(C, D)
        addresses = Addresses(
            matrices=weights.matrices.data_ptr(),
            norms=weights.norms.data_ptr(),
            x=self.x.data_ptr(),
            normed=self._normed.values.data_ptr(),
            normed_activations=self._normed.table,
            qkv=self._qkv.data_ptr(),
            queries=self._queries.data_ptr(),
            parts=self._parts.data_ptr(),
            attended=self._attended.values.data_ptr(),
            attended_activations=self._attended.table,
            gated=self._gated.values.data_ptr(),
            gated_activations=self._gated.table,
            up=self._up.data_ptr(),
            added=self._added.data_ptr(),
            logits=self.logits.data_ptr(),
            frequencies=self._frequencies.data_ptr(),
            attention_factor=self._attention_factor.data_ptr(),
            cos=self._cos.data_ptr(),
            sin=self._sin.data_ptr(),
            attend=compiled.address(f"attention of {dtype}"),
            store=compiled.address(f"storing of {dtype}"),
            keys=cache.keys.data_ptr(),
            values=cache.values.data_ptr(),
            phases=self._phases.data_ptr(),
            tickets=self.tickets.data_ptr(),
            orders=self._orders.data_ptr(),
        )
        self.sizes = torch.tensor(sizes)
        self.addresses = torch.tensor(addresses)

    def give_orders(
        self,
        rows: Sequence[int],
        positions: Sequence[int],
        scored: int,
        columns_of_shares: int,
    ) -> None:
        """The next step: row and position of each column; the first `scored` get logits.

        columns_of_shares  contexts are cut as a step of so many columns cuts them
        """
        padding = [0] * (MAX_COLUMNS - len(rows))
        most = min(columns_of_shares, MAX_COLUMNS)
        orders = [len(rows), scored, self._threads, most]
        orders += [*rows, *padding, *positions, *padding]
        self._orders.copy_(torch.tensor(orders))
