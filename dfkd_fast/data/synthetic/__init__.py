"""Sets that are drawn, not read."""
