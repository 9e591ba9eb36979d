"""`RUN/starts.json`: of every start of a run the command line, where it ran, the code and the packages.

The file is replaced as a whole at each start, so it is complete or absent. A run that begins anew, without a checkpoint
of its own, begins the list anew too.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import socket
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron_sas import __version__
from megatron_sas.core.files import write_json_atomic
from megatron_sas.run.directory import RunDirectory

FORMAT, VERSION = "megatron_sas starts", 1
CHECKOUT = Path(__file__).resolve().parents[2]
CODE = ("megatron_sas", "pretrain_mlm.py")
"""What a run executes of a checkout."""
PACKAGES = (
    *("torch", "deepspeed", "transformers", "tokenizers", "sentencepiece", "safetensors", "numpy", "pydantic"),
    *("triton", "flash-attn-4", "apex"),
)
"""Those that numbers may depend on, where they are installed."""
GIT_SECONDS = 10.0


def record_start(run: RunDirectory, step: int, *, anew: bool) -> None:
    """Add this process's start, after `step` updates, to the run's list; `anew` forgets those before."""
    starts = [] if anew else read_starts(run)
    write_json_atomic(run.starts, {"format": FORMAT, "version": VERSION, "starts": [*starts, _this_start(step)]})


def read_starts(run: RunDirectory) -> list[dict[str, Any]]:
    """The starts on record, the first one first; none where the file is absent or not readable, which is reported."""
    try:
        return _read(run)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"{run.starts}: is no list of starts that this program reads ({error}); it begins anew", file=sys.stderr)
        return []


def last_start(run: RunDirectory) -> dict[str, Any]:
    """The newest start on record; {} where there is none, or none that can be read. Earlier versions recorded less."""
    try:
        return dict(_read(run)[-1])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return {}


def slurm_job() -> str | None:
    """The Slurm job that this process is part of, as `scontrol` takes it: of an array its element alone, "12_3"."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def _read(run: RunDirectory) -> list[dict[str, Any]]:
    if not run.starts.is_file():
        return []
    content = json.loads(run.starts.read_text(encoding="utf-8"))
    if (content["format"], content["version"]) != (FORMAT, VERSION):
        raise ValueError(f"format {content['format']!r}, version {content['version']}")
    starts = content["starts"]
    if not isinstance(starts, list) or not all(isinstance(start, dict) for start in starts):
        raise TypeError("starts are no list of objects")
    return starts


def _this_start(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [_text(argument) for argument in sys.argv],
        "directory": _text(os.getcwd()),
        "host": socket.gethostname(),
        "process": os.getpid(),
        "slurm_job": slurm_job(),
        "git": git_state(CHECKOUT),
        "versions": package_versions(),
    }


def _text(name: str) -> str:
    """A name of the file system, of which not every one is text."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


@functools.cache
def package_versions() -> dict[str, str]:
    """Of this program, of Python, and of `PACKAGES`."""
    found = {"megatron_sas": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@functools.cache
def git_state(checkout: Path) -> dict[str, Any] | None:
    """`commit`, and whether `CODE` differs from it or has further files, `dirty`; None where `checkout` is no root of a
    git checkout, or git cannot tell."""
    answer = _git(checkout, "rev-parse", "--show-toplevel", "HEAD")
    if answer is None or len(answer.splitlines()) != 2:
        return None
    root, commit = answer.splitlines()
    if Path(root).resolve() != checkout.resolve():  # the package lies within another project's checkout
        return None
    changes = _git(checkout, "status", "--porcelain", "--", *CODE)
    return {"commit": commit, "dirty": None if changes is None else bool(changes.strip())}


def _git(checkout: Path, *arguments: str) -> str | None:
    """What git prints; None if there is none, or it fails or hangs. It takes no locks."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(checkout), *arguments],
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
            timeout=GIT_SECONDS,
            env={**clean, "GIT_OPTIONAL_LOCKS": "0"},
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
