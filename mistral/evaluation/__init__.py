"""Evaluation: the model card's scoring rules, corrected ones, and lm-evaluation-harness."""
