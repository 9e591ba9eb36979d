"""Dependency attention in Triton, backward: FlashAttention-2's two passes with δ + t for δ, and g added at the entries.

See `edges.py` for δ, t and g. `row_terms_kernel` computes δ + t, and for each block of tokens the range in which the
other ends of its entries lie; only tiles in that range look for entries. Entries without a gradient do not count, so
with the `max` regularizer (one winner among all maps for a token and direction) few tiles do. No atomics: with fixed
tile sizes equal inputs give equal bits.
"""

# ruff: noqa: ANN001, ANN201, SIM102
# fmt: off
# Annotations must stay real objects here: Triton reads `tl.constexpr` from them.

import triton
import triton.language as tl

from megatron_sas.kernels.triton.parts import (
    SEARCH_CLASSES,
    block_and_map,
    edge_limit,
    keeps,
    load_entry_gradient,
    load_heads,
    load_row,
    load_tile,
    sees,
    store_tile,
    tiles_to_see,
    valid_length,
)

RANGE_BLOCK = tl.constexpr(64)  # tokens for which one range of partners is kept
OF_ROWS = tl.constexpr(0)
OF_COLUMNS = tl.constexpr(2)


@triton.jit
def row_terms_kernel(
    # Inputs and outputs: OUT and its gradient (B, H, S, D), entries, their gradients and DELTA (B, H, S).
    OUT, GRAD_OUT, HEADS, SEQLENS, TO_HEAD, TO_DEPENDENT, GRAD_TO_HEAD, GRAD_TO_DEPENDENT, DELTA, RANGES,
    # Strides of sequence, head and token of out (o), its gradient (g), and the gradients of entries (th, td).
    stride_ob, stride_oh, stride_os, stride_gb, stride_gh, stride_gs, stride_thb, stride_thh, stride_tdb, stride_tdh,
    # Sizes: H, S.
    num_heads, seq,
    # What is compiled for: the shape, the arguments that are there, the block of tokens.
    D: tl.constexpr, BLOCK_D: tl.constexpr, HAS_TO_HEAD: tl.constexpr, HAS_TO_DEPENDENT: tl.constexpr,
    HAS_SEQLENS: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr,
):
    """δ + t of BLOCK rows: Σ_d dO·O, plus the sum of g over the entries in each row.

    RANGES int32 `(B·H, blocks, 4)`: first and last column of the entries in these rows, then first and last row of
    the entries in these columns; (S, -1) where there are none.
    """
    block, number = block_and_map(seq, BLOCK)
    first = block * BLOCK
    b, h = (number // num_heads).to(tl.int64), (number % num_heads).to(tl.int64)
    rows, dims = first + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    EXACT: tl.constexpr = EVEN and D == BLOCK_D
    # (rows, D)
    out = load_tile(OUT + b * stride_ob + h * stride_oh, rows[:, None], dims[None, :], stride_os, seq, D, EXACT)
    grad = load_tile(GRAD_OUT + b * stride_gb + h * stride_gh, rows[:, None], dims[None, :], stride_gs, seq, D, EXACT)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    at = number.to(tl.int64) * seq
    if HAS_TO_HEAD or HAS_TO_DEPENDENT:
        limit = edge_limit(SEQLENS, b, seq, HAS_SEQLENS)
        HEADS += b * seq
        TO_HEAD += at
        TO_DEPENDENT += at
        GRAD_TO_HEAD += b * stride_thb + h * stride_thh
        GRAD_TO_DEPENDENT += b * stride_tdb + h * stride_tdh
        own_heads = load_heads(HEADS, rows, limit)
        g_head = load_entry_gradient(TO_HEAD, GRAD_TO_HEAD, rows, limit, HAS_TO_HEAD)
        g_dependent = load_entry_gradient(TO_DEPENDENT, GRAD_TO_DEPENDENT, rows, limit, HAS_TO_DEPENDENT)
        delta += g_head
        first_column, last_column = tl.where(g_head != 0.0, own_heads, seq), tl.where(g_head != 0.0, own_heads, -1)
        first_row, last_row = tl.where(g_dependent != 0.0, own_heads, seq), tl.where(g_dependent != 0.0, own_heads, -1)
        for start in range(0, limit, BLOCK):
            tokens = start + tl.arange(0, BLOCK)
            heads = load_heads(HEADS, tokens, limit)
            mine = (heads >= first) & (heads < first + BLOCK)
            g_head = load_entry_gradient(TO_HEAD, GRAD_TO_HEAD, tokens, limit, HAS_TO_HEAD)
            g_dependent = load_entry_gradient(TO_DEPENDENT, GRAD_TO_DEPENDENT, tokens, limit, HAS_TO_DEPENDENT)
            in_rows, in_columns = mine & (g_dependent != 0.0), mine & (g_head != 0.0)
            first_column = tl.minimum(first_column, tl.where(in_rows, tokens, seq))
            last_column = tl.maximum(last_column, tl.where(in_rows, tokens, -1))
            first_row = tl.minimum(first_row, tl.where(in_columns, tokens, seq))
            last_row = tl.maximum(last_row, tl.where(in_columns, tokens, -1))
            if HAS_TO_DEPENDENT:
                if tl.max(in_rows.to(tl.int32), 0) > 0:
                    delta += tl.sum(tl.where(heads[None, :] == rows[:, None], g_dependent[None, :], 0.0), 1)
        RANGES += (number.to(tl.int64) * tl.cdiv(seq, BLOCK) + block) * 4
        tl.store(RANGES, tl.min(first_column, 0))
        tl.store(RANGES + 1, tl.max(last_column, 0))
        tl.store(RANGES + 2, tl.min(first_row, 0))
        tl.store(RANGES + 3, tl.max(last_row, 0))
    tl.store(DELTA + at + rows, delta, mask=rows < seq)


@triton.jit
def partner_range(RANGES, number, first, seq, BLOCK: tl.constexpr, WHICH: tl.constexpr):
    """First and last partner of the tokens [first, first + BLOCK): columns (OF_ROWS) or rows (OF_COLUMNS)."""
    blocks = tl.cdiv(seq, RANGE_BLOCK)
    RANGES += number.to(tl.int64) * blocks * 4 + WHICH
    block = first // RANGE_BLOCK
    low, high = tl.load(RANGES + block * 4), tl.load(RANGES + block * 4 + 1)
    for more in tl.static_range(1, (BLOCK + RANGE_BLOCK - 1) // RANGE_BLOCK):
        there = block + more < blocks
        low = tl.minimum(low, tl.load(RANGES + (block + more) * 4, mask=there, other=seq))
        high = tl.maximum(high, tl.load(RANGES + (block + more) * 4 + 1, mask=there, other=-1))
    return low, high


@triton.jit(do_not_specialize=SEARCH_CLASSES)
def grad_kv_kernel(
    # Inputs: as in forward, DELTA (B, H, S) and RANGES of `row_terms_kernel`, gradients of outputs. Then what is made.
    Q, K, V, HEADS, SEQLENS, KEYS, LSE, DELTA, RANGES, TO_HEAD, TO_DEPENDENT, GRAD_OUT, GRAD_TO_HEAD,
    GRAD_TO_DEPENDENT, GRAD_K, GRAD_V,
    # Strides of sequence, head and token.
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_gb, stride_gh, stride_gs, stride_dkb, stride_dkh, stride_dks, stride_thb, stride_thh, stride_tdb, stride_tdh,
    # Sizes and factors: B·H, H, S, on gradients, on scores, on what dropout keeps; the window; classes for the search.
    num_maps, num_heads, seq, scale, score_scale, keep_scale, before, after, seq_class, maps_class,
    # What is compiled for: the shape, the arguments that are there, dropout, precision, tile sizes.
    D: tl.constexpr, BLOCK_D: tl.constexpr, HAS_TO_HEAD: tl.constexpr, HAS_TO_DEPENDENT: tl.constexpr,
    HAS_SEQLENS: tl.constexpr, HAS_WINDOW: tl.constexpr, THRESHOLD: tl.constexpr, PRECISION: tl.constexpr,
    EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """dK and dV of one block of BLOCK_N columns; tiles are transposed. `score_scale` is scale / ln 2."""
    block, number = block_and_map(seq, BLOCK_N)
    first = block * BLOCK_N
    b, h = (number // num_heads).to(tl.int64), (number % num_heads).to(tl.int64)
    at = number.to(tl.int64) * seq
    columns, dims = first + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    length = valid_length(SEQLENS, b, seq, HAS_SEQLENS)
    limit = edge_limit(SEQLENS, b, seq, HAS_SEQLENS)
    Q += b * stride_qb + h * stride_qh
    GRAD_OUT += b * stride_gb + h * stride_gh
    LSE += at
    DELTA += at
    EXACT: tl.constexpr = EVEN and D == BLOCK_D
    FULL: tl.constexpr = EVEN and not HAS_SEQLENS
    HAS_ENTRIES: tl.constexpr = HAS_TO_HEAD or HAS_TO_DEPENDENT
    k = load_tile(K + b * stride_kb + h * stride_kh, columns[:, None], dims[None, :], stride_ks, seq, D, EXACT)
    v = load_tile(V + b * stride_vb + h * stride_vh, columns[:, None], dims[None, :], stride_vs, seq, D, EXACT)
    column_keys = tl.zeros([BLOCK_N], tl.uint32)
    if THRESHOLD > 0:
        column_keys = load_row(KEYS + num_maps * seq + at, columns, seq, 0, EVEN)
        column_keys = column_keys.to(tl.uint32, bitcast=True)
        KEYS += at  # of the rows
    own_heads = tl.full([BLOCK_N], -1, tl.int32)
    own_g = tl.zeros([BLOCK_N], tl.float32)
    low, high = seq, -1
    if HAS_ENTRIES:
        HEADS += b * seq
        TO_HEAD += at
        GRAD_TO_HEAD += b * stride_thb + h * stride_thh
        own_heads = load_heads(HEADS, columns, limit)
        own_g = load_entry_gradient(
            TO_DEPENDENT + at, GRAD_TO_DEPENDENT + b * stride_tdb + h * stride_tdh, columns, limit, HAS_TO_DEPENDENT
        )
        low, high = partner_range(RANGES, number, first, seq, BLOCK_N, OF_COLUMNS)
    grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)  # (columns, D)
    grad_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    # A key is seen from as many rows before it as queries see keys after them.
    begin, end = tiles_to_see(first, BLOCK_N, after, before, seq, seq, BLOCK_M, HAS_WINDOW)
    for start in range(begin, end, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        q = load_tile(Q, rows[None, :], dims[:, None], stride_qs, seq, D, EXACT)  # (D, rows)
        scores = tl.dot(k, q, input_precision=PRECISION)  # (columns, rows)
        # Beyond S the probability is exp2(-inf) = 0.
        lse = load_row(LSE, rows, seq, float("inf"), EVEN)
        probs = tl.exp2(scores * score_scale - lse[None, :])
        if HAS_WINDOW:
            seen = sees(rows[None, :], columns[:, None], before, after, length, seq)
            probs = tl.where(seen, probs, 0.0)
        elif not FULL:
            probs = tl.where(columns[:, None] < length, probs, 0.0)
        grad_out = load_tile(GRAD_OUT, rows[:, None], dims[None, :], stride_gs, seq, D, EXACT)  # (rows, D)
        grad_probs = tl.dot(v, tl.trans(grad_out), input_precision=PRECISION)
        delta = load_row(DELTA, rows, seq, 0.0, EVEN)
        if THRESHOLD > 0:
            row_keys = load_row(KEYS, rows, seq, 0, EVEN).to(tl.uint32, bitcast=True)
            kept = keeps(row_keys[None, :], column_keys[:, None], THRESHOLD)
            dropped = tl.where(kept, probs, 0.0)
            grad_scores = probs * tl.where(kept, grad_probs * keep_scale - delta[None, :], -delta[None, :])
        else:
            dropped = probs
            grad_scores = probs * (grad_probs - delta[None, :])
        if HAS_ENTRIES:
            if (start <= high) & (start + BLOCK_M > low):
                heads = load_heads(HEADS, rows, limit)
                g_head = load_entry_gradient(TO_HEAD, GRAD_TO_HEAD, rows, limit, HAS_TO_HEAD)
                grad_scores += tl.where(heads[None, :] == columns[:, None], g_head[None, :], 0.0)
                grad_scores += tl.where(own_heads[:, None] == rows[None, :], own_g[:, None], 0.0)
        # After the branch: ptxas serialises matrix instructions that are in flight across one.
        grad_v = tl.dot(dropped.to(grad_out.dtype), grad_out, grad_v, input_precision=PRECISION)
        grad_k = tl.dot(grad_scores.to(q.dtype), tl.trans(q), grad_k, input_precision=PRECISION)
    where = b * stride_dkb + h * stride_dkh
    store_tile(GRAD_K + where, columns[:, None], dims[None, :], stride_dks, seq, grad_k * scale, D, EXACT)
    store_tile(GRAD_V + where, columns[:, None], dims[None, :], stride_dks, seq, grad_v * keep_scale, D, EXACT)


@triton.jit(do_not_specialize=SEARCH_CLASSES)
def grad_q_kernel(
    # Inputs: as in forward, DELTA (B, H, S) and RANGES of `row_terms_kernel`, gradients of outputs. Then what is made.
    Q, K, V, HEADS, SEQLENS, KEYS, LSE, DELTA, RANGES, TO_HEAD, TO_DEPENDENT, GRAD_OUT, GRAD_TO_HEAD,
    GRAD_TO_DEPENDENT, GRAD_Q,
    # Strides of sequence, head and token.
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_gb, stride_gh, stride_gs, stride_dqb, stride_dqh, stride_dqs, stride_thb, stride_thh, stride_tdb, stride_tdh,
    # Sizes and factors: B·H, H, S, on gradients, on scores, on what dropout keeps; the window; classes for the search.
    num_maps, num_heads, seq, scale, score_scale, keep_scale, before, after, seq_class, maps_class,
    # What is compiled for: the shape, the arguments that are there, dropout, precision, tile sizes.
    D: tl.constexpr, BLOCK_D: tl.constexpr, HAS_TO_HEAD: tl.constexpr, HAS_TO_DEPENDENT: tl.constexpr,
    HAS_SEQLENS: tl.constexpr, HAS_WINDOW: tl.constexpr, THRESHOLD: tl.constexpr, PRECISION: tl.constexpr,
    EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """dQ of one block of BLOCK_M rows. `score_scale` is scale / ln 2."""
    block, number = block_and_map(seq, BLOCK_M)
    first = block * BLOCK_M
    b, h = (number // num_heads).to(tl.int64), (number % num_heads).to(tl.int64)
    at = number.to(tl.int64) * seq
    rows, dims = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    length = valid_length(SEQLENS, b, seq, HAS_SEQLENS)
    limit = edge_limit(SEQLENS, b, seq, HAS_SEQLENS)
    K += b * stride_kb + h * stride_kh
    V += b * stride_vb + h * stride_vh
    EXACT: tl.constexpr = EVEN and D == BLOCK_D
    FULL: tl.constexpr = EVEN and not HAS_SEQLENS
    HAS_ENTRIES: tl.constexpr = HAS_TO_HEAD or HAS_TO_DEPENDENT
    q = load_tile(Q + b * stride_qb + h * stride_qh, rows[:, None], dims[None, :], stride_qs, seq, D, EXACT)
    GRAD_OUT += b * stride_gb + h * stride_gh
    grad_out = load_tile(GRAD_OUT, rows[:, None], dims[None, :], stride_gs, seq, D, EXACT)
    lse = load_row(LSE + at, rows, seq, float("inf"), EVEN)
    delta = load_row(DELTA + at, rows, seq, 0.0, EVEN)
    row_keys = tl.zeros([BLOCK_M], tl.uint32)
    if THRESHOLD > 0:
        row_keys = load_row(KEYS + at, rows, seq, 0, EVEN).to(tl.uint32, bitcast=True)
        KEYS += num_maps * seq + at  # of the columns
    own_heads = tl.full([BLOCK_M], -1, tl.int32)
    own_g = tl.zeros([BLOCK_M], tl.float32)
    low, high = seq, -1
    if HAS_ENTRIES:
        HEADS += b * seq
        TO_DEPENDENT += at
        GRAD_TO_DEPENDENT += b * stride_tdb + h * stride_tdh
        own_heads = load_heads(HEADS, rows, limit)
        own_g = load_entry_gradient(
            TO_HEAD + at, GRAD_TO_HEAD + b * stride_thb + h * stride_thh, rows, limit, HAS_TO_HEAD
        )
        low, high = partner_range(RANGES, number, first, seq, BLOCK_M, OF_ROWS)
    grad_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)  # (rows, D)
    begin, end = tiles_to_see(first, BLOCK_M, before, after, length, seq, BLOCK_N, HAS_WINDOW)
    for start in range(begin, end, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        k = load_tile(K, columns[None, :], dims[:, None], stride_ks, seq, D, EXACT)  # (D, columns)
        scores = tl.dot(q, k, input_precision=PRECISION)  # (rows, columns)
        probs = tl.exp2(scores * score_scale - lse[:, None])
        if HAS_WINDOW:
            seen = sees(rows[:, None], columns[None, :], before, after, length, seq)
            probs = tl.where(seen, probs, 0.0)
        elif not FULL:
            probs = tl.where(columns[None, :] < length, probs, 0.0)
        v = load_tile(V, columns[None, :], dims[:, None], stride_vs, seq, D, EXACT)  # (D, columns)
        grad_probs = tl.dot(grad_out, v, input_precision=PRECISION)
        if THRESHOLD > 0:
            column_keys = load_row(KEYS, columns, seq, 0, EVEN).to(tl.uint32, bitcast=True)
            kept = keeps(row_keys[:, None], column_keys[None, :], THRESHOLD)
            grad_scores = probs * tl.where(kept, grad_probs * keep_scale - delta[:, None], -delta[:, None])
        else:
            grad_scores = probs * (grad_probs - delta[:, None])
        if HAS_ENTRIES:
            if (start <= high) & (start + BLOCK_N > low):
                heads = load_heads(HEADS, columns, limit)
                g_dependent = load_entry_gradient(TO_DEPENDENT, GRAD_TO_DEPENDENT, columns, limit, HAS_TO_DEPENDENT)
                grad_scores += tl.where(own_heads[:, None] == columns[None, :], own_g[:, None], 0.0)
                grad_scores += tl.where(heads[None, :] == rows[:, None], g_dependent[None, :], 0.0)
        grad_q = tl.dot(grad_scores.to(k.dtype), tl.trans(k), grad_q, input_precision=PRECISION)
    GRAD_Q += b * stride_dqb + h * stride_dqh
    store_tile(GRAD_Q, rows[:, None], dims[None, :], stride_dqs, seq, grad_q * scale, D, EXACT)
