"""One forward pass for up to 32 tokens, as one compiled function that every thread runs.

The tokens are columns of the activations: one token of each row of a batch, or a few tokens of one
row, or both. Each layer is five phases, whose items the threads claim (phases.py):

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

from mistral_kernels.cpu import layout
from mistral_kernels.cpu.compiler import part
from mistral_kernels.cpu.layout import LEAD, MATRIX_BYTES, PHASE_BYTES
from mistral_kernels.cpu.phases import (
    await_release,
    await_ticket,
    claim,
    completes,
    is_released,
    open_phases,
    release,
)
from mistral_kernels.cpu.shared import (
    addresses_at,
    matrix_at,
    orders_at,
    shared_at,
    sizes_at,
    store_shared,
)
from mistral_kernels.cpu.work import (
    add_rows,
    angles,
    attend_share,
    gate_and_up,
    merge_shares,
    multiply,
    norm,
    rotate_and_store,
    rows_of_three,
)

_QKV, _ATTENTION, _OUTPUT, _GATE_UP, _DOWN = range(5)
_PHASES = 5  # of a layer
_LOGITS = 5  # the phase after all layers
_ITEMS = 4  # of a matrix, for each thread; twice as many of the output matrix

_shares_of = part(layout.shares_of)


@part
def _matrix(table, which):
    return matrix_at(table + MATRIX_BYTES * which)


@part
def _size_of(sizes, orders, kind, table):
    """What a phase divides: tiles of a matrix, groups of 32 rows, or shares of heads."""
    if kind == _QKV:
        return _matrix(table, 0).tiles + _matrix(table, 1).tiles + _matrix(table, 2).tiles
    if kind == _ATTENTION:
        shares = _shares_of(orders.columns_of_shares, sizes.K, orders.threads)
        return orders.columns * sizes.K * shares
    if kind == _OUTPUT:
        return _matrix(table, 3).tiles
    if kind == _GATE_UP:
        return sizes.F // 32
    if kind == _DOWN:
        return _matrix(table, 6).tiles
    return _matrix(table, 0).tiles


@part
def _items_of(orders, kind, size):
    """Into how many items a phase divides that."""
    if kind == _ATTENTION:
        return size
    if kind == _LOGITS:
        return min(size, 2 * _ITEMS * orders.threads)
    return min(size, _ITEMS * orders.threads)


@part
def _do_item(sizes, addresses, orders, kind, layer, table, first, last):
    """An item of a phase: `first` to `last` of its size."""
    columns = orders.columns
    if kind == _QKV:
        rows_of_three(sizes, addresses, table, first, last, columns)
    elif kind == _ATTENTION:
        shares = _shares_of(orders.columns_of_shares, sizes.K, orders.threads)
        attend_share(sizes, addresses, layer, first, shares)
    elif kind in (_OUTPUT, _DOWN):
        # One call for the two, so that it is compiled once.
        width = sizes.N * sizes.H
        activations = addresses.attended_activations
        which = 3
        if kind == _DOWN:
            width = sizes.F
            activations = addresses.gated_activations
            which = 6
        add_rows(sizes, addresses, _matrix(table, which), first, last, width, columns, activations)
    elif kind == _GATE_UP:
        gate_and_up(sizes, addresses, table, first, last, columns)
    else:
        head = _matrix(table, 0)
        stride = 32 * head.tiles
        x = addresses.normed_activations
        out = addresses.logits
        multiply(head, first, last, sizes.D // 32, orders.scored, x, out, stride)


@part
def _finish(sizes, addresses, orders, kind, layer):
    """What is left to do once when all items of a phase are done."""
    columns = orders.columns
    if kind == _QKV:
        rotate_and_store(sizes, addresses, layer, columns)
    elif kind == _ATTENTION:
        shares = _shares_of(orders.columns_of_shares, sizes.K, orders.threads)
        merge_shares(sizes, addresses, columns, shares)
    elif kind in (_OUTPUT, _DOWN):
        which = 2 * layer + (1 if kind == _OUTPUT else 2)
        # How many columns lie together depends on how many are rounded: for the output matrix,
        # those that have logits.
        if which == 2 * sizes.layers:
            columns = orders.scored
        norm(sizes, addresses, addresses.norms + 4 * sizes.D * which, columns)


@part
def _run(sizes, addresses, orders, ticket):
    """All phases of step `ticket`."""
    for p in range(_PHASES * sizes.layers + 1):
        layer = p // _PHASES
        kind = _LOGITS if layer == sizes.layers else p % _PHASES
        table = addresses.matrices + 7 * MATRIX_BYTES * layer
        phase = addresses.phases + PHASE_BYTES * p
        size = _size_of(sizes, orders, kind, table)
        items = _items_of(orders, kind, size)
        i = claim(phase, ticket, items)
        while i >= 0:
            first = size * i // items
            last = size * (i + 1) // items
            _do_item(sizes, addresses, orders, kind, layer, table, first, last)
            if completes(phase, items):
                _finish(sizes, addresses, orders, kind, layer)
                release(phase, ticket)
            i = claim(phase, ticket, items)
        await_release(phase, ticket)


def step(sizes_address, addresses_address, seen):
    """A step, or several: for all threads.

    The first two are addresses of a `Sizes` and an `Addresses`.

    seen  LEAD: do one step. A helper's: take part in each step after this one, until there was none
          for a while. Returns the number of the last step
    """
    sizes = sizes_at(sizes_address)
    addresses = addresses_at(addresses_address)
    leads = seen == LEAD
    count = _PHASES * sizes.layers + 1
    last_phase = addresses.phases + PHASE_BYTES * (count - 1)
    if leads:
        seen = shared_at(addresses.tickets)
        orders = orders_at(addresses.orders)
        angles(sizes, addresses, orders.columns)
        norm(sizes, addresses, addresses.norms, orders.columns)
        open_phases(addresses.phases, count, seen + 1)
        store_shared(addresses.tickets, seen + 1)
    while True:
        ticket = await_ticket(addresses.tickets, seen)
        if ticket < 0:
            return seen
        orders = orders_at(addresses.orders)
        # If the step has ended without this thread, these may be the orders of the next one.
        if not is_released(last_phase, ticket):
            _run(sizes, addresses, orders, ticket)
        if leads:
            return ticket
        seen = ticket
