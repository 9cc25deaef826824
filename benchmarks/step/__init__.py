"""Benchmarks of whole distillation steps: variants of the loop, their roofline, and time by network."""
