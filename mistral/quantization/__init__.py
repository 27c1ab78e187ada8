"""Packed weights: ggml's block types."""
