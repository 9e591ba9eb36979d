"""Dependency attention by our Triton kernels, as operators that `torch.compile` takes without a graph break.

Imported only where Triton is (CUDA builds of torch bring it). Under Triton's interpreter it runs on CPU tensors,
slowly, for tests (tests/support/interpreter.py).

The kernels have one set of edges. Further sets are added around them from the logsumexp, as around torch's flash
kernels, but with δ at hand: `edges.py` has these entries, their part t of δ + t, and their sparse update.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from megatron_sas.kernels import dropout
from megatron_sas.kernels.edges import add_entry_gradients_, edge_probs, row_sums
from megatron_sas.kernels.reference import Window, valid_heads
from megatron_sas.kernels.triton.backward import RANGE_BLOCK, grad_kv_kernel, grad_q_kernel, row_terms_kernel
from megatron_sas.kernels.triton.forward import dropout_keys_kernel, finish_kernel, forward_kernel
from megatron_sas.kernels.triton.parts import SEARCH_CLASSES

INTERPRETED = triton.knobs.runtime.interpret  # Triton decides so when a kernel is defined
MAX_HEAD_DIM = 128
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
NO_WINDOW = (-1, -1)
TOKEN_BLOCK = 256  # of kernels that read a few numbers a token


def _config(block_m: int, block_n: int, warps: int, stages: int) -> triton.Config:
    return triton.Config({"BLOCK_M": block_m, "BLOCK_N": block_n}, num_warps=warps, num_stages=stages)


HALF_CONFIGS = {
    forward_kernel: [
        _config(64, 64, 4, 3), _config(128, 64, 4, 3), _config(128, 64, 8, 3), _config(128, 128, 8, 2),
        _config(64, 32, 4, 4),
    ],
    grad_kv_kernel: [
        _config(64, 64, 4, 2), _config(32, 64, 4, 4), _config(64, 128, 8, 2), _config(64, 128, 8, 3),
    ],
    grad_q_kernel: [
        _config(64, 64, 4, 2), _config(64, 32, 4, 4), _config(128, 64, 8, 2), _config(128, 64, 8, 3),
    ],
}  # fmt: skip
"""Tile sizes for float16 and bfloat16. The first of each list is taken where there is no search."""

SINGLE_CONFIGS = {kernel: [_config(32, 16, 4, 1), _config(16, 32, 4, 1)] for kernel in HALF_CONFIGS}
"""Tile sizes for float32, which without TF32 has no matrix instructions: products are unrolled into registers."""

_SEARCH_KEYS = ["BLOCK_D", *SEARCH_CLASSES, "THRESHOLD", "EVEN", "HAS_WINDOW"]  # Triton adds the dtypes
_SEARCHED = {
    kind: {
        kernel: triton.autotune(configs, key=_SEARCH_KEYS, cache_results=True)(kernel)
        for kernel, configs in kernels.items()
    }
    for kind, kernels in (("half", HALF_CONFIGS), ("single", SINGLE_CONFIGS))
}
_LARGEST_TILE = 128
_SEARCH_FROM = 2**16  # tokens × maps; fewer do not fill a GPU, and say little about the tile sizes of those that do
_MANY_MAPS = 2**10  # more make no difference: a GPU is full many times


def unsupported_reason(q: Tensor) -> str | None:
    """Return why these kernels cannot take such inputs, or None when they can."""
    if q.device.type != "cuda" and not INTERPRETED:
        return f"our Triton kernels need a GPU, not tensors on {q.device.type}"
    if q.dtype not in DTYPES:
        return f"our Triton kernels take float16, bfloat16 and float32, not {q.dtype}"
    if not 1 <= q.shape[3] <= MAX_HEAD_DIM:
        return f"our Triton kernels take head dimensions of 1 to {MAX_HEAD_DIM}, not {q.shape[3]}"
    if q.numel() == 0:
        return "our Triton kernels cannot take empty tensors"
    return None


def _on_its_device(operator: Callable[..., Any]) -> Callable[..., Any]:
    """Make the first tensor's GPU the current one: Triton launches there, wherever the tensors are."""

    @functools.wraps(operator)
    def guarded(first: Tensor, *arguments: Any) -> Any:
        with torch.cuda.device_of(first):
            return operator(first, *arguments)

    return guarded


