"""The library of a parser's products: which it is, and that a row's result depends on nothing but the row."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_sas.core.cli import InputError
from megatron_sas.corpus.parsers import products
from megatron_sas.corpus.parsers.products import CHOICES, LIBRARIES, product, resolve, thinc_ops

X = np.random.default_rng(1).standard_normal((1000, 288), np.float32)
WEIGHT = np.random.default_rng(2).standard_normal((100, 288), np.float32)


@pytest.fixture(params=LIBRARIES)
def library(request):
    """The name of a library that can be used here, and its routine."""
    try:
        return resolve(request.param), LIBRARIES[request.param]()[1]
    except InputError as error:
        pytest.skip(str(error))


def test_rows_are_the_same_bits_in_any_company(library):
    whole = product(library[1], X, WEIGHT)
    np.testing.assert_allclose(whole, X.astype(np.float64) @ WEIGHT.T, atol=1e-4)
    for start, end in ((0, 0), (0, 1), (3, 5), (7, 199), (0, 192), (1, 193), (500, 1000)):
        assert np.array_equal(product(library[1], X[start:end], WEIGHT), whole[start:end])
    out = np.empty((1001, 100), np.float32)
    assert product(library[1], X, WEIGHT, out[1:]).base is out and np.array_equal(out[1:], whole)


def test_thinc_multiplies_so(library):
    pytest.importorskip("thinc")
    ops, whole = thinc_ops(library[0]), product(library[1], X, WEIGHT)
    assert np.array_equal(ops.gemm(X, WEIGHT, trans2=True), whole)
    assert np.array_equal(ops.gemm(X, np.ascontiguousarray(WEIGHT.T)), whole)
    np.testing.assert_allclose(ops.gemm(X, X, trans1=True), X.T @ X, atol=1e-2)


def test_the_fastest_is_one_that_keeps_rows_apart(monkeypatch):
    pytest.importorskip("blis")
    products._fastest.cache_clear()
    monkeypatch.setattr(products, "_keeps_rows_apart", lambda kind: kind == "numpy")
    assert resolve("fastest") in ("spacy", resolve("numpy"))
    if LIBRARIES["torch"]():
        with pytest.raises(InputError, match=r"--parser-ops torch: rounds a text by others .*give --parser-ops spacy"):
            resolve("torch")
    products._fastest.cache_clear()


def test_a_library_that_the_machine_lacks(monkeypatch):
    monkeypatch.setitem(LIBRARIES, "torch", lambda: None)
    products._load.cache_clear()
    assert resolve("spacy") == "spacy"
    for ops, message in (
        (
            "numpy (mkl)",
            r"^--parser-ops numpy \(mkl\): this machine has numpy \(.*\); outputs .* --parser-ops spacy",
        ),
        ("torch (mkl)", r"^--parser-ops torch \(mkl\): this machine has no such library; outputs that begin"),
        ("fugaku (ssl2)", r"^--parser-ops fugaku \(ssl2\): this machine has no such library; outputs that begin"),
        ("torch", r"^--parser-ops torch: this machine has no such library; .*--overwrite where parses are there$"),
    ):
        with pytest.raises(InputError, match=message):
            resolve(ops)
    products._load.cache_clear()
    assert CHOICES == ("fastest", "spacy", "numpy", "torch")
