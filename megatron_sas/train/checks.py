"""What a machine must offer: each check returns what it found, or raises `InputError` with the remedy."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_sas.core import distributed
from megatron_sas.core.cli import CommonError, InputError
from megatron_sas.launch.environment import check_gpu
from megatron_sas.run.directory import CONFIG

OLDEST_TORCH = (2, 11)
OPEN_FILES = 1024
GPU_DEVICE = Path("/dev/nvidia0")
SHARED_SECONDS = 10.0

FindSpec = Callable[[str], Any]


def check_torch(
    *,
    version: str = torch.__version__,
    built_for: str | None = torch.version.cuda,
    has_gpu: Callable[[], bool] = torch.cuda.is_available,
    gpu_device: Path = GPU_DEVICE,
) -> str:
    """A torch that is new enough and can use the GPUs that are there."""
    if tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < OLDEST_TORCH:
        raise InputError(f"torch {version} is too old; pip install -r requirements.txt")
    if has_gpu():
        check_gpu()
        return f"{version}, {torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    if gpu_device.exists():
        if built_for is None:
            raise InputError(
                f"this machine has an NVIDIA GPU, but torch {version} is built without CUDA; "
                "install the CUDA build (https://pytorch.org/get-started)"
            )
        raise InputError(
            f"torch {version} finds no usable GPU although {gpu_device} exists; compare `nvidia-smi` (the "
            f"driver) with CUDA {built_for} (torch), and check CUDA_VISIBLE_DEVICES"
        )
    return f"{version}, no GPU: trains on the CPU"


def check_collectives(
    has_gpu: Callable[[], bool] = torch.cuda.is_available, has_nccl: Callable[[], bool] = dist.is_nccl_available
) -> str:
    """NCCL where there are GPUs, gloo elsewhere, and what the environment sets for them."""
    if has_gpu() and not has_nccl():
        raise InputError(
            f"torch {torch.__version__} has no NCCL, which GPUs need; install the CUDA wheel for Linux "
            "(https://pytorch.org/get-started)"
        )
    if not has_gpu() and not dist.is_gloo_available():
        raise InputError("this torch has no gloo, which processes on CPUs need; install the wheel from PyPI")
    backend = "NCCL " + ".".join(map(str, torch.cuda.nccl.version())) if has_gpu() else "gloo"
    prefix = ("NCCL_", "TORCH_NCCL_") if has_gpu() else "GLOO_"
    return ", ".join(
        [backend, *(f"{name}={os.environ[name]}" for name in sorted(os.environ) if name.startswith(prefix))]
    )


def check_triton(has_gpu: Callable[[], bool] = torch.cuda.is_available, find_spec: FindSpec = util.find_spec) -> str:
    """Triton on GPUs; it comes with torch's CUDA wheels."""
    if not has_gpu():
        return "not needed on a CPU"
    if find_spec("triton") is None:
        raise InputError(
            "triton is missing, whose kernels run on GPUs; pip install triton, or reinstall torch's CUDA wheel"
        )
    return "found"


def check_compiler(has_gpu: Callable[[], bool] = torch.cuda.is_available) -> str:
    """A C compiler on GPUs, for Triton."""
    if not has_gpu():
        return "not needed on a CPU"
    path = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
    if path is None:
        raise InputError(
            "no compiler (gcc or clang) on PATH, with which Triton builds its launchers; install one or set CC"
        )
    return path


def check_apex(find_spec: FindSpec = util.find_spec) -> str:
    """NVIDIA's apex or none; PyPI's package of that name is something else."""
    if find_spec("apex") is None:
        return "not installed, not required"
    try:
        from apex.normalization import FusedLayerNorm  # noqa: F401
    except Exception:  # any failure to import means that it is not a working NVIDIA apex
        raise InputError(
            "the installed apex is not NVIDIA's (PyPI's `apex` is a web toolkit); pip uninstall apex. NVIDIA's is "
            "built from source (https://github.com/NVIDIA/apex) and not required"
        ) from None
    return "NVIDIA's"


def check_temporary_directory() -> str:
    """A place for sockets, caches and compiled kernels."""
    try:
        directory = tempfile.gettempdir()
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        wanted = os.environ.get("TMPDIR", "/tmp")
        raise InputError(f"TMPDIR {wanted}: cannot be written ({error.strerror}); set TMPDIR to a local disk") from None
    wanted = os.environ.get("TMPDIR")
    if wanted and Path(directory) != Path(wanted).absolute():
        raise InputError(f"TMPDIR {wanted}: cannot be written; create it or set TMPDIR to a local disk")
    return directory


def check_open_files() -> str:
    """Enough file descriptors for data, sockets to other processes and the loader."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < OPEN_FILES:
        raise InputError(f"only {soft} open files are allowed; run `ulimit -n {OPEN_FILES * 4}` first")
    return "unlimited" if soft == resource.RLIM_INFINITY else str(soft)


def existing_ancestor(path: Path) -> Path:
    """`path`, or the nearest directory above it that exists."""
    path = path.absolute()
    return path if path.exists() else existing_ancestor(path.parent)


def check_shared_directory(run_dir: Path) -> str:
    """One directory for the run on all hosts: what rank 0 writes there, every rank must see. A collective.

    A run that does not exist yet is looked for in the nearest directory above it that does. Nothing is left behind.

    Raises:
        CommonError: what one rank cannot do, or does not see.
    """
    if distributed.world_size() == 1:
        return "a single process"
    places = [run_dir.absolute(), *run_dir.absolute().parents]
    # A name and a place that a new run takes for leftovers of a killed one, should this process be killed here.
    name, fault = f".{CONFIG}.{secrets.token_hex(8)}.tmp", None
    level = places.index(existing_ancestor(run_dir))
    if distributed.is_main():
        try:
            (places[level] / name).write_text(name, encoding="utf-8")
        except OSError as error:
            fault = f"run.output_dir: {places[level]} cannot be written ({error.strerror}); choose another directory"
    level, name, fault = distributed.broadcast_object((level, name, fault))
    if fault is not None:
        raise CommonError(fault)
    path = places[level] / name
    try:
        seen = _appears(path)
        found = distributed.gather_objects(None if seen else f"{socket.gethostname()} (rank {distributed.rank()})")
    finally:
        if distributed.is_main():
            path.unlink(missing_ok=True)
    blind = [where for where in found if where is not None]
    if blind:
        raise CommonError(
            f"run.output_dir: {run_dir} is not one directory for all processes: {', '.join(blind)} cannot see what "
            "rank 0 writes there; choose a directory on a file system that all hosts share"
        )
    return f"{run_dir} is the same for {len(found)} processes"


def _appears(path: Path) -> bool:
    """Whether a file with its own name as its text is there, within the seconds that a network file system may need."""
    deadline = time.monotonic() + SHARED_SECONDS
    while True:
        with contextlib.suppress(OSError):
            if path.read_text(encoding="utf-8") == path.name:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)


CHECKS: tuple[tuple[str, Callable[[], str]], ...] = (
    ("torch", check_torch),
    ("collectives", check_collectives),
    ("triton", check_triton),
    ("compiler", check_compiler),
    ("apex", check_apex),
    ("temporary files", check_temporary_directory),
    ("open files", check_open_files),
)
"""Those that need no configuration."""
