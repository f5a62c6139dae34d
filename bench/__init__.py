"""Measurement: what the operators cost on this machine, beside eager and torch.compile.

`python -m bench --help` lists the commands. Nothing is timed before its result was found right.
"""
