"""Quantized weights in the layout of the kernels, and the kernels that multiply or unpack them."""
