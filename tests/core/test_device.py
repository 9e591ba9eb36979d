"""Which device a tool computes on."""

from __future__ import annotations

import pytest
import torch

from megatron_sas.core.cli import InputError
from megatron_sas.core.device import choose_device


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "cpu:x"])
def test_a_device_that_is_not_there(name):
    with pytest.raises(InputError, match=f"--device: '{name}' is not available here; use cpu or"):
        choose_device(name)


def test_a_gpu_by_number_becomes_the_current_one(monkeypatch):
    """Triton's kernels run there, whatever GPU their tensors are on."""
    current = []
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    assert choose_device("cuda") == torch.device("cuda") and choose_device("cpu") == torch.device("cpu")
    assert current == [torch.device("cuda", 1)]
