"""The device that launches the kernels of a tensor: a GPU, or an emulator that a test installs."""

import torch

from mvsplit_ops._cuda.gpu import gpu
from mvsplit_ops._cuda.launch import Device

# Devices of tensors that are not on a GPU, by device type. Tests install an emulator here.
installed: dict[str, Device] = {}


def device_of(tensor: torch.Tensor) -> Device:
    """Return the device that runs kernels on this tensor."""
    return gpu(tensor.get_device()) if tensor.is_cuda else installed[tensor.device.type]
