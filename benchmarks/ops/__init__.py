"""Microbenchmarks of the ops: cases, timing, launch tuning, compilation without a GPU, and the drop-ins."""
