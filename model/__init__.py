"""The Diffusion Transformer that exercises the operators, and its training loop.

Runs from the checkout (`python -m model`); it is not part of the wheel.
"""
