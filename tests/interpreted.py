"""The fused attention on a GPU or, where there is none, in Triton's interpreter: import it from
here in tests.
"""

import os
from typing import Any
from unittest import mock

import pytest
import torch
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
with mock.patch.dict(os.environ, {} if DEVICE == "cuda" else {"TRITON_INTERPRET": "1"}):
    # read where kernels are defined
    from imprompt.attention import autotune, fused

__all__ = ["DEVICE", "Counted", "autotune", "fused", "interpret"]


def interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's own functions too, which were compiled ones if anything imported Triton before."""
    for name in ("sum", "max") if DEVICE == "cpu" else ():
        monkeypatch.setattr(tl, name, InterpretedFunction(getattr(tl, name).fn))


class Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **kwargs or {})
