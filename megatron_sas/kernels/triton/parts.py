"""Pieces that the Triton kernels share: the dropout mask, and loads of tiles, edges and their gradients.

Names in these files: B sequences, H heads, S tokens, D head dimension, b·H + h the number of a map. Scores are in units
of log 2, so that exp2 applies. EXACT: S and D fill every tile, so no load or store of one needs a mask.
"""

# ruff: noqa: ANN001, ANN201
# fmt: off
# Annotations must stay real objects here: Triton reads `tl.constexpr` from them.

import triton
import triton.language as tl

from megatron_sas.kernels import dropout

GOLDEN = tl.constexpr(dropout.GOLDEN)
MIX_1 = tl.constexpr(dropout.MIX_1)
MIX_2 = tl.constexpr(dropout.MIX_2)
ROWS = tl.constexpr(dropout.ROWS)
COLUMNS = tl.constexpr(dropout.COLUMNS)
SEARCH_CLASSES = ["seq_class", "maps_class"]
"""Integers that no kernel reads or is compiled for: searches for tile sizes are told apart by a kernel's arguments."""


@triton.jit
def block_and_map(seq, BLOCK: tl.constexpr):
    """The block of tokens and the map of this program.

    A grid's second axis ends at 65,535, its first at 2³¹ - 1: all programs lie on the first, blocks of a map together.
    """
    blocks = tl.cdiv(seq, BLOCK)
    program = tl.program_id(0)
    return program % blocks, program // blocks


@triton.jit
def mix(x):
    x = x ^ (x >> 16)
    x = x * tl.full([], MIX_1, tl.uint32)
    x = x ^ (x >> 15)
    x = x * tl.full([], MIX_2, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def dropout_keys(seed, number, which: tl.constexpr, index):
    """uint32 keys of rows or columns `index` of map `number`."""
    low = seed.to(tl.uint32)
    high = (seed >> 32).to(tl.uint32)
    base = mix(mix(mix((number * 2 + which).to(tl.uint32)) ^ high) ^ low)
    return mix(base + index.to(tl.uint32) * tl.full([], GOLDEN, tl.uint32)) | tl.full([], 1, tl.uint32)


@triton.jit
def keeps(row_keys, column_keys, THRESHOLD: tl.constexpr):
    """Which entries dropout keeps; the keys broadcast against each other."""
    return row_keys * column_keys >= tl.full([], THRESHOLD, tl.uint32)


@triton.jit
def valid_length(SEQLENS, b, seq, HAS_SEQLENS: tl.constexpr):
    """Columns that may be attended to; an empty sequence keeps its first, so that no row of the softmax is empty."""
    length = seq
    if HAS_SEQLENS:
        length = tl.minimum(tl.maximum(tl.load(SEQLENS + b).to(tl.int32), 1), seq)
    return length


@triton.jit
def edge_limit(SEQLENS, b, seq, HAS_SEQLENS: tl.constexpr):
    """Tokens that may have or be a head."""
    limit = seq
    if HAS_SEQLENS:
        limit = tl.minimum(tl.load(SEQLENS + b).to(tl.int32), seq)
    return limit


@triton.jit
def tiles_to_see(first, size, before, after, limit, seq, STEP: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Begin and end of the tokens that `size` tokens from `first` on may see: a multiple of STEP, and `limit`, or where
    the window ends. Padding sees all of its window, so that `limit` does not count there."""
    begin, end = 0, limit
    if HAS_WINDOW:
        begin = tl.maximum(first - before, 0) // STEP * STEP
        end = tl.minimum(seq, first + size + after)
    return begin, end


@triton.jit
def sees(rows, columns, before, after, length, seq):
    """Whether queries at `rows` see keys at `columns`, with a window; they broadcast."""
    near = (columns >= rows - before) & (columns <= rows + after)
    return near & ((columns < length) | ((rows >= length) & (columns < seq)))


@triton.jit
def load_heads(HEADS, tokens, limit):
    """int32 heads of `tokens`, -1 where there is no edge."""
    heads = tl.load(HEADS + tokens, mask=tokens < limit, other=-1).to(tl.int32)
    # Unsigned heads turn the -1 into a token, hence the comparison of `tokens` once more.
    return tl.where((tokens < limit) & (heads >= 0) & (heads < limit), heads, -1)


@triton.jit
def load_row(X, tokens, seq, other, EXACT: tl.constexpr):
    """`X[tokens]`, and `other` beyond S."""
    return tl.load(X + tokens) if EXACT else tl.load(X + tokens, mask=tokens < seq, other=other)


@triton.jit
def load_tile(X, tokens, dims, stride, seq, D: tl.constexpr, EXACT: tl.constexpr):
    """`X[tokens, dims]`; `tokens` and `dims` broadcast to the tile. 0 beyond S and beyond D."""
    where = X + tokens.to(tl.int64) * stride + dims
    return tl.load(where) if EXACT else tl.load(where, mask=(tokens < seq) & (dims < D), other=0.0)


@triton.jit
def store_tile(X, tokens, dims, stride, seq, value, D: tl.constexpr, EXACT: tl.constexpr):
    where = X + tokens.to(tl.int64) * stride + dims
    value = value.to(X.dtype.element_ty)
    if EXACT:
        tl.store(where, value)
    else:
        tl.store(where, value, mask=(tokens < seq) & (dims < D))


@triton.jit
def load_entry_gradient(P, GRAD, tokens, limit, HAS_GRAD: tl.constexpr):
    """g = p · ∂L/∂p of the tokens' entries; 0 without a gradient."""
    if HAS_GRAD:
        mask = tokens < limit
        return tl.load(P + tokens, mask=mask, other=0.0) * tl.load(GRAD + tokens, mask=mask, other=0.0)
    return tl.zeros(tokens.shape, tl.float32)
