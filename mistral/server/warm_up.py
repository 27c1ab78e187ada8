"""The first pass of every sort, before the server says that it is ready."""

from mistral.engine.base import Engine
from mistral.sampling import Sampling

_SHORT = 16  # ids; more are another sort of chunk to some engines


def warm_up(engine: Engine, chunk: int) -> None:
    """Make an empty engine do once what requests will ask for; it is empty again afterwards.

    The first time, kernels are compiled, threads start, and memory is touched: the first request
    would wait for that.
    """
    if engine.limit < 2:  # too small for an answer
        return
    B = engine.batch_size
    greedy = Sampling(temperature=0)
    # An engine with steps in flight records its CUDA graphs at the second time.
    for _ in range(2 if engine.steps_in_flight else 1):
        # One row: a long chunk, a short one, one id. Then all rows.
        for count, rows in ((chunk, 1), (_SHORT, 1), (1, 1), (1, B)):
            ids = [0] * min(count, engine.limit - 1)
            engine.prefill([ids if b < rows else [] for b in range(B)])
            engine.step([greedy if b < rows else None for b in range(B)]).tolist()
            # `erase`, not `rewind`: an id that no text has may make the model compute NaN.
            for b in range(rows):
                engine.erase(b)
