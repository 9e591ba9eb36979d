"""Which library computes the matrix products of spaCy's CPU models.

spaCy brings BLIS, whose wheels have no kernels for many processors: products are then a third of the time of a parse,
and other libraries compute them three times as fast. Libraries differ in rounding, which moves few heads, so one is
chosen per output and recorded in its header.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_sas.core.cli import InputError

if TYPE_CHECKING:
    from thinc.api import NumpyOps

SPACY, FASTEST = "spacy", "fastest"
OPS_HELP = (
    "what multiplies the matrices of spaCy's CPU models: spaCy's own library, numpy's, torch's, or the fastest on this "
    "machine (the default). A few heads differ (docs/data.md). All outputs of a folder keep to one library"
)

# Rows of every product. Libraries round a row by the number of rows it is computed with; with this number only, a row
# in any company has the same result, and so has a text.
_ROWS = 192
_SHAPES = ((288, 288), (576, 288), (96, 64), (64, 1024), (300, 96))  # (K, M) of spaCy's models; 300: word vectors

_WORTH = 1.2  # how much faster a library must be than those before it: near a tie noise would choose
_INSTEAD = (
    "outputs that begin with a library go on with it, on machines that have it; for all machines give --parser-ops "
    "spacy, with another output or --overwrite where parses are there"
)

Multiply = Callable[[np.ndarray, np.ndarray, np.ndarray], object]  # of (N, K) and (M, K), contiguous, into (N, M)


def _numpy() -> tuple[str, Multiply]:
    name = np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"]
    return f"numpy ({name})", lambda x, weight, out: np.matmul(x, weight.T, out=out)


def _torch() -> tuple[str, Multiply] | None:
    """Intel's MKL out of torch, which itself is not imported: that takes every worker 2 s and 200 MB."""
    spec = importlib.util.find_spec("torch")
    try:
        library = ctypes.CDLL(str(Path(spec.origin).with_name("lib") / "libtorch_cpu.so")) if spec else None
        sgemm, set_threads = library.sgemm_, library.MKL_Set_Num_Threads_Local
    except (AttributeError, OSError):  # not installed, or another system's
        return None

    def multiply(x: np.ndarray, weight: np.ndarray, out: np.ndarray) -> None:
        m, n, k = (ctypes.byref(ctypes.c_int64(size)) for size in (len(weight), *x.shape))
        one, zero = (ctypes.byref(ctypes.c_float(value)) for value in (1, 0))
        x_at, weight_at, out_at = (ctypes.c_void_p(array.ctypes.data) for array in (x, weight, out))
        before = set_threads(1)  # more would only wait for each other
        sgemm(b"T", b"N", m, n, k, one, weight_at, k, x_at, k, zero, out_at, m)  # columns first: outᵀ = weight · xᵀ
        set_threads(before)

    return "torch (mkl)", multiply


LIBRARIES = {"numpy": _numpy, "torch": _torch}
CHOICES = (FASTEST, SPACY, *LIBRARIES)  # of --parser-ops
_load = functools.cache(lambda kind: LIBRARIES.get(kind, lambda: None)())  # name and routine, or None


def product(multiply: Multiply, x: np.ndarray, weight: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """`x · weightᵀ` of float32 `(N, K)` and `(M, K)`, into a contiguous `out` `(N, M)` if one is given."""
    x, weight = (np.ascontiguousarray(array, np.float32) for array in (x, weight))
    out = np.empty((len(x), len(weight)), np.float32) if out is None else out
    whole = len(x) - len(x) % _ROWS
    for start in range(0, whole, _ROWS):
        multiply(x[start : start + _ROWS], weight, out[start : start + _ROWS])
    if whole < len(x):
        last, result = np.zeros((_ROWS, x.shape[1]), np.float32), np.empty((_ROWS, len(weight)), np.float32)
        last[: len(x) - whole] = x[whole:]
        multiply(last, weight, result)
        out[whole:] = result[: len(x) - whole]
    return out


def thinc_ops(ops: str) -> NumpyOps:
    """thinc's operations on the CPU, with the products of a library that `resolve` returned."""
    from thinc.api import NumpyOps

    multiply = _load(ops.partition(" ")[0])[1]

    class Ops(NumpyOps):
        def gemm(self, x, y, out=None, trans1=False, trans2=False):  # noqa: ANN001, ANN202
            return product(multiply, x.T if trans1 else x, y if trans2 else y.T, out)

    return Ops()


def resolve(ops: str) -> str:
    """The library that one of `CHOICES`, or the name in a header, stands for: `spacy`, or a name such as `torch (mkl)`.

    Raises:
        InputError: this machine lacks the library, or what it has rounds rows by their neighbours.
    """
    if ops in (SPACY, FASTEST):
        return ops if ops == SPACY else _fastest()
    kind = ops.partition(" ")[0]
    name = (_load(kind) or ("",))[0]
    if not name or ops not in (kind, name):
        raise InputError(f"--parser-ops {ops}: this machine has {name or 'no such library'}; {_INSTEAD}")
    if not _keeps_rows_apart(kind):
        raise InputError(f"--parser-ops {ops}: rounds a text by others beside it on this processor; {_INSTEAD}")
    return name


@functools.cache
def _fastest() -> str:
    """Measured on the commonest product of spaCy's small models, within some milliseconds."""
    try:
        from blis.py import gemm
    except ImportError:  # spaCy has another library, as on Apple's processors
        return SPACY
    x, weight = _factors(*_SHAPES[0])
    routines = {_load(kind)[0]: _load(kind)[1] for kind in LIBRARIES if _load(kind) and _keeps_rows_apart(kind)}
    work = {SPACY: lambda: gemm(x, weight, trans2=True)}
    work |= {name: functools.partial(product, multiply, x, weight) for name, multiply in routines.items()}
    seconds = {name: min(timeit.repeat(routine, number=1, repeat=9)) for name, routine in work.items()}
    best = SPACY
    for name in routines:
        if seconds[best] > _WORTH * seconds[name]:
            best = name
    return best


@functools.cache
def _keeps_rows_apart(kind: str) -> bool:
    """Whether a row has the same result in every place of a product, to the bit, and the right one.

    (OpenBLAS 0.3.31 on processors with AVX2 alone computes six rows of twelve in another way.)
    """
    multiply, order = _load(kind)[1], np.random.default_rng(0).permutation(_ROWS)
    for x, weight in (_factors(*shape) for shape in _SHAPES):
        result = product(multiply, x, weight)
        if not np.array_equal(product(multiply, x[order], weight), result[order]):
            return False
        if not np.allclose(result, x @ weight.T, atol=1e-3):
            return False
    return True


def _factors(k: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    return generator.standard_normal((_ROWS, k), np.float32), generator.standard_normal((m, k), np.float32)
