"""Timings: the paper's operator profile, a sweep over shapes, training steps, regressions."""
