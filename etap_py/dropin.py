"""What the drop-in packages share beside `routing`: refusals in the words of the interface that they stand in for, and whether a tensor
that a plan was made from is still the same."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from etap_py.errors import EtapError

if TYPE_CHECKING:
    from torch import Tensor

# What a plan raises for arguments that don't fit.
REFUSALS = (ValueError, TypeError, EtapError)


class Words:
    """Refusals in other words, `raise words(refusal) from None`: `names` maps arguments of `etap_py.Plan` to what the caller calls them."""

    def __init__(self, names: Mapping[str, str]) -> None:
        longest_first = sorted(names, key=len, reverse=True)
        self._names = dict(names)
        self._pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)")

    def __call__(self, refusal: ValueError | TypeError | EtapError) -> Exception:
        """The same exception with another sentence."""
        sentence = refusal.message if isinstance(refusal, EtapError) else str(refusal)
        sentence = self._pattern.sub(lambda name: self._names[name[0]], sentence)
        given = (refusal.status, refusal.name, sentence) if isinstance(refusal, EtapError) else (sentence,)
        same: Exception = type(refusal)(*given)
        return same.with_traceback(refusal.__traceback__)


def state(tensor: Tensor) -> tuple[int, int]:
    """What differs once a tensor is another one or was written to: its address, and PyTorch's count of the operations that wrote to it.

    Known on the host without waiting. Keep the tensor, so that no other one takes its address. Not counted are writes through the
    pointer (kernels of Triton, replays of CUDA graphs) and writes to tensors that were made in inference mode.
    """
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version
