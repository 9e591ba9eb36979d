"""Joining the process group, whichever launcher started this process."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import socket
import sys
import warnings
from datetime import timedelta

import torch

from megatron_sas.distributed import local_rank

TIMEOUT = timedelta(minutes=30)


def initialize_distributed() -> torch.device:
    """Join the process group through DeepSpeed and return this process's device.

    Understands `deepspeed`, `torchrun`, `srun` with one task per device, and plain `python` (one process).
    """
    _environment_from_slurm()
    if "RANK" not in os.environ:  # plain python
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
    cuda = torch.cuda.is_available()
    if not cuda:
        # Without this DeepSpeed guesses the accelerator from installed packages.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        _share_cores()
    _quiet_deepspeed()
    import deepspeed

    if not cuda:
        _prepare_cpu_communication()
    device = torch.device("cuda", local_rank()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    deepspeed.init_distributed("nccl" if cuda else "gloo", auto_mpi_discovery=False, verbose=False, timeout=TIMEOUT)
    return device


def _environment_from_slurm() -> None:
    """Under `srun` with one task per device, say in torch's variables what Slurm says in its own."""
    if "RANK" in os.environ or int(os.environ.get("SLURM_NTASKS", "1")) == 1 or "SLURM_PROCID" not in os.environ:
        return
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["WORLD_SIZE"] = os.environ["SLURM_NTASKS"]
    os.environ.setdefault("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ.get("SLURM_NTASKS_PER_NODE", "1"))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _share_cores() -> None:
    """Give each process of this host its share of the cores, unless OMP_NUM_THREADS decides.

    torchrun sets OMP_NUM_THREADS=1 for several processes and the deepspeed launcher leaves it unset.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _quiet_deepspeed() -> None:
    """Only warnings of substance: DeepSpeed logs dozens of lines at INFO, and torch warns of names it still uses."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")


def _prepare_cpu_communication() -> None:
    """Decide about DeepSpeed's shared-memory all-reduce, which it compiles with g++ on first use.

    One process needs none, and without a compiler gloo does the same more slowly.
    """
    import deepspeed

    # One cache of compiled operators per environment: a second one that compiles would overwrite a library in use.
    environment = hashlib.sha256(
        f"{deepspeed.__file__} {deepspeed.__version__} {torch.__version__}".encode()
    ).hexdigest()
    cache = os.path.join(os.path.expanduser("~"), ".cache", "megatron_sas", f"torch_extensions-{environment[:12]}")
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", cache)
    single = os.environ["WORLD_SIZE"] == "1"
    missing = [tool for tool in (os.environ.get("CXX", "g++"), "ninja") if shutil.which(tool) is None]
    if missing and "ninja" in missing:
        beside_python = os.path.join(os.path.dirname(sys.executable), "ninja")
        if os.path.exists(beside_python):  # an environment that was not activated
            os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", "")
            missing.remove("ninja")
    if single or missing:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if missing and not single and os.environ["RANK"] == "0":
        print(
            f"note: {' and '.join(missing)} not found, so DeepSpeed cannot compile its shared-memory all-reduce and "
            "gloo is used instead; for speed install them (Debian: apt-get install g++ ninja-build)",
            file=sys.stderr,
        )
