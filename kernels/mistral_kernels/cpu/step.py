"""One forward pass for up to 32 tokens, as one compiled function that every thread runs.

The tokens are columns of the activations: one token of each row of a batch, or a few tokens of one
row, or both. Each layer is five phases, whose items the threads claim (team.py):

    phase        items                                         then, by the thread that ends it
    qkv          rows of Q, K and V                            rotate; write keys and values
    attention    (column, key/value head, share of positions)  merge shares; round
    output       rows of O, added to x                         norm; round
    gate and up  rows of both, SwiGLU, round                   -
    down         rows of down, added to x                      norm of the next layer; round

and one more for the output matrix. "Round" is to int16 (activations.py), as the products of packed
weights take their input (products.py). Everything else is float32.

The new keys are in the cache before any query reads it. So a chunk of T tokens needs T <= S - W + 1
(`RollingCache._may_write_before_read`), which the decoder sees to.
"""

from mistral_kernels.cpu.compiled import compiled, part
from mistral_kernels.cpu.lanes import long_at
from mistral_kernels.cpu.shared import shared_at, store_shared
from mistral_kernels.cpu.team import (
    PHASE_BYTES,
    await_release,
    await_ticket,
    claim,
    completes,
    open_phases,
    release,
)
from mistral_kernels.cpu.work import (
    add_rows,
    attend_share,
    gate_and_up,
    merge_shares,
    multiply,
    norm,
    rotate_and_store,
    rows_of_three,
)

LEAD = -1
_ITEMS = 4  # of a matrix, for each thread


@part
def shares_of(sizes, columns, threads):
    """In how many shares the positions of a head are cut, so that all threads have some."""
    heads = columns * sizes.K
    if heads % threads == 0 or heads >= 4 * threads:
        return 1
    return (2 * threads + heads - 1) // heads


@part
def _read_qkv(sizes, addresses, own, layer, columns, threads, phase, ticket):
    """1. Q, K and V; then queries and keys are rotated, and keys and values stored."""
    tiles = own[0, 2] + own[1, 2] + own[2, 2]
    items = min(tiles, _ITEMS * threads)
    i = claim(phase, ticket, items)
    while i >= 0:
        first = tiles * i // items
        last = tiles * (i + 1) // items
        rows_of_three(sizes, addresses, own, first, last, columns)
        if completes(phase, items):
            rotate_and_store(sizes, addresses, layer, columns)
            release(phase, ticket)
        i = claim(phase, ticket, items)
    await_release(phase, ticket)


@part
def _attend_all(sizes, addresses, layer, columns, threads, phase, ticket):
    """2. Attention."""
    shares = shares_of(sizes, columns, threads)
    items = columns * sizes.K * shares
    i = claim(phase, ticket, items)
    while i >= 0:
        attend_share(sizes, addresses, layer, i, shares)
        if completes(phase, items):
            merge_shares(sizes, addresses, columns, shares)
            release(phase, ticket)
        i = claim(phase, ticket, items)
    await_release(phase, ticket)


@part
def _add_product(
    sizes,
    addresses,
    matrix,
    width,
    activations,
    norm_after,
    normed,
    columns,
    threads,
    phase,
    ticket,
):
    """3. and 5. O or down, added to x; then the next norm, of the first `normed` columns."""
    tiles = matrix[2]
    items = min(tiles, _ITEMS * threads)
    i = claim(phase, ticket, items)
    while i >= 0:
        first = tiles * i // items
        last = tiles * (i + 1) // items
        add_rows(sizes, addresses, matrix, first, last, width, columns, activations)
        if completes(phase, items):
            norm(sizes, addresses, norm_after, normed)
            release(phase, ticket)
        i = claim(phase, ticket, items)
    await_release(phase, ticket)


@part
def _read_gate_and_up(sizes, addresses, own, columns, threads, phase, ticket):
    """4. Gate and up."""
    groups = sizes.F // 32
    items = min(groups, _ITEMS * threads)
    i = claim(phase, ticket, items)
    while i >= 0:
        first = groups * i // items
        last = groups * (i + 1) // items
        gate_and_up(sizes, addresses, own, first, last, columns)
        if completes(phase, items):
            release(phase, ticket)
        i = claim(phase, ticket, items)
    await_release(phase, ticket)


@part
def _read_logits(sizes, addresses, matrix, columns, threads, phase, ticket):
    """After the layers: the output matrix."""
    tiles = matrix[2]
    items = min(tiles, 2 * _ITEMS * threads)
    activations = addresses.normed_activations
    stride = 32 * tiles
    i = claim(phase, ticket, items)
    while i >= 0:
        first = tiles * i // items
        last = tiles * (i + 1) // items
        groups = sizes.D // 32
        out = addresses.logits
        multiply(matrix, first, last, groups, columns, activations, out, stride)
        if completes(phase, items):
            release(phase, ticket)
        i = claim(phase, ticket, items)
    await_release(phase, ticket)


@part
def _run(sizes, addresses, matrices, norms, ticket):
    columns = long_at(addresses.orders)
    scored = long_at(addresses.orders + 8)
    threads = long_at(addresses.orders + 16)
    phase = addresses.phases
    attended = addresses.attended_activations
    gated = addresses.gated_activations
    NH = sizes.N * sizes.H
    for layer in range(sizes.layers):
        own = matrices[layer]
        after_attention = norms[2 * layer + 1]
        after_mlp = norms[2 * layer + 2]
        # How many columns lie together depends on how many are rounded: for the output matrix,
        # those that have logits.
        normed = scored if layer == sizes.layers - 1 else columns
        _read_qkv(sizes, addresses, own, layer, columns, threads, phase, ticket)
        phase += PHASE_BYTES
        _attend_all(sizes, addresses, layer, columns, threads, phase, ticket)
        phase += PHASE_BYTES
        _add_product(
            sizes, addresses, own[3], NH, attended, after_attention, columns,
            columns, threads, phase, ticket,
        )  # fmt: skip
        phase += PHASE_BYTES
        _read_gate_and_up(sizes, addresses, own, columns, threads, phase, ticket)
        phase += PHASE_BYTES
        _add_product(
            sizes, addresses, own[6], sizes.F, gated, after_mlp, normed,
            columns, threads, phase, ticket,
        )  # fmt: skip
        phase += PHASE_BYTES
    _read_logits(sizes, addresses, matrices[sizes.layers, 0], scored, threads, phase, ticket)


@compiled("step")
def take_part(sizes, addresses, matrices, norms, seen):
    """A step, or several: for all threads.

    seen      LEAD: do one step. A helper's: take part in each step after this one, until there was
              none for a while. Returns the number of the last step
    matrices  int64 [layers + 1, 7, 3], of q, k, v, o, gate, up, down; in the last row the output
              matrix: address of the product, address of the tiles, their number
    norms     float32 [2 layers + 1, D]
    """
    if seen == LEAD:
        ticket = shared_at(addresses.tickets) + 1
        columns = long_at(addresses.orders)
        norm(sizes, addresses, norms[0], columns)
        open_phases(addresses.phases, 5 * sizes.layers + 1, ticket)
        store_shared(addresses.tickets, ticket)
        _run(sizes, addresses, matrices, norms, ticket)
        return ticket
    while True:
        ticket = await_ticket(addresses.tickets, seen)
        if ticket < 0:
            return seen
        _run(sizes, addresses, matrices, norms, ticket)
        seen = ticket
