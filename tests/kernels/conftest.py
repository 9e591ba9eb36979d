"""Without a GPU, Triton kernels run in Triton's interpreter, on CPU tensors."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is defined

    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain_dot = InterpreterBuilder.create_dot

    def _widened(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def _dot(self, a, b, *arguments):
        """The interpreter (3.9.0) multiplies the bit patterns of bfloat16 as integers; this multiplies their values."""
        return plain_dot(self, _widened(a), _widened(b), *arguments)

    InterpreterBuilder.create_dot = _dot
