"""What is compiled on first use: kept on each host's own disk; one process builds attention's kernels there."""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_sas.core.cli import InputError
from megatron_sas.core.distributed import barrier, local_rank
from megatron_sas.kernels import dependency_attention, unsupported_reason, window_bounds
from megatron_sas.kernels.reference import Window
from megatron_sas.model.config import ModelConfig

# torch's directories are not told apart by version when they are given.
CACHES = {
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": f"inductor-{torch.__version__}",
    "TORCH_EXTENSIONS_DIR": f"torch_extensions-{torch.__version__}",
}


def use_local_caches(user: int | None = None) -> None:
    """Have what is compiled kept below $SLURM_TMPDIR or $TMPDIR, unless the environment says where.

    By default most of it is in the home directory, which on a cluster all nodes write at once, over the network. A
    directory that belongs to somebody else than `user` (default: whose process this is) is not used: what lies in it is
    executed.
    """
    user = os.getuid() if user is None else user
    directory = Path(os.environ.get("SLURM_TMPDIR") or tempfile.gettempdir()) / f"megatron_sas-{user}"
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        ours = directory.stat().st_uid == user and not directory.is_symlink()
    except OSError:
        return
    if ours:
        for variable, name in CACHES.items():
            os.environ.setdefault(variable, str(directory / name))


@contextlib.contextmanager
def first_of_each_host_first() -> Iterator[None]:
    """Run the block on local rank 0 of every host, then on the others, which find what it built. A collective."""
    if local_rank() != 0:
        barrier()
    try:
        yield
    finally:
        if local_rank() == 0:
            barrier()


def check_attention_backend(
    config: ModelConfig, seq_length: int, dtype: torch.dtype, device: torch.device, sets: int = 1
) -> None:
    """Raise `InputError` if the chosen backend cannot train such a model here, with `sets` sets of edges."""
    shape = (1, config.num_heads, seq_length, config.head_dim)
    q = torch.empty(shape, dtype=dtype, device=device, requires_grad=True)
    for window in distinct_windows(config, seq_length):
        reason = unsupported_reason(config.attention_backend, q, config.attention_dropout, sets=sets, window=window)
        if reason is not None:
            raise InputError(f"model.attention_backend: {config.attention_backend}: {reason}; choose auto")


def distinct_windows(config: ModelConfig, seq_length: int) -> list[Window]:
    """The windows of a model's attention, each once; None where it is the whole sequence."""
    return list(dict.fromkeys(window_bounds(window, seq_length) for window in config.windows))


def build_attention_kernels(
    config: ModelConfig, batch: int, seq_length: int, dtype: torch.dtype, device: torch.device, sets: int = 1
) -> None:
    """Run the model's attention so that its kernels exist on every host: with `sets` sets of edges, and without any.

    A collective.

    Our kernels choose tile sizes by the first call that they get: it has the run's own shape, short edges, and few
    entries with a gradient, as the `max` regularizer leaves them.

    Raises:
        InputError: the chosen backend cannot train the regularizer, which shows only when it is run.
    """
    shape = (batch, config.num_heads, seq_length, config.head_dim)
    heads = torch.arange(-1, seq_length - 1, device=device).expand(batch, *([sets] if sets > 1 else []), -1)
    winners = torch.arange(seq_length, device=device) % 64 == 0
    with first_of_each_host_first():
        for edges, window in itertools.product((heads, None), distinct_windows(config, seq_length)):
            q, k, v = (torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(3))
            try:
                out, *probabilities = dependency_attention(
                    q, k, v, edges, dropout_p=config.attention_dropout, backend=config.attention_backend, window=window
                )
            except ValueError as error:
                reason = str(error).removeprefix("dependency_attention: ")
                raise InputError(f"model.attention_backend: {reason}") from None
            loss = out.float().sum()
            for part in probabilities:
                loss = loss if part is None else loss + (part * winners).sum()
            loss.backward()
