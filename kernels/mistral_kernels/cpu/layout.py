"""What the threads of a step share: the sizes, and where everything is.

Compiled code reads the records as int64, one after another.
"""

from typing import NamedTuple

MAX_COLUMNS = 32  # tokens of a step
AT_ONCE = 512  # rows of activations of a product, and tokens of a pass over a prompt
# Tiles that are multiplied at a time with many rows. Their sums take 256 kB of a thread's stack: it
# has 512 kB or more, unless `threading.stack_size` or a C library such as musl gives it less.
TILES_AT_ONCE = 16
AHEAD = 4096  # bytes that products ask for in advance
ORDERS = 4 + 2 * MAX_COLUMNS
VALUE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}  # of plain weights, and of the cache
LEAD = -1  # what the calling thread of a step passes as its last step (step.py)
MATRIX_BYTES = 24  # of a `Matrix`
GATE, UP = 4, 5  # of the seven matrices of a layer: q, k, v, o, gate, up, down
PHASE_BYTES = 192  # of a phase's counters: three cache lines (phases.py)


# Compiled code calls these two as well.


def rows_together(columns):
    """How many rows lie together, for so many rows of activations: 1, or a multiple of 4."""
    return 1 if columns == 1 else (columns + 3) // 4 * 4


def shares_of(columns, kv_heads, threads):
    """In how many shares the positions of a head are cut, so that all threads have some."""
    heads = columns * kv_heads
    if heads % threads == 0 or heads >= 4 * threads:
        return 1
    return (2 * threads + heads - 1) // heads


class Sizes(NamedTuple):
    """The sizes of the model and of the cache."""

    layers: int
    D: int  # hidden
    N: int  # query heads
    K: int  # key/value heads
    H: int  # of a head
    F: int  # of the MLP
    S: int  # slots of a cache row; one more is allocated
    window: int  # very large without one
    batch: int  # rows of the cache
    cell: int  # bytes of a value in the cache
    eps: int  # address of a float32


class Orders(NamedTuple):
    """How many tokens the next step has; their rows and positions come after that."""

    columns: int
    scored: int  # columns with logits: the first ones
    threads: int
    columns_of_shares: int  # contexts are cut into shares as a step of so many columns cuts them


class Matrix(NamedTuple):
    """A matrix of the table."""

    product: int  # address of the compiled loop (products.py, plain.py)
    weights: int
    tiles: int  # 8 rows each


class Addresses(NamedTuple):
    """Where everything is that the threads share.

    An `activations` is the table of five addresses that products take.
    """

    matrices: int  # [layers + 1, 7] of `Matrix`: q, k, v, o, gate, up, down; last the output matrix
    norms: int  # float32 [2 layers + 1, D]
    x: int  # float32 [32, D]: the residual stream
    normed: int  # float32 [32, D]
    normed_activations: int
    qkv: int  # float32 [32, (N + 2K) H], rows padded to 8 for each of the three
    queries: int  # float32 [32, N, H]: rotated and scaled
    parts: int  # float32 [32, K, shares, N/K, H + 8]: of the attention
    attended: int  # float32 [32, N H]
    attended_activations: int
    gated: int  # float32 [32, F]
    gated_activations: int
    up: int  # float32 [32, F]
    added: int  # float32 [32, D]: what O or down adds to x
    logits: int  # float32 [32, V padded to 8]
    frequencies: int  # float32 [H/2]: of the rotary embedding
    attention_factor: int  # float32
    cos: int  # float32 [32, H/2]: of the columns' positions
    sin: int
    attend: int  # the compiled attention
    store: int  # the compiled function that stores keys and values
    keys: int  # [layers, batch, K, S + 1, H] of the cache's dtype
    values: int
    phases: int  # of phases.py
    tickets: int
    orders: int  # `Orders`, then 32 rows and 32 positions, int64
