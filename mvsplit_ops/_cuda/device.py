"""The device that launches the kernels of a tensor: a GPU, or an emulator that a test installs."""

from torch import Tensor

from mvsplit_ops._cuda.gpu import get_gpu
from mvsplit_ops._cuda.launch import Device

# {device type: device} of tensors that are not on a GPU. Tests install an emulator here.
installed: dict[str, Device] = {}


def device_of(tensor: Tensor) -> Device:
    """Return the device that runs kernels on this tensor."""
    return get_gpu(tensor.get_device()) if tensor.is_cuda else installed[tensor.device.type]
