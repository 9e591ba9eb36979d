"""Dependency attention in Triton, forward: flash attention, and one dot product for each entry of an edge.

Entries are not picked out of the S × S tiles, which would cost a comparison and a selection for every score of a tile:
a token gathers the key and the query of its head (they lie in cache) at D multiplications each.
"""

# ruff: noqa: ANN001, ANN201
# fmt: off
# Annotations must stay real objects here: Triton reads `tl.constexpr` from them.

import triton
import triton.language as tl

from megatron_sas.kernels.triton.parts import (
    COLUMNS,
    ROWS,
    SEARCH_CLASSES,
    block_and_map,
    dropout_keys,
    edge_limit,
    keeps,
    load_heads,
    load_row,
    load_tile,
    sees,
    store_tile,
    tiles_to_see,
    valid_length,
)


@triton.jit
def dropout_keys_kernel(SEED, KEYS, num_maps, seq, BLOCK: tl.constexpr):
    """KEYS int32 `(2, B·H, S)`: the keys of all rows and all columns."""
    block, number = block_and_map(seq, BLOCK)
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    seed = tl.load(SEED)
    at = number.to(tl.int64) * seq + tokens
    tl.store(KEYS + at, dropout_keys(seed, number, ROWS, tokens).to(tl.int32, bitcast=True), mask=tokens < seq)
    at += num_maps * seq
    tl.store(KEYS + at, dropout_keys(seed, number, COLUMNS, tokens).to(tl.int32, bitcast=True), mask=tokens < seq)


