"""Triton kernels and their launchers, one module an operator: <op>_fwd and <op>_bwd on tensors.

Installed and imported as mvsplit_ops.triton_kernels; knows nothing of autograd or torch.library.
"""
