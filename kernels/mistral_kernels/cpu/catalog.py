"""Which kernels there are, by name. Importing this imports numba."""

from collections.abc import Callable

from mistral_kernels.cpu import attention, groups, packing, plain, products, rounding, rows, step

_KERNELS: dict[str, Callable] = {
    "step": step.step,
    "round rows": rounding.round_rows,
    "norm rows": rows.norm_rows,
    "gate rows": rows.gate_rows,
    "rotate rows": rows.rotate_rows,
}
_KERNELS_OF_A_TYPE: dict[str, Callable[[str], Callable]] = {
    "product": products.product,
    "row": groups.row_of_tiles,
    "tiles": packing.tiles_of,
    "plain product": plain.plain_product,
    "attention": attention.attention,
    "storing": attention.storing,
}


def kernel(name: str) -> Callable:
    """The function that is compiled as "step", "product of Q4_K", "attention of float32", ..."""
    if name in _KERNELS:
        return _KERNELS[name]
    what, _, of = name.partition(" of ")
    return _KERNELS_OF_A_TYPE[what](of)
