"""The stages of gpu_run.py that are no scripts of their own; each prints lines of JSON."""
