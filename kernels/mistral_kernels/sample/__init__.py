"""Logits to the next id on the GPU."""
