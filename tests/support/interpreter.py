"""Triton kernels in Triton's interpreter, on CPU tensors, where there is no GPU."""

from __future__ import annotations

import os

import torch


def interpret_kernels() -> None:
    """Have kernels interpreted in this process; before Triton is imported. Programs it starts are not affected."""
    if torch.cuda.is_available():
        return
    os.environ["TRITON_INTERPRET"] = "1"  # while Triton's own functions are defined
    import triton

    triton.knobs.runtime.interpret = True  # which sets the variable too
    del os.environ["TRITON_INTERPRET"]
    _repair_dot()


def _repair_dot() -> None:
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain_dot = InterpreterBuilder.create_dot
    if plain_dot.__module__ == __name__:
        return

    def widened(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(self, a, b, *arguments):
        """The interpreter (3.7.1) multiplies the bit patterns of bfloat16 as integers; this multiplies their values."""
        return plain_dot(self, widened(a), widened(b), *arguments)

    InterpreterBuilder.create_dot = dot
