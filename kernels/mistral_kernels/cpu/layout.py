"""What the threads of a step share: the sizes, and where everything is."""

from typing import NamedTuple

MAX_COLUMNS = 32  # tokens of a step
AT_ONCE = 64  # rows of activations of one call of a product
AHEAD = 4096  # bytes that products ask for in advance
ORDERS = 3 + 2 * MAX_COLUMNS


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
    eps: float


class Addresses(NamedTuple):
    """Where everything is that the threads share: addresses of arrays.

    An `activations` is the table of five addresses that products take.
    """

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
    cos: int  # float32 [32, H/2]: of the columns' positions
    sin: int
    attend: int  # the compiled attention
    store: int  # the compiled function that stores keys and values
    keys: int  # [layers, batch, K, S + 1, H] of the cache's dtype
    values: int
    phases: int  # of team.py
    tickets: int
    orders: int  # int64: columns, columns with logits, threads, then 32 rows and 32 positions
