"""What is particular to our Triton kernels; their numbers are checked with those of the other backends."""

from __future__ import annotations

import contextlib

import pytest
import torch
import triton
from attention_cases import backward, make_case, make_heads

from megatron_sas.kernels import dependency_attention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_inputs(dropout_p: float, seq: int = 40, **changes: object) -> tuple:
    case = make_case(0, batch=2, num_heads=2, seq=seq, dim=16, dtype=torch.float32, **changes)
    qkv = [x.to(DEVICE, torch.float32).requires_grad_() for x in case.qkv]
    seed = torch.tensor([5], device=DEVICE) if dropout_p else None
    lengths = None if case.seqlens is None else case.seqlens.to(DEVICE)
    return (*qkv, case.heads.to(DEVICE), lengths, seed, dropout_p, 0.25)


@pytest.mark.parametrize(
    ("dropout_p", "uneven", "sets"), [*((p, u, None) for p in (0.0, 0.3) for u in (False, True)), (0.3, True, 2)]
)
def test_operator_is_well_formed(dropout_p, uneven, sets):
    """Schema, fake tensors, autograd registration and tracing by AOTAutograd, as torch checks them."""
    from megatron_sas.kernels.triton.attention import _forward

    inputs = list(make_inputs(dropout_p, seq=17, uneven=uneven))
    if sets is not None:
        inputs[3] = torch.stack([make_heads("random", 2, 17) for _ in range(sets)], 1).to(DEVICE)
    torch.library.opcheck(_forward, tuple(inputs))


