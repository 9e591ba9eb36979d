"""From a configuration to the parts that the training loop moves: data, tokenizer, model, engine."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from megatron_sas import __version__
from megatron_sas.config import Config, load_config
from megatron_sas.core import distributed
from megatron_sas.core.cli import CommonError, InputError
from megatron_sas.core.directory_lock import DirectoryLock
from megatron_sas.core.files import write_text_atomic
from megatron_sas.data.mixture import MixedData, open_training_data
from megatron_sas.data.mlm_dataset import MLMDataset
from megatron_sas.data.overlap import refuse_overlap
from megatron_sas.data.packed import PackedData, TokenizerIdentity
from megatron_sas.data.tokenizer import load_tokenizer, tokenizer_digest, tokenizer_identity
from megatron_sas.evaluation.base import Resources
from megatron_sas.evaluation.live import LiveEvaluation
from megatron_sas.export.hf import write_hf
from megatron_sas.launch.kernel_cache import build_attention_kernels, check_attention_backend
from megatron_sas.model.bert import Bert
from megatron_sas.model.config import BertConfig
from megatron_sas.run.checkpoint import load_moments, newest_checkpoint, read_state, write_description
from megatron_sas.run.directory import CONFIG, RunDirectory
from megatron_sas.run.reading import architecture_differences, load_state, read_model, read_tokenizer
from megatron_sas.run.records import read_records
from megatron_sas.run.saver import Saver
from megatron_sas.run.throughput import Throughput, flops_per_token, peak_flops
from megatron_sas.train.branch import BY_CONTENT, Branch, begin_branch, find_branch
from megatron_sas.train.deepspeed_config import deepspeed_config
from megatron_sas.train.step import Engine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Result = TypeVar("Result")

MAY_CHANGE = ("run", "checkpoint", "snapshots", "evaluation", "logging", "watch")
MAY_CHANGE_IN_TRAIN = ("train.steps", "train.zero_stage", "train.deepspeed_config", "train.max_nonfinite_updates")


@dataclass
class Parts:
    """What a run is made of, before DeepSpeed."""

    tokenizer: PreTrainedTokenizerBase
    identity: TokenizerIdentity  # the tokenizer's
    dataset: MLMDataset
    bert: Bert
    evaluation: LiveEvaluation
    checkpoint: Path | None  # that the run continues from, its own or its parent's
    state: dict[str, Any]  # its counters
    branch: Branch | None = None  # when the checkpoint is the parent's

    @property
    def start_step(self) -> int:
        """Updates that are already done."""
        return self.state["step"]

    @property
    def origin(self) -> str:
        """What the run does with its checkpoint, in words."""
        if self.checkpoint is None:
            return "a new run"
        return f"{'continuing' if self.branch is None else 'branching'} from {self.checkpoint}"

    def load_optimizer(self, engine: Engine) -> None:
        """Give `engine`, built with the checkpoint's weights, its moments; AdamW has none before its first update."""
        if self.checkpoint is not None and self.start_step > 0:
            skipped = self.state.get("skipped", {}).get("total", 0)
            load_moments(engine, self.checkpoint, self.start_step - skipped)


def agreed(action: Callable[[], Result]) -> Result:
    """Run `action`, which must not communicate, on every rank; if it fails anywhere, raise the same error everywhere.

    Raises:
        CommonError: with the first rank's message.
    """
    fault, result = None, None
    try:
        result = action()
    except (InputError, OSError) as error:
        fault = str(error)
    fault = next((f for f in distributed.gather_objects(fault) if f is not None), None)
    if fault is not None:
        raise CommonError(fault)
    return result


