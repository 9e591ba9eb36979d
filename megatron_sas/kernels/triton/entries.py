"""The sparse part of the gradient for flash kernels that know nothing of edges, without waiting for the GPU.

`add_entry_gradients_` of `edges.py`, block by block: a program forms the sparse matrix g of one block of tokens, tile
by tile between its nearest and farthest partner, and multiplies. Blocks without a gradient end at once. No atomics.
"""

# ruff: noqa: ANN001, ANN201, ANN202
# fmt: off
# Annotations must stay real objects here: Triton reads `tl.constexpr` from them.

import contextlib

import torch
import triton
import triton.language as tl

from megatron_sas.kernels.triton.parts import block_and_map, load_heads, load_tile, store_tile

SCAN = 128  # tokens looked at together in search of partners


def block_size(block_d: int) -> int:
    """Tokens of a block: products of float32 are unrolled into registers, and larger blocks spill them."""
    return 32 if block_d <= 64 else 16


@triton.jit
def _load_g(G, tokens, seq, THERE: tl.constexpr):
    """g of the tokens' entries; 0 where none was given."""
    return tl.load(G + tokens, mask=tokens < seq, other=0.0) if THERE else tl.zeros(tokens.shape, tl.float32)


@triton.jit
def _partner_tiles(HEADS, own_heads, own_counts, G_HEAD, G_DEPENDENT, first, seq, HAS_HEAD: tl.constexpr,
                   HAS_DEPENDENT: tl.constexpr, BLOCK: tl.constexpr, SCAN: tl.constexpr):
    """Begin and end, multiples of BLOCK, of the tiles that hold the other end of an entry of these tokens."""
    low, high = tl.full([SCAN], seq, tl.int32), tl.full([SCAN], -1, tl.int32)
    for start in range(0, seq, SCAN):
        tokens = start + tl.arange(0, SCAN)
        heads = load_heads(HEADS, tokens, seq)
        counts = _load_g(G_HEAD, tokens, seq, HAS_HEAD) != 0.0
        counts = counts | (_load_g(G_DEPENDENT, tokens, seq, HAS_DEPENDENT) != 0.0)
        dependent = (heads >= first) & (heads < first + BLOCK) & counts
        low = tl.minimum(low, tl.where(dependent, tokens, seq))
        high = tl.maximum(high, tl.where(dependent, tokens, -1))
    lowest = tl.minimum(tl.min(low, 0), tl.min(tl.where(own_counts, own_heads, seq), 0))
    highest = tl.maximum(tl.max(high, 0), tl.max(tl.where(own_counts, own_heads, -1), 0))
    return lowest // BLOCK * BLOCK, (highest // BLOCK + 1) * BLOCK