@pytest.mark.parametrize(("dropout_p", "uneven", "sets"), [(0.0, True, 1), (0.3, False, 1), (0.3, True, 2)])
def test_packed_attention_is_the_same_to_the_bit(dropout_p, uneven, sets):
    """And its gradient is one tensor, in the layout of what it is the gradient of."""
    from megatron_sas.kernels.triton.attention import _forward_packed, run, run_packed

    *qkv, heads, lengths, seed, dropout_p, scale = make_inputs(dropout_p, uneven=uneven)
    heads = torch.stack([make_heads("random", 2, 40) for _ in range(sets)], 1).to(DEVICE) if sets > 1 else heads
    packed = torch.stack(qkv).permute(1, 3, 0, 2, 4).detach().contiguous().requires_grad_()  # (B, S, 3, H, D)
    results = []
    for inputs, attend in ((qkv, run), ([packed], run_packed)):
        torch.manual_seed(3)
        outputs = attend(*inputs, heads, lengths, dropout_p, scale, None)
        torch.manual_seed(4)
        gradients = torch.autograd.grad(outputs, inputs, [torch.randn_like(x) for x in outputs])
        results.append((outputs, gradients))
    (outputs, separate), (packed_outputs, (gradient,)) = results
    assert all(torch.equal(a, b) for a, b in zip(outputs, packed_outputs, strict=True))
    assert torch.equal(gradient, torch.stack(separate).permute(1, 3, 0, 2, 4)) and gradient.is_contiguous()
    if dropout_p > 0.0 and sets == 1:  # once: it takes seconds
        torch.library.opcheck(_forward_packed, (packed, heads, lengths, seed, dropout_p, scale))


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("directions", ["both", "to_head", "none"])
def test_compiles_without_graph_break(dropout_p, directions):
    case = make_case(1, batch=1, num_heads=2, seq=33, dim=16, dtype=torch.float32, kind="random")
    heads = None if directions == "none" else case.heads.to(DEVICE)

    def loss(q, k, v):
        out, to_head, to_dependent = dependency_attention(q, k, v, heads, dropout_p=dropout_p, backend="triton")
        total = out.square().sum()
        if to_head is not None:
            total = total + to_head.sum()
        return total + to_dependent.sum() if directions == "both" else total

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(3)
        qkv = [x.to(DEVICE, torch.float32).requires_grad_() for x in case.qkv]
        value = function(*qkv)
        results.append((value, *torch.autograd.grad(value, qkv)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("before, after", [(3, 3), (0, 12)])
def test_operator_with_a_window_is_well_formed(before, after):
    from megatron_sas.kernels.triton.attention import _forward

    torch.library.opcheck(_forward, (*make_inputs(0.3, seq=17, uneven=True), before, after))


def test_equal_inputs_give_equal_bits():
    case = make_case(2, batch=1, num_heads=2, seq=70, dim=32, dtype=torch.float32, kind="one")
    results = []
    for _ in range(2):
        qkv = [x.to(DEVICE, torch.float32).requires_grad_() for x in case.qkv]
        outputs = dependency_attention(*qkv, case.heads.to(DEVICE), backend="triton")
        gradients = tuple(g.to(DEVICE) for g in case.gradients)
        results.append((*outputs, *backward(outputs, gradients, qkv)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_set_that_is_only_measured_changes_no_bits():
    """After the set that has a weight; as when an update's line is printed."""
    case = make_case(2, batch=1, num_heads=2, seq=40, dim=16, dtype=torch.float32, kind="random")
    measured, results = make_heads("random", 1, 40), []
    for heads in (case.heads, torch.stack([case.heads, measured], 1)):
        qkv = [x.to(DEVICE, torch.float32).requires_grad_() for x in case.qkv]
        out, *along = dependency_attention(*qkv, heads.to(DEVICE), backend="triton")
        first = [x[:, 0] if heads.dim() == 3 else x for x in along]
        gradients = tuple(g.to(DEVICE) for g in case.gradients)
        results.append((out, *first, *backward((out, *first), gradients, qkv)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_calls_without_edges_share_the_search_of_calls_with_edges():
    """Triton's search tells them apart by the dtypes of their arguments."""
    from megatron_sas.kernels.triton.attention import _heads_pointer

    q, heads = torch.empty(1, 1, 4, 16), torch.zeros(1, 4, dtype=torch.int64)
    assert _heads_pointer(None, q).dtype == _heads_pointer(heads, q).dtype


@pytest.mark.parametrize("integer", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_integer_types_of_heads(integer):
    """-1 for "beyond the valid part" is 255 to an unsigned type, and token 255 exists here.

    Too few tokens for a search, which each type would have of its own.
    """
    torch.manual_seed(0)
    q = torch.randn(1, 1, 300, 16, device=DEVICE)
    heads = torch.randint(0, 120, (1, 300), device=DEVICE)
    seqlens = torch.tensor([270], device=DEVICE)
    expected = dependency_attention(q, q, q, heads, seqlens=seqlens, backend="triton")
    found = dependency_attention(q, q, q, heads.to(integer), seqlens=seqlens, backend="triton")
    assert (expected[1][..., 270:] == 0).all()
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_every_grid_has_one_dimension_and_the_device_of_its_tensors(monkeypatch):
    """The others end at 65,535, and there may be more maps. Triton launches on the current device."""
    from megatron_sas.kernels.triton import attention as triton_attention
    from megatron_sas.kernels.triton import entries as triton_entries

    grids, plain = [], triton.runtime.jit.KernelInterface.__getitem__
    guarded: list[torch.Tensor] = []

    @contextlib.contextmanager
    def guard(tensor):
        guarded.append(tensor)
        yield
        guarded.pop()

    monkeypatch.setattr(torch.cuda, "device_of", guard)

    def spy(kernel, grid):
        assert [tensor.shape for tensor in guarded] == [(2, 2, 40, 16)]
        grids.append(grid({"BLOCK_M": 16, "BLOCK_N": 16}) if callable(grid) else grid)
        return plain(kernel, grid)

    monkeypatch.setattr(triton.runtime.jit.KernelInterface, "__getitem__", spy)
    q, k, v, heads, *_ = make_inputs(0.0)
    outputs = dependency_attention(q, k, v, heads, dropout_p=0.1, backend="triton")
    gradients = torch.autograd.grad(sum(x.sum() for x in outputs), (q, k, v))
    g = torch.ones(2, 2, 40, device=DEVICE)
    triton_entries.add_entry_gradients_(*gradients[:2], q.detach(), k.detach(), heads.clamp(min=0), 0.2, g, g)
    assert [len(grid) for grid in grids] == [1] * 7  # keys, forward, finish, row terms, two gradients, entries
    assert triton_attention.TOKEN_BLOCK >= 40  # one block for each of four maps
    assert grids[0] == (4,)
    assert grids[1] == (12,)


def test_searches_are_told_apart_by_few_classes_of_shapes():
    """Each class costs a search. Triton ignores keys that are not arguments of the kernel."""
    from megatron_sas.kernels.triton import attention as triton_attention

    assert {"seq_class", "maps_class"} <= set(triton_attention._SEARCH_KEYS)
    for kernel in triton_attention.HALF_CONFIGS:
        assert set(triton_attention._SEARCH_KEYS) <= set(kernel.arg_names)
    searched = [
        (maps, seq) for seq in range(128, 513) for maps in range(8, 3000, 8)
        if maps * seq >= triton_attention._SEARCH_FROM
    ]  # fmt: skip
    classes = {tuple(triton_attention._search_classes(*shape).values()) for shape in searched}
    first = {128: 9, 256: 8, 512: 7}  # powers of two of maps from which there are enough tokens
    assert classes == {(seq, 2**n) for seq, low in first.items() for n in range(low, 11)}


def test_short_sequences_and_few_tokens_are_not_searched():
    """The result is kept on disk: a first call that takes no time must not decide for all later ones."""
    from megatron_sas.kernels.triton import attention as triton_attention

    for kind, dtype in (("single", torch.float32), ("half", torch.bfloat16)):
        for kernel, search in triton_attention._SEARCHED[kind].items():
            fixed = (kernel, search.configs[0].all_kwargs())
            for batch, seq in ((1, 1), (1000, 127), (2, 1000), (127, 512), (512, 128), (64, 1024)):
                q = torch.empty(batch, 1, seq, 16, dtype=dtype, device="meta")
                searched = seq >= 128 and batch * seq >= 65_536
                assert triton_attention._with_tiles(kernel, q, fixed=False) == ((search, {}) if searched else fixed)
                assert triton_attention._with_tiles(kernel, q, fixed=True) == fixed


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is interpreted on a machine with a GPU")
@pytest.mark.parametrize("run", ["attention", "entries"])
def test_interpreter_refuses_bfloat16(run):
    """It multiplies bit patterns: a test of it would prove nothing, whichever way it went."""
    from megatron_sas.kernels.triton import entries as triton_entries

    q = torch.ones(1, 1, 16, 16, dtype=torch.bfloat16)
    heads, g = torch.zeros(1, 16, dtype=torch.int64), torch.ones(1, 1, 16)
    with pytest.raises(AssertionError, match="interpreter cannot compute with bfloat16"):
        if run == "attention":
            dependency_attention(q, q, q, heads, backend="triton")
        else:
            triton_entries.add_entry_gradients_(torch.zeros(1, 1, 16, 16), q.float(), q, q, heads, 0.2, g, g)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, "take float16, bfloat16 and float32"),
        ({"dim": 129}, "head dimensions of 1 to 128, not 129"),
        ({"seq": 0}, "empty"),
    ],
)
def test_refusals(change, message):
    shape = {"dtype": torch.float32, "dim": 8, "seq": 4} | change
    q = torch.zeros(1, 1, shape["seq"], shape["dim"], dtype=shape["dtype"], device=DEVICE)
    with pytest.raises(ValueError, match=message):
        dependency_attention(q, q, q, None, backend="triton")
