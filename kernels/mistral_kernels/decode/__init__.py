"""One new token for each row: the decode step and its kernels."""
