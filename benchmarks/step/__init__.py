"""Benchmarks of whole distillation steps: variants of the loop, their roofline, accuracy and time by network."""
