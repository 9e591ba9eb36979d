"""Triton kernels in Triton's interpreter, on CPU tensors, where there is no GPU."""

from __future__ import annotations

import os
from types import SimpleNamespace

import torch


def interpret_kernels() -> None:
    """Have kernels interpreted in this process; before Triton is imported. Programs it starts are not affected."""
    if torch.cuda.is_available():
        return
    os.environ["TRITON_INTERPRET"] = "1"  # while Triton's own functions are defined
    import triton

    triton.knobs.runtime.interpret = True  # which sets the variable too
    del os.environ["TRITON_INTERPRET"]
    _refuse_bfloat16()
    _skip_repeated_work()


def _skip_repeated_work() -> None:
    """Halve the interpreter's time; the numbers stay as they are.

    Triton 3.7.1's replaces all functions of `triton.language` for every call of a device function, builds a table of
    dtypes for every operation, and computes checks of integer overflow, which it drops without `debug`.
    """
    import triton.runtime.interpreter as interpreter

    patch_lang, numpy_dtype, known = interpreter._patch_lang, interpreter._get_np_dtype, {}
    everywhere = SimpleNamespace(__globals__={"tl": interpreter.tl, "core": interpreter.tl.core})

    def known_dtype(dtype):
        if dtype.name not in known:
            known[dtype.name] = numpy_dtype(dtype)
        return known[dtype.name]

    interpreter._get_np_dtype = known_dtype
    interpreter._patch_lang = lambda fn: patch_lang(everywhere)  # once a launch, for all that it calls
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


def _refuse_bfloat16() -> None:
    """Have every launch with a bfloat16 tensor fail: what the interpreter computes with it says nothing about a GPU.

    Triton 3.7.1's multiplies bit patterns as integers, and rounds float32 by cutting bits off.
    """
    import triton.runtime.interpreter as interpreter

    launch = interpreter.GridExecutor.__call__

    def checked(self, *arguments, **constants):
        if any(getattr(x, "dtype", None) == torch.bfloat16 for x in (*arguments, *constants.values())):
            raise AssertionError("Triton's interpreter cannot compute with bfloat16; test it on a GPU")
        return launch(self, *arguments, **constants)

    if launch.__module__ != __name__:
        interpreter.GridExecutor.__call__ = checked
