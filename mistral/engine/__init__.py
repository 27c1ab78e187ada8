"""Generation: one forward pass after another, by the reference engine or a faster one."""
