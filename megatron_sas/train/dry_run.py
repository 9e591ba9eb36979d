"""`pretrain_mlm.py --dry-run`: check everything, name every problem at once, make one step, leave nothing behind."""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import psutil
import torch

from megatron_sas.config import Config, read_config
from megatron_sas.core import distributed
from megatron_sas.core.cli import InputError
from megatron_sas.data.mixture import MixedData, open_training_data
from megatron_sas.data.overlap import check_overlap
from megatron_sas.data.packed import PackedData
from megatron_sas.data.tokenizer import load_tokenizer, tokenizer_identity
from megatron_sas.evaluation.base import TEXT
from megatron_sas.evaluation.live import shortages
from megatron_sas.evaluation.registry import EVALUATIONS
from megatron_sas.launch.environment import (
    check_gpu,
    collective_timeout,
    initialize_distributed,
    number_of_processes,
    share_cores,
)
from megatron_sas.model.config import ModelConfig
from megatron_sas.objective.base import EDGES, QUERIES_KEYS
from megatron_sas.objective.terms import number_needing, weights
from megatron_sas.optim.schedules import largest
from megatron_sas.run.directory import RunDirectory, steps_in
from megatron_sas.run.memory import MemoryEstimate, PeakMemory, count_parameters, estimate_memory, show_bytes
from megatron_sas.run.reading import read_model
from megatron_sas.train.branch import Branch
from megatron_sas.train.build import RunState, build_state
from megatron_sas.train.checks import CHECKS, check_shared_directory, existing_ancestor
from megatron_sas.train.deepspeed_config import deepspeed_config
from megatron_sas.train.dry_run_report import Report
from megatron_sas.train.resume import check_tokenizer, find_start

CHECKPOINT_BYTES = 12  # per parameter: float32 weights and AdamW's two moments, the most that an optimizer keeps


def preflight(path: str, overrides: Sequence[str], build: Callable[..., RunState] = build_state) -> int:
    """The exit code of a dry run: 0 when a training run could start, 2 when something is wrong.

    `build` is what a run is built by for its one step.
    """
    report = Report()
    report.check("processes", report.join)
    for name, action in CHECKS:
        report.check(name, action)
    config, faulty = _read_configuration(path, overrides, report)
    if config is not None:
        report.timeout = collective_timeout(config.run.timeout_minutes)
        _check_configured(config, report, faulty)
    ready = report.agree()  # alike on all processes, since the step needs all of them
    if ready:
        with report.all_or_none():
            _try_one_step(config, report, build)
        ready = report.agree()
    if not ready:
        return report.fail()
    distributed.shutdown()
    if report.rank == 0:
        print("ready: nothing was written", flush=True)
    report.leave()
    return 0


def _read_configuration(path: str, overrides: Sequence[str], report: Report) -> tuple[Config | None, set[str]]:
    """The configuration as far as it is sound, and the fields that are not; each of their faults is reported."""
    try:
        config, faults, faulty = read_config(path, overrides)
    except (InputError, OSError) as error:
        report.problem(f"configuration: {error}")
        return None, set()
    for fault in faults:
        report.problem(f"configuration: {path}: {fault}")
    if not faults:
        report.check("configuration", lambda: path)
    return config, faulty


def _check_configured(config: Config, report: Report, faulty: Collection[str] = ()) -> None:
    """Everything that the configuration names, except what depends on `faulty` fields."""
    data, section, run = config.data, config.evaluation, RunDirectory(config.run.output_dir)

    sound = partial(_are_sound, faulty)
    deepspeed = packed = validation = None
    if sound("train"):
        made = partial(deepspeed_config, config.train, number_of_processes())
        deepspeed = report.check("batch and DeepSpeed", made, partial(_describe_batch, config))
    if sound("data.train", "data.heads", "data.tokenizer", "model"):
        opened = partial(_open_data, config, data.parts(), data.heads, report)
        described = partial(_describe_data, config=config if sound("train") else None)
        packed = report.check("training data", opened, described)
    if data.validation is not None and sound("data.validation", "data.tokenizer", "model"):
        opened = partial(_open_data, config, [(data.validation, None)], None, report)
        validation = report.check("validation data", opened, _describe_data)
        for shortage in shortages(section, validation):
            report.warn(shortage)
    begins = config.run.branch_from is None and not run.config.is_file()
    if packed is not None and begins and sound("run"):
        report.check("overlap", lambda: check_overlap(packed.parts, validation), lambda _: "none by the headers")
    for evaluation in EVALUATIONS.values():
        name = evaluation.input
        if name != TEXT and evaluation.wanted(section) and sound(f"evaluation.{name}"):
            previewed = partial(evaluation.preview, section)
            _, short = report.check(evaluation.input_title or name, previewed, itemgetter(0)) or ("", [])
            for shortage in short:
                report.warn(f"evaluation.{shortage}")
    if sound("run"):
        _check_run(config, run, report, faulty, packed, deepspeed)