def run(
    q: Tensor, k: Tensor, v: Tensor, heads: Tensor | None, seqlens: Tensor | None, dropout_p: float, scale: float,
    window: Window,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """See `Backend.run`."""
    seed = dropout.draw_seed(q.device) if dropout_p > 0.0 else None
    bounds = NO_WINDOW if window is None else window
    out, to_head, to_dependent, *_ = _forward(q, k, v, heads, seqlens, seed, dropout_p, scale, *bounds)
    return (out, None, None) if heads is None else (out, to_head, to_dependent)


def run_packed(
    qkv: Tensor, heads: Tensor | None, seqlens: Tensor | None, dropout_p: float, scale: float, window: Window
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`run` on q, k and v `(B, S, 3, H, D)` as one projection makes them: their gradient is one tensor, too.

    Separate gradients are copied side by side for the projection's backward. The numbers are those of `run`. Models do
    not call this: only `tools/benchmark_training.py` does, to find out on a GPU what it is worth.
    """
    seed = dropout.draw_seed(qkv.device) if dropout_p > 0.0 else None
    bounds = NO_WINDOW if window is None else window
    out, to_head, to_dependent, *_ = _forward_packed(qkv, heads, seqlens, seed, dropout_p, scale, *bounds)
    return (out, None, None) if heads is None else (out, to_head, to_dependent)


def output_and_lse(
    q: Tensor, k: Tensor, v: Tensor, seqlens: Tensor | None, scale: float, window: Window
) -> tuple[Tensor, Tensor]:
    """See `Backend.output_and_lse`."""
    out, _, _, lse, _ = _forward(q, k, v, None, seqlens, None, 0.0, scale, *(window or NO_WINDOW))
    return out, lse * math.log(2)


def _unpacked(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views `(B, H, S, D)` of q, k and v `(B, S, 3, H, D)`."""
    return qkv.permute(2, 0, 3, 1, 4).unbind()


def _forward_kernels(
    q: Tensor, k: Tensor, v: Tensor, heads: Tensor | None, seqlens: Tensor | None, seed: Tensor | None,
    dropout_p: float, scale: float, before: int = -1, after: int = -1,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """out, to_head, to_dependent, the logsumexp in units of log 2 `(B, H, S)`, and dropout's keys `(2, B·H, S)`.

    Both probabilities are `(B, H, S)`, or `(B, sets, H, S)` for heads `(B, sets, S)`. Empty: these without heads, the
    keys without dropout. `before` and `after` are how many keys a query sees, `NO_WINDOW` for all.
    """
    q, k, v = (_unit_stride(x) for x in (q, k, v))
    out, to_head, to_dependent, lse, keys = _forward_outputs(q, heads, seed)
    batch, num_heads, seq, _ = q.shape
    maps = batch * num_heads
    token_grid = (triton.cdiv(seq, TOKEN_BLOCK) * maps,)
    several, further = heads is not None and heads.dim() == 3, _further_sets(heads, seqlens)
    heads, first, second = (_first_set(x, several) for x in (heads, to_head, to_dependent))
    seqlens = _contiguous(seqlens)
    if seed is not None:
        dropout_keys_kernel[token_grid](seed, keys, maps, seq, BLOCK=TOKEN_BLOCK)
    _launch(
        forward_kernel, lambda meta: (triton.cdiv(seq, meta["BLOCK_M"]) * maps,),
        q, k, v, _heads_pointer(heads, q), _pointer(seqlens, q), keys, out, lse, first, second,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        maps, num_heads, seq, scale / math.log(2), 1.0 / (1.0 - dropout_p), before, after,
        **_shape_constants(q, dropout_p), HAS_HEADS=heads is not None, HAS_SEQLENS=seqlens is not None,
        HAS_WINDOW=before >= 0,
    )  # fmt: skip
    if heads is not None:
        finish_kernel[token_grid](
            heads, _pointer(seqlens, q), lse, second, num_heads, seq, before, after,
            HAS_SEQLENS=seqlens is not None, HAS_WINDOW=before >= 0, BLOCK=TOKEN_BLOCK,
        )  # fmt: skip
    if further is not None:
        to_head[:, 1:], to_dependent[:, 1:] = edge_probs(
            q, k, lse * math.log(2), further, scale, (before, after) if before >= 0 else None
        )
    return out, to_head, to_dependent, lse, keys


_forward = torch.library.custom_op("megatron_sas::dependency_attention_forward", mutates_args=())(
    _on_its_device(_forward_kernels)
)


@torch.library.custom_op("megatron_sas::packed_attention_forward", mutates_args=())
@_on_its_device
def _forward_packed(
    qkv: Tensor, heads: Tensor | None, seqlens: Tensor | None, seed: Tensor | None,
    dropout_p: float, scale: float, before: int = -1, after: int = -1,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`_forward` on q, k and v `(B, S, 3, H, D)`."""
    return _forward_kernels(*_unpacked(qkv), heads, seqlens, seed, dropout_p, scale, before, after)


def _forward_outputs(q: Tensor, heads: Tensor | None, seed: Tensor | None) -> tuple[Tensor, ...]:
    batch, num_heads, seq, dim = q.shape
    out = q.new_empty((batch, seq, num_heads, dim)).transpose(1, 2)  # so that joining the heads is a view
    shape = (0,) if heads is None else (batch, num_heads, seq)
    if heads is not None and heads.dim() == 3:
        shape = (heads.shape[1], *shape)  # the entries of a set together, as kernels write them
    entries = [q.new_empty(shape, dtype=torch.float32) for _ in range(2)]
    if len(shape) == 4:
        entries = [x.transpose(0, 1) for x in entries]  # (B, sets, H, S)
    lse = q.new_empty((batch, num_heads, seq), dtype=torch.float32)
    keys = q.new_empty((2, batch * num_heads, seq) if seed is not None else (0,), dtype=torch.int32)
    return out, *entries, lse, keys


@_forward.register_fake
def _(q, k, v, heads, seqlens, seed, dropout_p, scale, before=-1, after=-1):  # noqa: ANN001, ANN202
    return _forward_outputs(q, heads, seed)


@_forward_packed.register_fake
def _(qkv, heads, seqlens, seed, dropout_p, scale, before=-1, after=-1):  # noqa: ANN001, ANN202
    return _forward_outputs(_unpacked(qkv)[0], heads, seed)


@torch.library.custom_op("megatron_sas::dependency_attention_backward", mutates_args=())
@_on_its_device
def _backward(
    grad_out: Tensor, grad_to_head: Tensor | None, grad_to_dependent: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, heads: Tensor | None, seqlens: Tensor | None,
    out: Tensor, to_head: Tensor, to_dependent: Tensor, lse: Tensor, keys: Tensor, dropout_p: float, scale: float,
    before: int, after: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v."""
    gradients = _backward_outputs(q)
    _backward_kernels(
        gradients, grad_out, grad_to_head, grad_to_dependent, q, k, v, heads, seqlens, out, to_head, to_dependent,
        lse, keys, dropout_p, scale, before, after,
    )  # fmt: skip
    return gradients


@torch.library.custom_op("megatron_sas::packed_attention_backward", mutates_args=())
@_on_its_device
def _backward_packed(
    grad_out: Tensor, grad_to_head: Tensor | None, grad_to_dependent: Tensor | None,
    qkv: Tensor, heads: Tensor | None, seqlens: Tensor | None,
    out: Tensor, to_head: Tensor, to_dependent: Tensor, lse: Tensor, keys: Tensor, dropout_p: float, scale: float,
    before: int, after: int,
) -> Tensor:  # fmt: skip
    """The gradient of q, k and v `(B, S, 3, H, D)`."""
    gradient = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    _backward_kernels(
        _unpacked(gradient), grad_out, grad_to_head, grad_to_dependent, *_unpacked(qkv), heads, seqlens, out, to_head,
        to_dependent, lse, keys, dropout_p, scale, before, after,
    )  # fmt: skip
    return gradient


def _backward_kernels(
    gradients: tuple[Tensor, Tensor, Tensor],
    grad_out: Tensor, grad_to_head: Tensor | None, grad_to_dependent: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, heads: Tensor | None, seqlens: Tensor | None,
    out: Tensor, to_head: Tensor, to_dependent: Tensor, lse: Tensor, keys: Tensor, dropout_p: float, scale: float,
    before: int, after: int,
) -> None:  # fmt: skip
    """Write the gradients of q, k and v to `gradients`, three tensors `(B, H, S, D)` with the same strides."""
    q, k, v, grad_out = (_unit_stride(x) for x in (q, k, v, grad_out))
    grad_q, grad_k, grad_v = gradients
    batch, num_heads, seq, _ = q.shape
    maps, blocks = batch * num_heads, triton.cdiv(seq, RANGE_BLOCK.value)
    delta, ranges = torch.empty_like(lse), lse.new_empty((maps, blocks, 4), dtype=torch.int32)
    several, further = heads is not None and heads.dim() == 3, _further_sets(heads, seqlens)
    g_further = [
        None if further is None or grad is None else probs[:, 1:] * grad[:, 1:]  # (B, sets - 1, H, S)
        for probs, grad in ((to_head, grad_to_head), (to_dependent, grad_to_dependent))
    ]
    heads, to_head, to_dependent = (_first_set(x, several) for x in (heads, to_head, to_dependent))
    entry_gradients = [
        None if g is None else _unit_stride((g[:, 0] if several else g).float())
        for g in (grad_to_head, grad_to_dependent)
    ]
    pointers = [_pointer(g, lse) for g in entry_gradients]
    edges = (_heads_pointer(heads, q), _pointer(_contiguous(seqlens), q))
    entry_strides = [stride for g in pointers for stride in g.stride()[:2]]
    constants = _shape_constants(q, dropout_p)
    which = {
        "HAS_TO_HEAD": entry_gradients[0] is not None,
        "HAS_TO_DEPENDENT": entry_gradients[1] is not None,
        "HAS_SEQLENS": seqlens is not None,
    }
    row_terms_kernel[(blocks * maps,)](
        out, grad_out, *edges, to_head, to_dependent, *pointers, delta, ranges,
        *out.stride()[:3], *grad_out.stride()[:3], *entry_strides, num_heads, seq, **which,
        **{name: constants[name] for name in ("D", "BLOCK_D", "EVEN")}, BLOCK=RANGE_BLOCK.value,
    )  # fmt: skip
    row_sum = row_sums(*g_further, further)
    if row_sum is not None:
        delta += row_sum
    inputs = (q, k, v, *edges, keys, lse, delta, ranges, to_head, to_dependent, grad_out, *pointers)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad_out.stride()[:3], *grad_q.stride()[:3])
    scalars = (*entry_strides, maps, num_heads, seq, scale, scale / math.log(2), 1.0 / (1.0 - dropout_p))
    scalars, constants = (*scalars, before, after), constants | {"HAS_WINDOW": before >= 0}
    _launch(
        grad_kv_kernel, lambda meta: (triton.cdiv(seq, meta["BLOCK_N"]) * maps,),
        *inputs, grad_k, grad_v, *strides, *scalars, **constants, **which,
    )  # fmt: skip
    _launch(
        grad_q_kernel, lambda meta: (triton.cdiv(seq, meta["BLOCK_M"]) * maps,),
        *inputs, grad_q, *strides, *scalars, **constants, **which,
    )  # fmt: skip
    if row_sum is not None:
        # The entries are added in float32 before rounding to q's dtype.
        sums = grad_q.float(), grad_k.float()
        add_entry_gradients_(*sums, q, k, further, scale, *g_further)
        grad_q.copy_(sums[0])
        grad_k.copy_(sums[1])


def _backward_outputs(q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, num_heads, seq, dim = q.shape
    return tuple(q.new_empty((batch, seq, num_heads, dim)).transpose(1, 2) for _ in range(3))


@_backward.register_fake
def _(grad_out, grad_to_head, grad_to_dependent, q, *_):  # noqa: ANN001, ANN202
    return _backward_outputs(q)


@_backward_packed.register_fake
def _(grad_out, grad_to_head, grad_to_dependent, qkv, *_):  # noqa: ANN001, ANN202
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:  # noqa: ANN001
    *tensors, _seed, ctx.dropout_p, ctx.scale, before, after = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.window = before, after
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad_out, grad_to_head, grad_to_dependent, *_):  # noqa: ANN001, ANN202
    *qkv, heads, seqlens, out, to_head, to_dependent, lse, keys = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    if heads is None:
        grad_to_head = grad_to_dependent = None
    gradients = (_backward if len(qkv) == 3 else _backward_packed)(
        grad_out, grad_to_head, grad_to_dependent, *qkv, heads, seqlens, out, to_head, to_dependent, lse, keys,
        ctx.dropout_p, ctx.scale, *ctx.window,
    )  # fmt: skip
    return (*((gradients,) if len(qkv) == 1 else gradients), *(None,) * 7)


for _operator in (_forward, _forward_packed):
    _operator.register_autograd(_autograd, setup_context=_setup_context)


def _shape_constants(q: Tensor, dropout_p: float) -> dict[str, Any]:
    seq, dim = q.shape[2:]
    return {
        "D": dim,
        "BLOCK_D": max(16, triton.next_power_of_2(dim)),
        "THRESHOLD": dropout.drop_threshold(dropout_p),
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",  # TF32 would cost 13 bits
        "EVEN": seq % _LARGEST_TILE == 0,
    }


def _launch(kernel: Any, grid: Any, q: Tensor, *arguments: Any, **constants: Any) -> None:
    """Run a kernel with the tile sizes that measured fastest, or fixed ones.

    Different tile sizes round differently, so `torch.use_deterministic_algorithms(True)` takes fixed ones; so does the
    interpreter.
    """
    fixed = INTERPRETED or torch.are_deterministic_algorithms_enabled()
    launcher, tiles = _with_tiles(kernel, q, fixed=fixed)
    batch, num_heads, seq, _ = q.shape
    launcher[grid](q, *arguments, **constants, **_search_classes(batch * num_heads, seq), **tiles)


def _with_tiles(kernel: Any, q: Tensor, *, fixed: bool) -> tuple[Any, dict[str, int]]:
    """What to launch for a kernel on such q: the kernel and its tile sizes, or a search, which brings its own.

    The search runs once per GPU, class of shapes and dtype and is kept in Triton's cache directory, for later processes
    too. What takes no time, or has sequences shorter than the largest tile, is not worth one.
    """
    searched = _SEARCHED["single" if q.dtype == torch.float32 else "half"][kernel]
    batch, num_heads, seq, _ = q.shape
    if fixed or seq < _LARGEST_TILE or batch * num_heads * seq < _SEARCH_FROM:
        return kernel, searched.configs[0].all_kwargs()
    return searched, {}


def _search_classes(maps: int, seq: int) -> dict[str, int]:
    """Shapes with equal classes share the result of a search."""
    return {"seq_class": triton.next_power_of_2(seq), "maps_class": min(triton.next_power_of_2(maps), _MANY_MAPS)}


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _first_set(x: Tensor | None, several: bool) -> Tensor | None:
    """Of heads or entries, contiguous, the set that the kernels have: of several `(B, sets, …)` the first."""
    return _contiguous(x[:, 0] if several else x)


def _further_sets(heads: Tensor | None, seqlens: Tensor | None) -> Tensor | None:
    """The other sets of edges, int64 `(B, sets - 1, S)`, -1 where there is no edge; None where there are none."""
    if heads is None or heads.dim() == 2 or heads.shape[1] == 1:
        return None
    return valid_heads(heads[:, 1:], seqlens)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _heads_pointer(heads: Tensor | None, q: Tensor) -> Tensor:
    """Heads, or an empty tensor of their dtype.

    The search for tile sizes tells calls apart by dtypes. An update in which a term of weight 0 is measured must have
    the tile sizes, and so the rounding, of one in which none is.
    """
    return q.new_empty(0, dtype=torch.int64) if heads is None else heads


def _pointer(x: Tensor | None, other: Tensor) -> Tensor:
    """A tensor to pass where the kernel reads nothing."""
    return other if x is None else x