def build_parts(config: Config, say: Callable[[str], None], lock: DirectoryLock | None = None) -> Parts:
    """Open and check everything, and build the model with its initial or resumed weights.

    `lock` is the claim to the run's directory; None: a dry run, which writes nothing.

    Raises:
        InputError: anything that the user must mend; a CommonError where every rank raises it.
    """
    start = agreed(lambda: where_to_start(config, say) if distributed.is_main() else None)
    checkpoint, branch = distributed.broadcast_object(start)
    parts = agreed(lambda: _build(config, checkpoint))
    if branch is not None:
        parts.branch = branch
        parts.state["lineage"] = [*parts.state.get("lineage", []), branch.link]
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    device = torch.device("cuda", distributed.local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    seq_length = parts.dataset.packed.seq_length
    sets = len(config.terms())
    agreed(lambda: check_attention_backend(parts.bert.config, seq_length, dtype, device, sets))
    if device.type == "cuda":
        size = config.train.micro_batch_size
        # It communicates, but every rank meets its one barrier whatever fails.
        agreed(lambda: build_attention_kernels(parts.bert.config, size, seq_length, dtype, device))
    if lock is not None:  # last, so that a run which is refused leaves no directory behind
        agreed(lambda: _begin(config, checkpoint, branch, lock) if distributed.is_main() else None)
    return parts


def where_to_start(config: Config, say: Callable[[str], None]) -> tuple[Path | None, Branch | None]:
    """The checkpoint that the run continues from, or the branch that it begins, or neither for a new run.

    Raises:
        InputError: the directory is something else, the checkpoint belongs to something else, or there were checkpoints
            that are gone.
    """
    run_dir = Path(config.run.output_dir)
    run = RunDirectory(run_dir)
    saved = run.config
    occupied = run_dir.exists() and (not run_dir.is_dir() or not all(map(run.half_begun, run_dir.iterdir())))
    if occupied and config.run.resume == "never":
        raise InputError(f"run.output_dir: {run_dir} exists and is not empty; choose another or set run.resume: auto")
    if occupied and not saved.is_file():
        raise InputError(f"run.output_dir: {run_dir} exists but is not a run (no {CONFIG}); choose another directory")
    checkpoint = newest_checkpoint(run_dir, say) if occupied else None
    if checkpoint is not None:
        refuse_other_experiment(load_config(saved), config, saved)
        return checkpoint, None
    if run.records.is_file():
        _refuse_lost_checkpoints(run)
    if config.run.branch_from is not None:
        branch = find_branch(config, say)
        return branch.checkpoint, branch
    return None, None


def _refuse_lost_checkpoints(run: RunDirectory) -> None:
    """Refuse (`InputError`) to begin a run anew whose records prove that it had a checkpoint.

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
    # A branch's own start comes last. The second save begins an interval later, after an update that may take long.
    started = max((r.get("time", math.inf) for r in records if r.get("event") == "start"), default=math.inf)
    surely_saved = started + 2 * (old.checkpoint.seconds or math.inf)
    for record in records:
        step, event = record["step"], record.get("event")
        later = event in ("start", "stopped", "finished") and step > began and step not in skipped
        by_clock = record["kind"] == "train" and step not in skipped and record.get("time", 0.0) > surely_saved
        if step > second or later or by_clock:
            raise InputError(
                f"{run.checkpoints}: holds no checkpoint, but the run's records reach update "
                f"{max(record['step'] for record in records)}; restore the newest, choose another run.output_dir, or "
                f"remove {run.path} to begin anew"
            )


def _begin(config: Config, checkpoint: Path | None, branch: Branch | None, lock: DirectoryLock) -> None:
    run = RunDirectory(Path(config.run.output_dir))
    if not lock.held:  # where to start was decided without it, because nothing was there
        lock.take()
        if run.config.exists():
            raise InputError(
                f"{run.path}: another process has begun this run meanwhile; start the same command again to continue it"
            )
    if checkpoint is None or branch is not None:  # records of an earlier attempt must not be taken for this one's
        run.records.unlink(missing_ok=True)
    write_text_atomic(run.config, config.to_yaml())  # it makes the directory a run
    if branch is not None:
        begin_branch(run, branch)


def refuse_other_experiment(old: Config, new: Config, saved: Path) -> None:
    """A run continues only as what it began as (`InputError`).

    Its length, records and sharding may change, and where its data lie.
    """
    differences = old.differences(new)
    # The reduction `sum` is over the micro-batch, which is then part of what λ means.
    summed = any(term.reduction == "sum" for term in old.terms().values())
    sharding = () if summed else ("train.micro_batch_size",)
    changed = [name for name in differences if name.split(".")[0] not in MAY_CHANGE]
    changed = [name for name in changed if name not in (*MAY_CHANGE_IN_TRAIN, *BY_CONTENT, *sharding)]
    changed += [name for name in ("run.seed", "run.branch_from") if name in differences]
    if changed:
        raise InputError(
            f"{saved}: the run there was started with other values of {', '.join(changed)}; "
            "restore them or choose another run.output_dir"
        )


def _build(config: Config, checkpoint: Path | None) -> Parts:
    train, data = config.train, config.data
    deepspeed_config(train, distributed.world_size())  # whose faults must not wait for the engine
    packed = open_training_data(data.parts(), data.heads)
    tokenizer_path = data.tokenizer or packed.tokenizer.path
    tokenizer = load_tokenizer(tokenizer_path)
    identity = tokenizer_identity(tokenizer)
    check_tokenizer(identity, tokenizer_path, packed)
    validation = None
    if data.validation is not None:
        validation = PackedData(data.validation)
        check_tokenizer(identity, tokenizer_path, validation)
    if checkpoint is None:  # a run goes on with the data that it began with
        refuse_overlap(packed.parts, validation)
    for name, part in (("train", packed), ("validation", validation)):
        if part is not None and part.seq_length > config.model.max_position_embeddings:
            raise InputError(
                f"model.max_position_embeddings: {config.model.max_position_embeddings} is less than the sequence "
                f"length {part.seq_length} of data.{name}"
            )
    dataset = MLMDataset(
        packed,
        seed=config.run.seed,
        mask_prob=data.mask_prob,
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        fixed_shapes=train.compiles("cuda" if torch.cuda.is_available() else "cpu"),
    )
    state = {"step": 0, "tokens": 0, "seconds": 0.0} if checkpoint is None else read_state(checkpoint)
    if state["step"] > train.steps:
        raise InputError(f"train.steps: {train.steps} is less than the {state['step']} updates that are already done")
    refuse_other_data(state.get("data", {}), packed, validation)
    bert_config = config.bert_config(packed.tokenizer.vocab_size, packed.tokenizer.pad_id)
    bert = _model(bert_config, config, checkpoint, tokenizer)
    terms, max_length = config.terms(packed.tokenizer.special_ids), config.model.max_position_embeddings
    evaluation = LiveEvaluation(config.evaluation, Resources(tokenizer, validation, max_length, data.mask_prob, terms))
    return Parts(tokenizer, identity, dataset, bert, evaluation, checkpoint, state)


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


def refuse_other_data(
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


def make_saver(config: Config, engine: Engine, parts: Parts) -> Saver:
    """What writes the run's checkpoints and snapshots."""
    bert_config, tokenizer = parts.bert.config, parts.tokenizer
    describe = partial(write_description, bert_config=bert_config, tokenizer=tokenizer, config_yaml=config.to_yaml())

    def write_model(directory: Path, step: int, weights: dict[str, Tensor]) -> None:
        # A copy, since writing a tokenizer for other programs changes it.
        write_hf(directory, bert_config, weights, copy.deepcopy(tokenizer), config.snapshots.dtype, step)

    return Saver(RunDirectory(Path(config.run.output_dir)), config.checkpoint, engine, describe, write_model)


def introduction(config: Config, parts: Parts, engine: Engine) -> tuple[dict[str, Any], str]:
    """What a run is made of: for its record, and as a line for the user."""
    train, packed, world_size = config.train, parts.dataset.packed, distributed.world_size()
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.bert.parameters())
    device = engine.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    attention, compiled = engine.attention_backend(packed.seq_length), train.compiles(device.type)
    facts = {"world_size": world_size, "device": name, "parameters": parameters}
    facts |= {"attention": attention, "compiled": compiled}
    if unknown := parts.evaluation.unknown():
        facts["unknown"] = {name: counted.record() for name, counted in unknown.items()}
    line = (
        f"megatron_sas {__version__}: {parameters:,} parameters, {packed.num_sequences:,} sequences of "
        f"{packed.seq_length}, {world_size} × {name}, ZeRO-{train.zero_stage}, {train.precision}, attention by "
        f"{attention}{', compiled' if compiled else ''}, "
        f"batch {train.global_batch_size} = {world_size} × {train.micro_batch_size} × {parts.dataset.accumulation}"
    )
    return facts | parts.evaluation.facts(), "\n".join([line, *parts.evaluation.notes()])