@triton.jit(do_not_specialize=SEARCH_CLASSES)
def forward_kernel(
    # Inputs and outputs: (B, H, S, D), HEADS (B, S), SEQLENS (B,), KEYS of dropout (2, B·H, S), entries (B, H, S).
    Q, K, V, HEADS, SEQLENS, KEYS, OUT, LSE, TO_HEAD, TO_DEPENDENT,
    # Strides of sequence, head and token; a token's D numbers lie together.
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_ob, stride_oh, stride_os,
    # Sizes and factors: B·H, H, S, on scores and on what dropout keeps; keys that a query sees before and after it; the
    # classes are read by the search only.
    num_maps, num_heads, seq, scale, keep_scale, before, after, seq_class, maps_class,
    # What is compiled for: the shape, the arguments that are there, dropout, precision, tile sizes.
    D: tl.constexpr, BLOCK_D: tl.constexpr, HAS_HEADS: tl.constexpr, HAS_SEQLENS: tl.constexpr,
    HAS_WINDOW: tl.constexpr, THRESHOLD: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """One block of BLOCK_M query rows of one map.

    `scale` is scale / ln 2; LSE is in units of log 2. TO_DEPENDENT gets scores, which `finish_kernel` turns into
    probabilities: those need the LSE of other rows. EVEN: S is a multiple of every tile size.
    """
    block, number = block_and_map(seq, BLOCK_M)
    first = block * BLOCK_M
    b, h = (number // num_heads).to(tl.int64), (number % num_heads).to(tl.int64)
    at = number.to(tl.int64) * seq
    rows, dims = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    length = valid_length(SEQLENS, b, seq, HAS_SEQLENS)
    Q += b * stride_qb + h * stride_qh
    K += b * stride_kb + h * stride_kh
    V += b * stride_vb + h * stride_vh
    EXACT: tl.constexpr = EVEN and D == BLOCK_D
    FULL: tl.constexpr = EVEN and not HAS_SEQLENS
    q = load_tile(Q, rows[:, None], dims[None, :], stride_qs, seq, D, EXACT)  # (rows, D)
    row_keys = tl.zeros([BLOCK_M], tl.uint32)
    if THRESHOLD > 0:
        row_keys = load_row(KEYS + at, rows, seq, 0, EVEN).to(tl.uint32, bitcast=True)
        KEYS += num_maps * seq + at  # of the columns

    to_head = tl.zeros([BLOCK_M], tl.float32)  # (rows,)
    edge = rows < 0
    if HAS_HEADS:
        heads = load_heads(HEADS + b * seq, rows, edge_limit(SEQLENS, b, seq, HAS_SEQLENS))
        edge = heads >= 0
        at_head, there = tl.maximum(heads, 0)[:, None], edge[:, None] & (dims < D)[None, :]
        key = tl.load(K + at_head.to(tl.int64) * stride_ks + dims[None, :], mask=there, other=0.0)  # (rows, D)
        to_head = tl.sum(q.to(tl.float32) * key.to(tl.float32), 1) * scale
        query = tl.load(Q + at_head.to(tl.int64) * stride_qs + dims[None, :], mask=there, other=0.0)
        key = load_tile(K, rows[:, None], dims[None, :], stride_ks, seq, D, EXACT)
        to_dependent = tl.sum(query.to(tl.float32) * key.to(tl.float32), 1) * scale
        tl.store(TO_DEPENDENT + at + rows, to_dependent, mask=rows < seq)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)  # (rows, D)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)  # largest score so far, before scaling
    total = tl.zeros([BLOCK_M], tl.float32)
    begin, end = tiles_to_see(first, BLOCK_M, before, after, length, seq, BLOCK_N, HAS_WINDOW)
    for start in range(begin, end, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        k = load_tile(K, columns[None, :], dims[:, None], stride_ks, seq, D, EXACT)  # (D, columns)
        scores = tl.dot(q, k, input_precision=PRECISION)  # (rows, columns)
        if HAS_WINDOW:
            seen = sees(rows[:, None], columns[None, :], before, after, length, seq)
            scores = tl.where(seen, scores, float("-inf"))
        elif not FULL:
            scores = tl.where(columns[None, :] < length, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = new_top
        if HAS_WINDOW:  # a row may see nothing of its first tiles
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
        probs = tl.exp2(scores * scale - (base * scale)[:, None])
        shrink = tl.exp2((top - base) * scale)
        total = total * shrink + tl.sum(probs, 1)
        if THRESHOLD > 0:
            column_keys = load_row(KEYS, columns, seq, 0, EVEN).to(tl.uint32, bitcast=True)
            probs = tl.where(keeps(row_keys[:, None], column_keys[None, :], THRESHOLD), probs, 0.0)
        v = load_tile(V, columns[:, None], dims[None, :], stride_vs, seq, D, EXACT)  # (columns, D)
        acc = tl.dot(probs.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top
    if HAS_WINDOW:  # beyond S a row may see nothing
        total = tl.where(rows < seq, total, 1.0)
    lse = top * scale + tl.log2(total)
    tl.store(LSE + at + rows, lse, mask=rows < seq)
    out = acc * (keep_scale / total)[:, None]
    store_tile(OUT + b * stride_ob + h * stride_oh, rows[:, None], dims[None, :], stride_os, seq, out, D, EXACT)
    if HAS_HEADS:
        if HAS_WINDOW:
            edge = edge & (heads >= rows - before) & (heads <= rows + after)
        tl.store(TO_HEAD + at + rows, tl.where(edge, tl.exp2(to_head - lse), 0.0), mask=rows < seq)


@triton.jit
def finish_kernel(
    HEADS, SEQLENS, LSE, TO_DEPENDENT, num_heads, seq, before, after,
    HAS_SEQLENS: tl.constexpr, HAS_WINDOW: tl.constexpr, BLOCK: tl.constexpr,
):
    """TO_DEPENDENT: from scores to probabilities, 0 where there is no edge, or none in the window."""
    block, number = block_and_map(seq, BLOCK)
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    b, at = (number // num_heads).to(tl.int64), number.to(tl.int64) * seq
    heads = load_heads(HEADS + b * seq, tokens, edge_limit(SEQLENS, b, seq, HAS_SEQLENS))
    edge = heads >= 0
    if HAS_WINDOW:
        edge = edge & (tokens >= heads - before) & (tokens <= heads + after)
    lse = tl.load(LSE + at + tl.maximum(heads, 0), mask=edge, other=0.0)
    score = tl.load(TO_DEPENDENT + at + tokens, mask=edge, other=0.0)
    tl.store(TO_DEPENDENT + at + tokens, tl.where(edge, tl.exp2(score - lse), 0.0), mask=tokens < seq)
