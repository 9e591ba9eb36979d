"""What is particular to plain operations on blocks of rows."""

from __future__ import annotations

import torch
from attention_cases import make_case
from attention_errors import check_against_float64


def test_chunked_spans_blocks():
    """More rows than one block, not a multiple of it, with edges across blocks."""
    case = make_case(5, batch=2, num_heads=1, seq=150, dim=8, dtype=torch.float64, kind="random", uneven=True)
    check_against_float64(case, "chunked")
