"""Joining the process group, whichever launcher started this process."""

from __future__ import annotations

import logging
import os
import warnings
from datetime import timedelta

import torch

from megatron_sas.core.cli import InputError
from megatron_sas.core.distributed import gather_objects, local_rank, local_world_size
from megatron_sas.core.processes import keep_freed_memory
from megatron_sas.launch.kernel_cache import use_local_caches

SHORTEST_TIMEOUT_MINUTES = 30.0  # while a run starts, ranks may wait long for one that reads slowly


def initialize_distributed(timeout_minutes: float) -> torch.device:
    """Join the process group through DeepSpeed and return this process's device.

    Understands `deepspeed`, `torchrun`, `srun` with one task per device, and plain `python` (one process). Collectives
    give up after twice `timeout_minutes`: the watchdog, which knows more, speaks first.

    Raises:
        InputError: there are several processes, and nothing says where they meet, or the port there is taken; or there
            is no GPU for this one.
    """
    environment_from_launcher()
    if "RANK" not in os.environ:  # plain python
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")  # any that is free
    use_local_caches()
    cuda = torch.cuda.is_available()
    if not cuda:  # without this DeepSpeed guesses the accelerator from installed packages
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Only warnings of substance: DeepSpeed logs dozens of lines at INFO, and torch warns of names it still uses.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
    import deepspeed

    device = torch.device("cuda", local_rank()) if cuda else torch.device("cpu")
    if cuda:
        check_gpu()
        torch.cuda.set_device(device)
    else:
        # Or DeepSpeed (0.19.8) compiles, with g++ for a minute, an all-reduce that only its inference layers use, and a
        # killed process leaves 66 MB of it in /dev/shm. Training reduces through gloo with or without it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    timeout = collective_timeout(timeout_minutes)
    try:
        deepspeed.init_distributed("nccl" if cuda else "gloo", auto_mpi_discovery=False, verbose=False, timeout=timeout)
    except RuntimeError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise InputError(
            f"MASTER_PORT: {os.environ['MASTER_PORT']} is taken by another program on this host; choose another port"
        ) from None
    return device


def join_processes(timeout_minutes: float, deterministic: bool) -> torch.device:
    """`initialize_distributed`, then the threads and, if asked for, deterministic kernels of training.

    Before anything is computed on a GPU.
    """
    device = initialize_distributed(timeout_minutes)
    share_cores()
    if device.type == "cpu":
        keep_freed_memory()
    if deterministic and device.type == "cuda":  # torch, cuBLAS and our kernels: the same bits every time
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a help for finding bugs that costs time
    return device


def check_gpu(gpus: int | None = None) -> None:
    """Raise `InputError` if this process, one of several on the host with `gpus`, has no GPU of its own."""
    gpus = torch.cuda.device_count() if gpus is None else gpus
    if local_rank() >= gpus:
        raise InputError(
            f"process {local_rank()} of this host needs a GPU of its own but sees only {gpus}; start fewer processes "
            "a host, or show each of them all GPUs (Slurm: --gpus-per-node, not --gpus-per-task)"
        )


def collective_timeout(timeout_minutes: float) -> timedelta:
    """How long processes wait for each other."""
    return timedelta(minutes=max(SHORTEST_TIMEOUT_MINUTES, 2 * timeout_minutes))


def share_cores() -> None:
    """Where CPUs train, give each process of this host its share of the cores, unless OMP_NUM_THREADS decides."""
    threads = share_of_cores(len(os.sched_getaffinity(0)))
    if threads is not None and not torch.cuda.is_available():
        torch.set_num_threads(threads)


def share_of_cores(cores: int) -> int | None:
    """How many of a host's cores a process of it gets; None: OMP_NUM_THREADS decides.

    torchrun sets OMP_NUM_THREADS=1 for several processes and the deepspeed launcher leaves it unset. To be called after
    `environment_from_launcher`, which knows the processes.
    """
    return None if "OMP_NUM_THREADS" in os.environ else max(1, cores // local_world_size())


def threads_of_processes() -> list[int] | None:
    """Threads of every process where CPUs train: how sums round depends on them. None on GPUs. A collective."""
    return None if torch.cuda.is_available() else gather_objects(torch.get_num_threads())


def other_threads(before: list[int] | None, now: list[int] | None) -> str | None:
    """A line for a run that as many processes continue, but with other threads; None where nothing differs."""
    if not before or not now or len(before) != len(now) or before == now:
        return None
    then, here = (str(counts[0] if len(set(counts)) == 1 else counts) for counts in (before, now))
    return (
        f"threads per process: {here}, where the checkpoint was made with {then}; from here the run equals an "
        f"uninterrupted one within rounding, not bit for bit (OMP_NUM_THREADS decides how many there are)"
    )


def number_of_processes() -> int:
    """How many processes the launcher started, from its variables; joins nothing."""
    return int(os.environ.get("WORLD_SIZE") or _slurm_tasks())


def environment_from_launcher() -> None:
    """Under `srun` with one task per device, say in torch's variables what Slurm says in its own.

    Raises:
        InputError: there are several processes, and nothing says where they meet.
    """
    tasks = _slurm_tasks()
    if "RANK" not in os.environ and tasks > 1:
        os.environ["RANK"] = os.environ["SLURM_PROCID"]
        os.environ["WORLD_SIZE"] = str(tasks)
        os.environ.setdefault("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
        os.environ.setdefault("LOCAL_WORLD_SIZE", str(_slurm_tasks_of_this_node()))
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if "RANK" in os.environ and missing:
        raise InputError(
            f"{number_of_processes()} processes were started, but {' and '.join(missing)} is not set, so they cannot "
            "meet; before srun, `source examples/slurm/common.sh`, or export the first host's name and a free port"
        )


def _slurm_tasks() -> int:
    """Tasks of the job step that this process belongs to, 1 without a step.

    Only `srun` sets SLURM_STEP_NUM_TASKS. The shell inside an allocation has the job's SLURM_NTASKS and a SLURM_PROCID
    as well, and what is started from it is one process all the same.
    """
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) if "SLURM_PROCID" in os.environ else 1


def _slurm_tasks_of_this_node() -> int:
    """This node's entry of SLURM_STEP_TASKS_PER_NODE, such as `8(x2),4`."""
    counts = []
    for entry in os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        count, _, repeated = entry.partition("(x")
        counts += [int(count)] * int(repeated.rstrip(")") or 1)
    node = int(os.environ.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else 1
