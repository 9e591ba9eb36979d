"""Where compiled kernels are kept, and who builds them."""

from __future__ import annotations

import os
import textwrap

import pytest
import torch
from engine_runs import launch
from torch._inductor.runtime import cache_dir_utils

from megatron_sas.kernels.backends import BACKENDS, Backend
from megatron_sas.launch.kernel_cache import CACHES, build_attention_kernels, use_local_caches
from megatron_sas.model.config import BertConfig
from megatron_sas.model.modernbert import ModernBertConfig


@pytest.fixture
def clean(monkeypatch, tmp_path):
    for variable in CACHES:
        monkeypatch.setenv(variable, "set so that it is restored")
        monkeypatch.delenv(variable)
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path))
    return tmp_path


def test_caches_are_local_and_private(clean):
    use_local_caches()
    for variable in CACHES:
        assert os.environ[variable].startswith(f"{clean}/megatron_sas-{os.getuid()}/")
    assert (clean / f"megatron_sas-{os.getuid()}").stat().st_mode & 0o777 == 0o700


def test_what_torch_compiles_is_kept_there_by_version(clean):
    use_local_caches()
    expected = clean / f"megatron_sas-{os.getuid()}" / f"inductor-{torch.__version__}"
    assert cache_dir_utils.cache_dir() == str(expected)


def test_what_the_user_says_stays(clean, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    use_local_caches()
    assert os.environ["TRITON_CACHE_DIR"] == "/elsewhere"


def test_a_directory_of_somebody_else_is_not_used(clean):
    use_local_caches(user=4_000_000)  # who may make it, but does not own it
    assert not CACHES.keys() & os.environ.keys()


@pytest.mark.parametrize("sets", [1, 2])
def test_kernels_are_run_with_and_without_edges(sets, monkeypatch):
    calls, original = [], BACKENDS["sdpa"].run

    def spy(q, k, v, heads, seqlens, dropout_p, scale, window):
        assert q.std() > 0.5  # tile sizes are timed on it, and a GPU runs faster on zeros
        calls.append((tuple(q.shape), q.dtype, None if heads is None else tuple(heads.shape), dropout_p))
        return original(q, k, v, heads, seqlens, 0.0, scale, window)

    monkeypatch.setitem(BACKENDS, "spy", Backend(spy))
    config = BertConfig(num_heads=2, hidden_size=32, attention_dropout=0.1, attention_backend="spy")
    build_attention_kernels(config, 3, 16, torch.bfloat16, torch.device("cpu"), sets)
    shapes = ((3, 16) if sets == 1 else (3, 2, 16), None)
    assert calls == [((3, 2, 16, 16), torch.bfloat16, shape, 0.1) for shape in shapes]


def test_kernels_are_run_with_every_window(monkeypatch):
    seen = []

    def spy(*arguments):
        seen.append((arguments[3] is not None, arguments[-1]))
        return BACKENDS["reference"].run(*arguments)

    monkeypatch.setitem(BACKENDS, "spy", Backend(spy))
    config = ModernBertConfig(
        num_layers=5, num_heads=2, hidden_size=32, global_attn_every_n_layers=2, local_attention=6,
        attention_backend="spy",
    )  # fmt: skip
    build_attention_kernels(config, 3, 16, torch.float32, torch.device("cpu"))
    assert seen == [(True, None), (True, (3, 3)), (False, None), (False, (3, 3))]


@pytest.mark.slow
def test_the_first_process_of_a_host_builds(tmp_path):
    """The others start when it has finished, so they find what it left."""
    script = tmp_path / "script.py"
    code = f"""
        import os, time, torch.distributed as dist
        from pathlib import Path
        from megatron_sas.launch.kernel_cache import first_of_each_host_first
        dist.init_process_group("gloo")
        built = Path({str(tmp_path)!r}) / "built"
        with first_of_each_host_first():
            if os.environ["LOCAL_RANK"] == "0":
                time.sleep(0.5)
                built.touch()
            assert built.exists()
        dist.barrier()
        """
    script.write_text(textwrap.dedent(code))
    launch("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script)
    assert (tmp_path / "built").exists()