@triton.jit
def entries_kernel(
    # What is added to, (B, H, S, D), and inputs.
    GRAD_Q, GRAD_K, Q, K, HEADS, G_HEAD, G_DEPENDENT,
    # Strides of sequence, head and token.
    stride_dqb, stride_dqh, stride_dqs, stride_dkb, stride_dkh, stride_dks,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks,
    # Sizes and the factor on scores: H, S.
    num_heads, seq, scale,
    # What is compiled for: the shape, the gradients that are there, blocks of tokens.
    D: tl.constexpr, BLOCK_D: tl.constexpr, HAS_HEAD: tl.constexpr, HAS_DEPENDENT: tl.constexpr,
    BLOCK: tl.constexpr, SCAN: tl.constexpr,
):
    """dq and dk of BLOCK tokens. HEADS int64 `(B, S)`, G_HEAD and G_DEPENDENT float32 `(B, H, S)`, contiguous."""
    block, number = block_and_map(seq, BLOCK)
    first = block * BLOCK
    b, h = (number // num_heads).to(tl.int64), (number % num_heads).to(tl.int64)
    own, dims = first + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    HEADS += b * seq
    G_HEAD += number.to(tl.int64) * seq
    G_DEPENDENT += number.to(tl.int64) * seq
    own_heads = load_heads(HEADS, own, seq)
    own_head_g, own_dep_g = _load_g(G_HEAD, own, seq, HAS_HEAD), _load_g(G_DEPENDENT, own, seq, HAS_DEPENDENT)
    own_counts = (own_head_g != 0.0) | (own_dep_g != 0.0)
    begin, end = _partner_tiles(
        HEADS, own_heads, own_counts, G_HEAD, G_DEPENDENT, first, seq, HAS_HEAD, HAS_DEPENDENT, BLOCK, SCAN
    )
    grad_q = tl.zeros([BLOCK, BLOCK_D], tl.float32)  # (own, D)
    grad_k = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK):
        other = start + tl.arange(0, BLOCK)
        heads = load_heads(HEADS, other, seq)
        head_g, dep_g = _load_g(G_HEAD, other, seq, HAS_HEAD), _load_g(G_DEPENDENT, other, seq, HAS_DEPENDENT)
        k = load_tile(K + b * stride_kb + h * stride_kh, other[:, None], dims[None, :], stride_ks, seq, D, False)
        q = load_tile(Q + b * stride_qb + h * stride_qh, other[:, None], dims[None, :], stride_qs, seq, D, False)
        is_head = own_heads[:, None] == other[None, :]  # of the row's token is the column's
        is_dependent = heads[None, :] == own[:, None]
        # g of the entries in the rows of the own tokens, and in their columns (transposed): (own, other)
        in_rows = tl.where(is_head, own_head_g[:, None], 0.0) + tl.where(is_dependent, dep_g[None, :], 0.0)
        in_columns = tl.where(is_head, own_dep_g[:, None], 0.0) + tl.where(is_dependent, head_g[None, :], 0.0)
        grad_q = tl.dot(in_rows, k.to(tl.float32), grad_q, input_precision="ieee")
        grad_k = tl.dot(in_columns, q.to(tl.float32), grad_k, input_precision="ieee")
    if end > begin:
        GRAD_Q += b * stride_dqb + h * stride_dqh
        GRAD_K += b * stride_dkb + h * stride_dkh
        dense_q = load_tile(GRAD_Q, own[:, None], dims[None, :], stride_dqs, seq, D, False).to(tl.float32)
        dense_k = load_tile(GRAD_K, own[:, None], dims[None, :], stride_dks, seq, D, False).to(tl.float32)
        store_tile(GRAD_Q, own[:, None], dims[None, :], stride_dqs, seq, dense_q + grad_q * scale, D, False)
        store_tile(GRAD_K, own[:, None], dims[None, :], stride_dks, seq, dense_k + grad_k * scale, D, False)


def add_entry_gradients_(grad_q, grad_k, q, k, heads, scale, g_head, g_dependent) -> None:
    """See `edges.add_entry_gradients_`."""
    batch, num_heads, seq, dim = q.shape
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    g_head, g_dependent = (None if g is None else g.contiguous() for g in (g_head, g_dependent))
    block_d = max(16, triton.next_power_of_2(dim))
    block = block_size(block_d)
    # Triton launches on the current GPU, wherever the tensors are; compiled code sees to that itself.
    guard = contextlib.nullcontext() if torch.compiler.is_compiling() else torch.cuda.device_of(q)
    with guard:
        entries_kernel[(triton.cdiv(seq, block) * batch * num_heads,)](
            grad_q, grad_k, q, k, heads.contiguous(), q if g_head is None else g_head,
            q if g_dependent is None else g_dependent,
            *grad_q.stride()[:3], *grad_k.stride()[:3], *q.stride()[:3], *k.stride()[:3], num_heads, seq, scale,
            D=dim, BLOCK_D=block_d, HAS_HEAD=g_head is not None, HAS_DEPENDENT=g_dependent is not None,
            BLOCK=block, SCAN=SCAN,
        )
