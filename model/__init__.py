"""The Diffusion Transformer of arXiv 2605.06169, its trainer and the collapse guard.

It runs from the checkout (`python -m model`) and is not part of the wheel.

config, options    the configuration of a run; the command line
rng                counter-based random numbers
nn                 the model and rectified flow
data               synthetic images; precomputed latents
stability          metrics of a collapse, the guard that detects it, traces
evaluate           samples, and their agreement with captions
train              training loop, checkpoints, memory plan
demo, info         the commands of these names
studies            small trainings that test a claim
"""
