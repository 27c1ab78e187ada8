"""The types of tensors in a GGUF file: how many weights make a block, and its size in bytes.

The numbers 4, 5, 31 to 33 and 36 to 38 were removed from ggml; Q8_1 and Q8_K exist in memory only.

Source: ggml's table `type_traits`,
https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml.c
"""

from typing import NamedTuple

from mistral.errors import CheckpointError


class GgmlType(NamedTuple):
    """One type."""

    name: str
    block_weights: int
    block_bytes: int


GGML_TYPES = {
    0: GgmlType("F32", 1, 4),
    1: GgmlType("F16", 1, 2),
    2: GgmlType("Q4_0", 32, 18),
    3: GgmlType("Q4_1", 32, 20),
    6: GgmlType("Q5_0", 32, 22),
    7: GgmlType("Q5_1", 32, 24),
    8: GgmlType("Q8_0", 32, 34),
    10: GgmlType("Q2_K", 256, 84),
    11: GgmlType("Q3_K", 256, 110),
    12: GgmlType("Q4_K", 256, 144),
    13: GgmlType("Q5_K", 256, 176),
    14: GgmlType("Q6_K", 256, 210),
    16: GgmlType("IQ2_XXS", 256, 66),
    17: GgmlType("IQ2_XS", 256, 74),
    18: GgmlType("IQ3_XXS", 256, 98),
    19: GgmlType("IQ1_S", 256, 50),
    20: GgmlType("IQ4_NL", 32, 18),
    21: GgmlType("IQ3_S", 256, 110),
    22: GgmlType("IQ2_S", 256, 82),
    23: GgmlType("IQ4_XS", 256, 136),
    28: GgmlType("F64", 1, 8),
    29: GgmlType("IQ1_M", 256, 56),
    30: GgmlType("BF16", 1, 2),
    34: GgmlType("TQ1_0", 256, 54),
    35: GgmlType("TQ2_0", 256, 66),
    39: GgmlType("MXFP4", 32, 17),
    40: GgmlType("NVFP4", 64, 36),
}

_NOT_READ = {
    9: "Q8_1",
    15: "Q8_K",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    41: "Q1_0",
    42: "Q2_0",
}


def ggml_type(number: int, tensor: str) -> GgmlType:
    """The type with this number.

    Raises CheckpointError, which names the tensor and the type, for one that is not read.
    """
    if number not in GGML_TYPES:
        what = f" ({_NOT_READ[number]})" if number in _NOT_READ else ", an unknown or removed one"
        raise CheckpointError(f"{tensor} is stored as ggml type {number}{what}, which is not read")
    return GGML_TYPES[number]
