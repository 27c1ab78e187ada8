"""Packed weights: ggml's block formats."""
