"""What the drop-in packages share beside `routing` and refusals in their own words (`errors.Words`): whether a tensor that a plan was made
from is still the same."""

from __future__ import annotations

from torch import Tensor


def check_tensors(**arguments: object) -> None:
    """Raises TypeError for an argument that is no tensor of PyTorch."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}; allowed: a tensor")


class Watched:
    """A tensor that something was made from: kept, so that no other one takes its address, to tell whether it is still the same."""

    __slots__ = ("_address", "_tensor", "_version")

    def __init__(self, tensor: Tensor | None) -> None:
        self._tensor = tensor
        self._address: int | None = None
        self._version: int | None = None
        if isinstance(tensor, Tensor):
            self._address = tensor.data_ptr()
            self._version = None if tensor.is_inference() else tensor._version

    def _is_view_of_it(self, tensor: Tensor) -> bool:
        if self._tensor is None or not isinstance(tensor, Tensor) or tensor.data_ptr() != self._address:
            return False
        return (tensor.shape, tensor.stride(), tensor.dtype) == (self._tensor.shape, self._tensor.stride(), self._tensor.dtype)

    def is_still(self, tensor: Tensor | None) -> bool:
        """False for a tensor at another address or of another shape, and once an operation of PyTorch wrote to this one: what the host
        knows without waiting.

        Not noticed are writes through the pointer (kernels of Triton, replays of CUDA graphs) and writes to tensors that were made in
        inference mode. None stays the same; what else is no tensor of PyTorch never is.
        """
        if tensor is None:
            return self._tensor is None
        if tensor is not self._tensor and not self._is_view_of_it(tensor):
            return False
        return tensor._version == self._version if self._version is not None else self._address is not None
