"""Where a run begins: new, at its newest checkpoint, or at one of its parent's; and whether that belongs to it."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_sas.config import Config, load_config
from megatron_sas.core.cli import InputError
from megatron_sas.core.directory_lock import DirectoryLock
from megatron_sas.core.files import write_text_atomic
from megatron_sas.data.mixture import MixedData
from megatron_sas.data.packed import PackedData, TokenizerIdentity
from megatron_sas.run.checkpoint import newest_checkpoint
from megatron_sas.run.directory import CONFIG, RunDirectory
from megatron_sas.run.records import read_records
from megatron_sas.run.starts import record_start
from megatron_sas.train.branch import BY_CONTENT, UNTRAINED, UNTRAINED_FIELDS, Branch, begin_branch, find_branch


def find_start(config: Config, log: Callable[[str], None]) -> tuple[Path | None, Branch | None]:
    """The checkpoint that the run continues from, or the branch that it begins, or neither for a new run.

    Raises:
        InputError: the directory is something else, the checkpoint belongs to something else, or there were checkpoints
            that are gone.
    """
    run = RunDirectory(config.run.output_dir)
    run_dir, saved = run.path, run.config
    occupied = run_dir.exists() and (not run_dir.is_dir() or not all(map(run.half_begun, run_dir.iterdir())))
    if occupied and config.run.resume == "never":
        raise InputError(f"run.output_dir: {run_dir} exists and is not empty; choose another or set run.resume: auto")
    if occupied and not saved.is_file():
        raise InputError(f"run.output_dir: {run_dir} exists but is not a run (no {CONFIG}); choose another directory")
    checkpoint = newest_checkpoint(run_dir, log) if occupied else None
    if checkpoint is not None:
        check_same_experiment(load_config(saved), config, saved)
        return checkpoint, None
    if run.records.is_file():
        _check_no_checkpoint_is_lost(run)
    if config.run.branch_from is not None:
        branch = find_branch(config, log)
        return branch.checkpoint, branch
    return None, None


def _check_no_checkpoint_is_lost(run: RunDirectory) -> None:
    """Refuse (`InputError`) to begin a run again whose records prove that it had a checkpoint.

    A save begins when the one before is published, so records beyond the second one that was due prove the first, be it
    due by step or by the clock. So does a run that was continued, stopped or finished later than it began.
    """
    old, records = load_config(run.config), read_records(run.records)
    last, began, first = old.train.steps, 0, 0
    if old.run.branch_from is not None:  # its records begin with its parent's, its checkpoints after that
        began = run.parent()[1]
        first = began + 1
    skipped = {record["step"] for record in records if record.get("event") == "skipped_update"}  # nothing is saved then
    saved = (step for step in range(first, last + 1) if old.checkpoint.due(step, last) and step not in skipped)
    second = next(islice(saved, 1, None), last)
    # The clock has the second save begun an interval after the first, at the end of an update that may take long.
    times = (r.get("time", math.inf) for r in records if r["kind"] == "train" and r["step"] > began)
    surely_saved = next(times, math.inf) + 2 * (old.checkpoint.seconds or math.inf)
    for record in records:
        step, event = record["step"], record.get("event")
        later = event in ("start", "stopped", "finished") and step > began and step not in skipped
        by_clock = step not in skipped and record.get("time", 0.0) > surely_saved
        if step > second or later or by_clock:
            raise InputError(
                f"{run.checkpoints}: holds no checkpoint, but the run's records reach update "
                f"{max(record['step'] for record in records)}; restore the newest, choose another run.output_dir, or "
                f"remove {run.path} to begin anew"
            )


def begin_run(config: Config, checkpoint: Path | None, branch: Branch | None, lock: DirectoryLock, step: int) -> None:
    """Make the directory a run, or this start's, after `step` updates; rank 0's part."""
    run = RunDirectory(config.run.output_dir)
    if not lock.held:  # where to start was decided without it, because nothing was there
        lock.take()
        if run.config.exists():
            raise InputError(
                f"{run.path}: another process has begun this run meanwhile; start the same command again to continue it"
            )
    begins = checkpoint is None or branch is not None
    if begins:  # records of an earlier attempt must not be taken for this one's
        run.records.unlink(missing_ok=True)
    write_text_atomic(run.config, config.to_yaml())  # it makes the directory a run
    record_start(run, step, anew=begins)
    if branch is not None:
        begin_branch(run, branch)


def check_same_experiment(old: Config, new: Config, saved: Path) -> None:
    """A run continues only as what it began as (`InputError`).

    Its length, records and sharding may change, and where its data lie.
    """
    differences = old.differences(new)
    # The reduction `sum` is over the micro-batch, which is then part of what λ means.
    summed = any(term.reduction == "sum" for term in old.terms().values())
    sharding = () if summed else ("train.micro_batch_size",)
    changed = [name for name in differences if name.split(".")[0] not in UNTRAINED]
    changed = [name for name in changed if name not in (*UNTRAINED_FIELDS, *BY_CONTENT, *sharding)]
    changed += [name for name in ("run.seed", "run.branch_from") if name in differences]
    if changed:
        raise InputError(
            f"{saved}: the run there was started with other values of {', '.join(changed)}; "
            "restore them or choose another run.output_dir"
        )


def check_tokenizer(identity: TokenizerIdentity, path: str, packed: PackedData | MixedData) -> None:
    """Refuse a tokenizer other than the one that made the data (`InputError`)."""
    for part in packed.parts:
        if not identity.matches(part.tokenizer.identity):
            raise InputError(
                f"{path}: is not the tokenizer that made {part.prefix} (hashes differ); set data.tokenizer to that one "
                "or preprocess again"
            )


def data_facts(packed: PackedData | MixedData, validation: PackedData | None) -> dict[str, Any]:
    """What a checkpoint remembers of its data: enough to recognise them and to say how those for training were made."""
    header = packed.header
    return {
        "prefix": packed.prefix,
        "fingerprint": packed.fingerprint,
        "seq_length": packed.seq_length,
        "num_sequences": packed.num_sequences,
        "heads": packed.heads_name,
        "heads_fingerprint": packed.heads_fingerprint,
        "validation": _fingerprints(validation),
        **{name: header[name] for name in ("inputs", "parser", "counts") if name in header},
    }


def _fingerprints(validation: PackedData | None) -> list[str | None] | None:
    return None if validation is None else [validation.fingerprint, validation.heads_fingerprint]


def check_same_data(
    facts: dict[str, Any], packed: PackedData | MixedData, validation: PackedData | None = None
) -> None:
    """Refuse (`InputError`) data other than those of a checkpoint's `data_facts`; earlier versions recorded less."""
    if facts.get("fingerprint", packed.fingerprint) != packed.fingerprint:
        raise InputError(
            f"data.train: {packed.prefix} is not the data that the run was started with (SHA-256 or weights differ); "
            "restore it or choose another run.output_dir"
        )
    heads = facts.get("heads_fingerprint") if facts.get("heads") == packed.heads_name else None  # a branch may differ
    if heads not in (None, packed.heads_fingerprint):
        source = "data.train" if packed.heads_name is None else f"data.heads: {packed.heads_name}"
        raise InputError(
            f"{source}: {packed.prefix} has other heads than when the run was started (SHA-256 differs); restore them "
            "or choose another run.output_dir"
        )
    now = _fingerprints(validation)
    if facts.get("validation", now) != now:
        prefix = "none" if validation is None else validation.prefix
        raise InputError(
            f"data.validation: {prefix} is not what the run was started with (SHA-256 differs); restore it or choose "
            "another run.output_dir"
        )