def measure_throughput(config: Config, parts: Parts, device: torch.device) -> Throughput:
    """The run's clock and token counter, which go on where its checkpoint says."""
    bert, peak = parts.bert.config, None
    if device.type == "cuda":
        dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        peak = peak_flops(torch.cuda.get_device_name(device), dtype)
    return Throughput(
        tokens=parts.state["tokens"],
        seconds=parts.state["seconds"],
        flops_per_token=flops_per_token(
            num_layers=bert.num_layers,
            hidden_size=bert.hidden_size,
            intermediate_size=bert.intermediate_size,
            vocab_size=bert.vocab_size,
            seq_length=parts.dataset.packed.seq_length,
            mask_prob=config.data.mask_prob,
        ),
        peak_flops=None if peak is None else peak * distributed.world_size(),
    )


def _model(
    bert_config: BertConfig, config: Config, checkpoint: Path | None, tokenizer: PreTrainedTokenizerBase
) -> Bert:
    """The model with the run's weights, else those of `model.init_from`, else random ones; equal on every rank."""
    torch.manual_seed(config.run.seed)
    bert = Bert(bert_config)
    if checkpoint is not None:
        _load_matching(bert, checkpoint, f"{checkpoint}: has", tokenizer)
    elif config.model.init_from is not None:
        source = Path(config.model.init_from)
        _load_matching(bert, source, f"model.init_from: {source} has", tokenizer)
    return bert


def _load_matching(bert: Bert, source: Path, where: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Load the weights at `source`; `where` begins the sentence that says what differs."""
    found, state, tokenizer_path = read_model(source)
    if differences := architecture_differences(found, bert.config):
        raise InputError(
            f"{where} {', '.join(differences)} as configured; change the section model, the data or the weights"
        )
    own = read_tokenizer(tokenizer_path)
    if own.get_vocab() != tokenizer.get_vocab():
        raise InputError(f"{where} a tokenizer with other entries than the data's; preprocess the data with {source}")
    if tokenizer_digest(own) != tokenizer_digest(tokenizer):
        raise InputError(
            f"{where} a tokenizer that cuts texts in another way than the data's; preprocess the data with {source}"
        )
    load_state(bert, state, where=str(source))
