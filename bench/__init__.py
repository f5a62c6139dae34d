"""Measurement: what the operators cost on this machine, beside eager, torch.compile and the copy bandwidth.

`python -m bench --help` lists the commands. Nothing is timed before its result was found right.
"""
