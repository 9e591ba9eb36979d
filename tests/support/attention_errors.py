"""How wrong a backend of dependency attention may be: twice as much as torch's own attention."""

from __future__ import annotations

import torch
from attention_cases import Case, filler_sizes, term_sizes

EPSILON = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
FLOOR = {torch.float64: 16, torch.float32: 8, torch.bfloat16: 1.5, torch.float16: 1.5}  # in units of EPSILON
FEW = 2000  # so few numbers may all be rounded the wrong way: twice the floor


def check_against_float64(case: Case, backend: str, device: str = "cpu") -> None:
    """Assert that errors are at most twice those of torch's own attention in the same dtype, plus rounding."""
    exact, exact_grads = case.run("reference", torch.float64)
    ours, our_grads = case.run(backend, case.dtype, device)
    largest = float(case.qkv[0].norm(dim=-1).max() * case.qkv[1].norm(dim=-1).max()) * case.qkv[0].shape[-1] ** -0.5
    floor = FLOOR[case.dtype] * EPSILON[case.dtype] * (2 if case.qkv[0].numel() < FEW else 1)
    # A score s has an absolute error of about |s| ε in the accumulation dtype, which is the relative error of exp(s).
    floor += 2 * largest * EPSILON[torch.float64 if case.dtype == torch.float64 else torch.float32]
    assert all(torch.isfinite(x).all() for x in (*ours, *our_grads))

    plain_out, plain_grads = case.run_plain(case.dtype, device)
    valid = case.valid_rows()
    error = ((ours[0].double() - exact[0]) * valid).norm()
    assert error <= 2 * ((plain_out.double() - exact[0]) * valid).norm() + floor * (exact[0] * valid).norm()
    for mine, true in zip(ours[1:], exact[1:], strict=True):
        assert mine.dtype == (torch.float64 if case.dtype == torch.float64 else torch.float32)
        accumulated = EPSILON[mine.dtype] * (16 + 2 * largest)
        if case.dtype == torch.bfloat16 and backend == "sdpa" and device == "cpu":
            accumulated += 1e-4  # that kernel's exp is approximate, and with it its LSE
        torch.testing.assert_close(mine.double(), true, rtol=accumulated, atol=accumulated)

    plain_case = Case(case.qkv, torch.full_like(case.heads, -1), case.seqlens, case.gradients, case.dtype)
    _, plain_exact = plain_case.run("reference", torch.float64)
    sizes = (*term_sizes(case, exact), 0.0)
    filled = filler_sizes(case) if backend in ("sdpa", "cudnn") else (0.0, 0.0, 0.0)
    for name, mine, true, plain, plain_true, terms, filler in zip(
        "qkv", our_grads, exact_grads, plain_grads, plain_exact, sizes, filled, strict=True
    ):
        error, plain_error = (mine.double() - true).norm(), (plain.double() - plain_true).norm()
        size = true.norm() + plain_true.norm() + terms  # a sum is as exact as its terms, which may cancel
        underflow = max(1e-35, torch.finfo(case.dtype).smallest_normal * EPSILON[case.dtype] * mine.numel() ** 0.5)
        allowed = 2 * plain_error + floor * size + filler + underflow
        assert error <= allowed, f"d{name}: {error} beside {plain_error}, size {size}"
