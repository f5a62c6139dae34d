"""Benchmark of the operators and of whole training steps: python -m bench; see README.md."""
