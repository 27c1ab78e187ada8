"""How llama.cpp's `llama-quantize` packs a model: a format is a mixture of types.

Source: llama.cpp, src/llama-quant.cpp (`llama_tensor_get_type`), without an importance matrix
"""

from mistral.quantization.ggml_types import GGML_TYPES, GgmlType

# The type of most matrices
MOST = {
    "Q8_0": "Q8_0",
    "Q6_K": "Q6_K",
    "Q5_K_M": "Q5_K",
    "Q5_0": "Q5_0",
    "Q4_K_M": "Q4_K",
    "IQ4_XS": "IQ4_XS",
    "IQ4_NL": "IQ4_NL",
    "Q4_0": "Q4_0",
    "Q3_K_M": "Q3_K",
    "Q2_K": "Q2_K",
}
# If rows are not whole blocks of 256, a type with blocks of 32
_FALLBACKS = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "IQ4_XS": "IQ4_NL",
}
_TYPES = {kind.name: kind for kind in GGML_TYPES.values()}


def kind_of(format: str, name: str, layer: int, layers: int, group: int) -> GgmlType:
    """The type of a matrix in a format, before its width is considered.

    name    the last part of its module's name: q_proj, ..., lm_head (also for a tied embedding)
    layer   of `layers`, from 0
    group   query heads for each key/value head
    """
    finer = {
        "lm_head": lambda: "Q8_0" if format == "Q8_0" else "Q6_K",
        "v_proj": lambda: _value_kind(format, layer, layers, group),
        "down_proj": lambda: _down_kind(format, layer, layers),
        "o_proj": lambda: {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K"}.get(format),
    }
    chosen = finer[name]() if name in finer else None
    return _TYPES[chosen or MOST[format]]


def fitting(kind: GgmlType, columns: int) -> GgmlType:
    """The type itself, or its replacement if rows of `columns` weights are not whole blocks.

    Raises ValueError for rows that are not whole blocks of 32.
    """
    if columns % kind.block_weights == 0:
        return kind
    if columns % 32:
        raise ValueError(f"rows of {columns} weights are not whole blocks of 32")
    return _TYPES[_FALLBACKS[kind.name]]


def _value_kind(format: str, layer: int, layers: int, group: int) -> str | None:
    if format == "Q2_K":
        return "Q4_K" if group >= 4 else "Q3_K"
    if format == "Q3_K_M":
        return "Q5_K" if layer < 2 else "Q4_K"
    if format in ("IQ4_XS", "IQ4_NL") and group >= 4:
        return "Q5_K"
    return _more_bits(format, layer, layers)


def _down_kind(format: str, layer: int, layers: int) -> str | None:
    if format == "Q2_K":
        return "Q3_K"
    if format == "Q3_K_M":
        return "Q5_K" if layer < layers // 16 else "Q4_K"
    if format in ("IQ4_XS", "IQ4_NL") and layer < layers // 8:
        return "Q5_K"
    return _more_bits(format, layer, layers)


def _more_bits(format: str, layer: int, layers: int) -> str | None:
    """Half of the layers: the first and last eighth, and every third one between them."""
    tail = layers // 8
    middle = tail <= layer < 7 * layers // 8
    chosen = not middle or (layer - tail) % 3 == 2
    return "Q6_K" if chosen and format in ("Q4_K_M", "Q5_K_M") else None
