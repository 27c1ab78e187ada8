"""How good a model is: the model card's scoring rules, corrected ones, and an adapter for
lm-evaluation-harness.
"""