def _check_run(
    config: Config,
    run: RunDirectory,
    report: Report,
    faulty: Collection[str],
    packed: PackedData | MixedData | None,
    deepspeed: dict[str, Any] | None,
) -> None:
    """The run's directory, what it branches from, and whether it fits on the disk and into memory."""
    report.check("output directory", lambda: check_output_directory(run.path))
    branch = None
    if config.run.branch_from is not None and not faulty:  # which the run's own checkpoint replaces once there is one
        _, branch = report.check("branch", lambda: find_start(config, print), _describe_start) or (None, None)
    elif run.path.exists() and not faulty:
        report.check("start", lambda: find_start(config, print), _describe_start)
    if (source := config.model.init_from) is not None and not run.config.is_file():
        report.check("model.init_from", lambda: read_model(source), lambda _: f"{source} can be read")
    if packed is not None and _are_sound(faulty, "train", "checkpoint", "snapshots", "watch"):
        shape = config.shape(packed.tokenizer.vocab_size, packed.tokenizer.pad_id)
        report.check("disk space", lambda: check_disk_space(config, count_parameters(shape), branch))
        if deepspeed is not None:
            estimate = _estimate(config, shape, packed.seq_length, deepspeed)
            report.check("memory per device (estimate)", lambda: check_memory(estimate))


def _are_sound(faulty: Collection[str], *names: str) -> bool:
    """Whether no faulty field begins with one of the names."""
    return not any(field.startswith(names) for field in faulty)


def _describe_batch(config: Config, deepspeed: dict[str, Any]) -> str:
    batch = (number_of_processes(), config.train.micro_batch_size, deepspeed["gradient_accumulation_steps"])
    return f"{' × '.join(map(str, batch))} sequences, ZeRO-{config.train.zero_stage}"


def _open_data(
    config: Config, parts: list[tuple[str, float | None]], heads: str | None, report: Report
) -> PackedData | MixedData:
    packed = open_training_data(parts, heads)
    if report.rank == 0:
        packed.verify()  # which training leaves out: it reads everything
    path = config.data.tokenizer or packed.tokenizer.path
    check_tokenizer(tokenizer_identity(load_tokenizer(path)), path, packed)
    if packed.seq_length > config.model.max_position_embeddings:
        raise InputError(
            f"{packed.prefix}: sequences of {packed.seq_length} tokens are longer than model.max_position_embeddings "
            f"{config.model.max_position_embeddings}; raise that or preprocess again"
        )
    return packed


def _describe_data(packed: PackedData | MixedData, config: Config | None = None) -> str:
    """`config` is that of a run which trains on it."""
    text = f"{packed.num_sequences:,} sequences of {packed.seq_length}, tokenizer and checksums match"
    if config is not None:
        steps, batch = config.train.steps, config.train.global_batch_size
        text += f"; {steps:,} updates of {batch} read it {steps * batch / packed.num_sequences:.3g} times"
    return text


def _describe_start(start: tuple[Path | None, Branch | None]) -> str:
    checkpoint, branch = start
    if branch is None:
        return "new" if checkpoint is None else f"already begun, continues from {checkpoint}"
    return f"from {checkpoint}, changes {', '.join(branch.lineage['changed']) or 'nothing'}"


def check_output_directory(path: Path, temporary_file: Callable[..., Any] = tempfile.TemporaryFile) -> str:
    """Whether a run could be written there; the file that tries it has no name, so nothing is left."""
    directory = existing_ancestor(path)
    if not directory.is_dir():
        raise InputError(f"run.output_dir: {directory} is a file; choose another run.output_dir")
    try:
        with temporary_file(dir=directory) as file:
            file.write(b"x" * 4096)
    except OSError as error:
        raise InputError(
            f"run.output_dir: {directory} cannot be written ({error.strerror}); choose another directory"
        ) from None
    return f"{path} can be written"


