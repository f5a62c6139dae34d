"""The Diffusion Transformer and its training objective.

dit          the model, its initial weights, activation checkpointing, the published layout
residual     the merges of a branch into the trunk: Post-Norm, LayerScale, ReZero, MV-Split
flow         rectified flow: path, loss, guidance, samplers
precision    dtypes of the parameters and of the forward pass
"""
