"""Triton kernels and their launchers: one module per operator, with <op>_fwd and <op>_bwd.

Installed and imported as mvsplit_ops.triton_kernels. The launchers take and return tensors;
autograd and torch.library are above them, in mvsplit_ops/_register.py.

    _common.py    availability, launching, the sum of partial rows
    _heads.py     the kernels of rope, qk_norm and rope_qk_norm
    _merge.py     rows of D in mvsplit_rmsnorm and residual_rmsnorm
    _segments.py  the tokens of a segment, in mvsplit_rmsnorm
"""