def check_disk_space(config: Config, parameters: int, branch: Branch | None = None, free: int | None = None) -> str:
    """Whether all checkpoints and snapshots that the schedule still asks for fit; a branch begins after its parent.

    `free` bytes are on the disk; default: what the file system says.
    """
    run, section, last = RunDirectory(config.run.output_dir), config.checkpoint, config.train.steps
    there = steps_in(run.checkpoints)
    done = max(there, default=branch.step if branch else -1)
    due = [step for step in range(done + 1, last + 1) if section.due(step, last)]
    count = len(due)
    if section.seconds is not None:
        count = last - done  # at most: nobody knows how often the clock asks
    if section.kept is not None:  # and one more while the oldest is not yet removed; those that are there have room
        every = section.keep_every
        forever = sum(step % every == 0 for step in due) if every else 0
        going = sum(step % every != 0 for step in there) if every else len(there)
        count = min(count, max(1, section.kept + 1 - going) + forever)
    snapshots = sum(config.snapshots.due(step, last) for step in range(done + 1, last + 1))
    snapshots += config.watch.most_snapshots
    needed = count * parameters * CHECKPOINT_BYTES
    text = f"{count} checkpoints of {show_bytes(parameters * CHECKPOINT_BYTES)}"
    if snapshots:
        size = parameters * (2 if config.snapshots.dtype == "bf16" else 4)
        needed += snapshots * size
        text += f" and {snapshots} snapshots of {show_bytes(size)}"
    free = shutil.disk_usage(existing_ancestor(run.path)).free if free is None else free
    text += f" need {show_bytes(needed)}"
    if needed > free:
        raise InputError(
            f"run.output_dir: {text}, but {show_bytes(free)} are free; set checkpoint.keep_last or "
            "raise checkpoint.every"
        )
    return f"{text}, {show_bytes(free)} are free"


def free_memory(on_host: int | None = None, has_gpu: Callable[[], bool] = torch.cuda.is_available) -> tuple[int, str]:
    """Bytes that are free on the GPU, or in this process's share of `on_host` (default: of what is free), and where."""
    if has_gpu():
        check_gpu()
        return torch.cuda.mem_get_info(distributed.local_rank())[0], "the GPU"
    on_host = psutil.virtual_memory().available if on_host is None else on_host
    return on_host // distributed.local_world_size(), "a process's share of this host"


def check_memory(estimate: MemoryEstimate) -> str:
    """Whether the estimate fits in what is free now."""
    free, place = free_memory()
    if estimate.total > free:
        raise InputError(
            f"{estimate} do not fit into the {show_bytes(free)} that are free on {place}; lower train.micro_batch_size "
            "or raise train.zero_stage (docs/zero.md)"
        )
    return f"{estimate} of {show_bytes(free)} free"


def _estimate(config: Config, shape: ModelConfig, seq_length: int, deepspeed: dict[str, Any]) -> MemoryEstimate:
    return estimate_memory(
        shape,
        world_size=number_of_processes(),
        zero_stage=config.train.zero_stage,
        precision=config.train.precision,
        accumulation=deepspeed["gradient_accumulation_steps"],
        micro_batch_size=config.train.micro_batch_size,
        seq_length=seq_length,
        mask_prob=largest(config.masking_rate()),
        edge_sets=number_needing(EDGES, config.terms()),
        second_passes=number_needing(QUERIES_KEYS, config.terms()),
        optimizer=config.train.optimizer,
        zero_optimization=deepspeed["zero_optimization"],
        cuda=torch.cuda.is_available(),
    )


def _try_one_step(config: Config, report: Report, build: Callable[..., RunState] = build_state) -> None:
    """The update that a run would begin with, through the real engine; its weights are thrown away."""

    def step() -> tuple[str, int]:
        started = time.perf_counter()
        device = initialize_distributed(config.run.timeout_minutes)
        share_cores()
        check_shared_directory(Path(config.run.output_dir))
        with PeakMemory(device) as memory:
            state = build(config, lambda _: None)
            engine = state.engine(config, device)
            engine.set_learning_rate(0.0)
            weight = weights(state.terms, state.start_step)
            # Where λ is 0 a term has no gradient. Memory is that of an update in which every term of the run has one.
            weight |= {name: value for name, value in _later_weights(state).items() if weight[name] == 0.0}
            result = engine.update(state.dataset.window(state.start_step), weight, measure=True)
            sums = distributed.all_reduce_sum_(torch.stack([result.mlm_sum.float(), result.grad_norm.float()]))
        loss = float(sums[0]) / max(int(result.num_masked), 1)
        if not math.isfinite(float(sums.sum())):
            raise InputError(f"loss {loss:g} or its gradient is not finite; lower train.learning_rate, check the data")
        peak = max(distributed.gather_objects(memory.peak))
        return f"{state.origin}, masked-LM loss {loss:.4f}, {time.perf_counter() - started:.1f} s with start-up", peak

    def step_within_memory() -> tuple[str, int]:
        try:
            return step()
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                raise
            reason = str(error).split(". ")[0]
            raise InputError(f"{reason}; lower train.micro_batch_size or raise train.zero_stage") from None

    done = report.check("one step", step_within_memory, itemgetter(0))
    if done is not None:
        report.check("memory per device (measured)", lambda: show_bytes(done[1]))


def _later_weights(state: RunState) -> dict[str, float]:
    """The first λ of each term that is not 0, near a step where its schedule changes its course; 0 if there is none."""
    found = {}
    for name, term in state.terms.items():
        schedule = term.section.schedule
        steps = sorted({step for knot in schedule.knots() for step in (knot - 1, knot) if step >= 0})
        found[name] = next(filter(None, map(schedule, steps)), 0.0)
    return found
