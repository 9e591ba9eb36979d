"""From a configuration to what the training loop moves: data, tokenizer, model, engine, records."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_sas import __version__
from megatron_sas.config import Config
from megatron_sas.core import distributed
from megatron_sas.core.cli import InputError, listed
from megatron_sas.core.directory_lock import DirectoryLock
from megatron_sas.core.distributed import on_all_ranks
from megatron_sas.data.mixture import open_training_data, stream_samples
from megatron_sas.data.mlm_dataset import MLMDataset
from megatron_sas.data.overlap import check_overlap
from megatron_sas.data.packed import PackedData, TokenizerIdentity
from megatron_sas.data.tokenizer import load_tokenizer, tokenizer_digest, tokenizer_identity
from megatron_sas.evaluation.base import Resources
from megatron_sas.evaluation.live import LiveEvaluation, shortages
from megatron_sas.export.hf import write_hf
from megatron_sas.kernels.cpu_linear import library_in_use, measure_library, use_library
from megatron_sas.launch.environment import other_threads, threads_of_processes
from megatron_sas.launch.kernel_cache import build_attention_kernels, check_attention_backend
from megatron_sas.model.architectures import build_model
from megatron_sas.model.base import MaskedLM
from megatron_sas.model.config import ModelConfig
from megatron_sas.objective.base import EDGES, Term
from megatron_sas.objective.pretraining import MaskedLMWithTerms
from megatron_sas.objective.terms import number_needing
from megatron_sas.optim.schedules import largest, mean
from megatron_sas.run.checkpoint import RankSlice, load_moments, read_state, write_description, write_slice
from megatron_sas.run.directory import RunDirectory
from megatron_sas.run.leftovers import leftovers
from megatron_sas.run.reading import architecture_differences, load_state, read_model, read_tokenizer
from megatron_sas.run.records import Records
from megatron_sas.run.saver import Saver
from megatron_sas.run.signals import StopRequest
from megatron_sas.run.throughput import Throughput, flops_per_token, peak_flops
from megatron_sas.train.branch import Branch
from megatron_sas.train.deepspeed_config import deepspeed_config
from megatron_sas.train.journal import Journal
from megatron_sas.train.onset_snapshots import OnsetSnapshots
from megatron_sas.train.resume import begin_run, check_same_data, check_tokenizer, data_facts, find_start
from megatron_sas.train.step import Engine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSIONS = {"megatron_sas": __version__} | {name: version(name) for name in ("torch", "deepspeed", "transformers")}


@dataclass
class RunState:
    """What a run is made of, and where it stands, before DeepSpeed."""

    tokenizer: PreTrainedTokenizerBase
    identity: TokenizerIdentity  # the tokenizer's
    dataset: MLMDataset
    bert: MaskedLM
    terms: dict[str, Term]
    evaluation: LiveEvaluation
    checkpoint: Path | None  # that the run continues from, its own or its parent's
    counters: dict[str, Any]  # its state
    branch: Branch | None = None  # when the checkpoint is the parent's

    @property
    def start_step(self) -> int:
        """Updates that are already done."""
        return self.counters["step"]

    @property
    def origin(self) -> str:
        """What the run does with its checkpoint, in words."""
        if self.checkpoint is None:
            return "a new run"
        return f"{'continuing' if self.branch is None else 'branching'} from {self.checkpoint}"

    def engine(self, config: Config, device: torch.device) -> Engine:
        """The model under DeepSpeed, with the checkpoint's moments; there are none before the first update."""
        module, options = MaskedLMWithTerms(self.bert, self.terms), config.optimizer_options()
        engine = Engine(module, config.train, config.seeds().dropout, device, options)
        if self.checkpoint is not None and self.start_step > 0:
            skipped = self.counters.get("skipped", {}).get("total", 0)
            load_moments(engine, self.checkpoint, self.start_step - skipped)
        return engine


class BuiltRun:
    """A run with its engine: all that the training loop moves."""

    def __init__(
        self,
        config: Config,
        state: RunState,
        device: torch.device,
        clock: Callable[[], float] = time.perf_counter,
        write: Callable[[Path, RankSlice], None] = write_slice,
    ) -> None:
        """`clock` counts seconds; `write` writes this rank's tensors of a checkpoint into a directory."""
        self.config, self.state, self.clock = config, state, clock
        self.directory, self.threads = RunDirectory(config.run.output_dir), threads_of_processes()
        self.engine = state.engine(config, device)
        self.saver = make_saver(config, self.engine, state, write)
        self.throughput = measure_throughput(config, state, device, clock)

    @property
    def tokens_per_update(self) -> int:
        """Tokens of a global batch."""
        return self.config.train.global_batch_size * self.state.dataset.packed.seq_length

    def samples_of(self, step: int) -> list[int]:
        """Ids of the samples of the update that makes `step`."""
        size, seed = self.config.train.global_batch_size, self.config.seeds().data
        return stream_samples(self.state.dataset.packed, step - 1, size, seed)[0].tolist()

    def facts(self) -> dict[str, Any]:
        """What a checkpoint keeps of what the run is made of."""
        return {
            "versions": VERSIONS,
            "threads": self.threads,
            "linear_library": library_in_use() if self.engine.device.type == "cpu" else None,
            "tokenizer": asdict(self.state.identity),
            "data": data_facts(self.state.dataset.packed, self.state.evaluation.validation),
            "lineage": self.state.counters.get("lineage", []),
        }

    def announce(self, journal: Journal) -> None:
        """Record and print what the run is made of."""
        state, evaluation = self.state, self.state.evaluation
        if state.branch is not None:
            journal.event(state.start_step, event="branched", parent=state.branch.lineage["parent_run"])
        facts, line = run_summary(self.config, state, self.engine)
        journal.event(state.start_step, event="start", versions=VERSIONS, threads=self.threads, **facts)
        unknown = [known.line(name) for name, known in evaluation.unknown().items() if known.is_high]
        warnings = [f"warning: {shortage}" for shortage in shortages(evaluation.section, evaluation.validation)]
        for text in (line, *evaluation.notes(), *warnings, *unknown):
            journal.log(text)


def claim_old_run(run: RunDirectory, lock: DirectoryLock, request: StopRequest) -> None:
    """Take the directory of a run that is there, and what an earlier process was asked; rank 0's part."""
    if distributed.is_main() and run.config.is_file():
        lock.take()
        request.clear_marks(run)


def build_run(
    config: Config, device: torch.device, log: Callable[[str], None], lock: DirectoryLock, *hooks: Callable[..., Any]
) -> BuiltRun:
    """Build everything, and report what the run continues from and what earlier starts left.

    `hooks` are the last arguments of `BuiltRun`.

    Raises:
        InputError: see `build_state`.
    """
    state = build_state(config, log, lock)
    built = BuiltRun(config, state, device, *hooks)
    if state.checkpoint is not None:
        log(state.origin)
        if line := other_threads(state.counters.get("threads"), built.threads):
            log(line)
    for line in leftovers(lock):
        log(line)
    if removed := built.saver.removed:
        places = [str(path.relative_to(built.directory.path)) for path in removed]
        log(f"removed what was half-written: {listed(places)}")
    return built


def open_records(built: BuiltRun, journal: Journal) -> OnsetSnapshots | None:
    """Open rank 0's records, and the watch over them if the configuration has one."""
    if not distributed.is_main():
        return None
    config, state = built.config, built.state
    resume_step = state.start_step if state.checkpoint is not None else -1
    journal.records = Records(built.directory.path, resume_step, config.logging.tensorboard)
    if state.branch is not None:
        journal.records.show_past()
    if not config.watch.metrics:
        return None
    own_step = resume_step if state.branch is None else -1
    watch = OnsetSnapshots(config, own_step, journal.records, built.saver, journal.log)
    journal.observers.append(watch.observe)
    return watch


def build_state(config: Config, log: Callable[[str], None], lock: DirectoryLock | None = None) -> RunState:
    """Open and check everything, and build the model with its initial or resumed weights.

    `lock` is the claim to the run's directory; None: a dry run, which writes nothing.

    Raises:
        InputError: anything that the user must mend; a CommonError where every rank raises it.
    """
    start = on_all_ranks(lambda: find_start(config, log) if distributed.is_main() else None)
    checkpoint, branch = distributed.broadcast_object(start)
    state = on_all_ranks(lambda: _build(config, checkpoint))
    if branch is not None:
        state.branch = branch
        state.counters["lineage"] = [*state.counters.get("lineage", []), branch.link]
    device = torch.device("cuda", distributed.local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    sets = number_needing(EDGES, state.terms)
    asked = (state.dataset.packed.seq_length, _dtype(config), device, sets)
    on_all_ranks(lambda: check_attention_backend(state.bert.config, *asked))
    if device.type == "cuda":
        # It communicates, but every rank meets its one barrier whatever fails.
        on_all_ranks(lambda: build_attention_kernels(state.bert.config, config.train.micro_batch_size, *asked))
    else:
        choose_library(state)
    if lock is not None:  # last, so that a run which is refused leaves no directory behind
        step = state.start_step
        on_all_ranks(lambda: begin_run(config, checkpoint, branch, lock, step) if distributed.is_main() else None)
    return state


def choose_library(state: RunState) -> None:
    """Have linear layers multiply with what the run began with, by its checkpoint, or with what rank 0 finds faster.

    Results differ in rounding. Checkpoints of earlier versions and of GPUs say nothing; these follow the processor.
    """
    library = state.counters.get("linear_library")
    if state.checkpoint is None:
        library = distributed.broadcast_object(measure_library() if distributed.is_main() else None)
    use_library(library)


def _build(config: Config, checkpoint: Path | None) -> RunState:
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
        check_overlap(packed.parts, validation)
    for name, part in (("train", packed), ("validation", validation)):
        if part is not None and part.seq_length > config.model.max_position_embeddings:
            raise InputError(
                f"model.max_position_embeddings: {config.model.max_position_embeddings} is less than the sequence "
                f"length {part.seq_length} of data.{name}"
            )
    rate = config.masking_rate()
    dataset = MLMDataset(
        packed,
        seed=config.seeds().data,
        mask_prob=rate,
        largest_mask_prob=largest(rate),
        split=config.masking.split,
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        fixed_shapes=train.compiles("cuda" if torch.cuda.is_available() else "cpu"),
    )
    counters = {"step": 0, "tokens": 0, "seconds": 0.0} if checkpoint is None else read_state(checkpoint)
    if counters["step"] > train.steps:
        raise InputError(
            f"train.steps: {train.steps} is less than the {counters['step']} updates that are already done"
        )
    check_same_data(counters.get("data", {}), packed, validation)
    bert_config = config.shape(packed.tokenizer.vocab_size, packed.tokenizer.pad_id)
    bert = _model(bert_config, config, checkpoint, tokenizer)
    terms, max_length = config.terms(packed.tokenizer.special_ids), config.model.max_position_embeddings
    evaluation = LiveEvaluation(config.evaluation, Resources(tokenizer, validation, max_length, data.mask_prob, terms))
    return RunState(tokenizer, identity, dataset, bert, terms, evaluation, checkpoint, counters)


def make_saver(
    config: Config, engine: Engine, state: RunState, write: Callable[[Path, RankSlice], None] = write_slice
) -> Saver:
    """What writes the run's checkpoints and snapshots."""
    bert_config, tokenizer = state.bert.config, state.tokenizer
    describe = partial(write_description, bert_config=bert_config, tokenizer=tokenizer, config_yaml=config.to_yaml())

    def write_model(directory: Path, step: int, weights: dict[str, Tensor]) -> None:
        # A copy, since writing a tokenizer for other programs changes it.
        write_hf(directory, bert_config, weights, copy.deepcopy(tokenizer), config.snapshots.dtype, step)

    return Saver(RunDirectory(config.run.output_dir), config.checkpoint, engine, describe, write_model, write)


def run_summary(config: Config, state: RunState, engine: Engine) -> tuple[dict[str, Any], str]:
    """What a run is made of: for its record, and as a line for the user."""
    train, packed, world_size = config.train, state.dataset.packed, distributed.world_size()
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.bert.parameters())
    device = engine.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    attention, compiled = engine.attention_backend(packed.seq_length), train.compiles(device.type)
    facts = {"world_size": world_size, "device": name, "parameters": parameters}
    facts |= {"attention": attention, "compiled": compiled}
    if device.type == "cpu":
        facts["linear_library"] = library_in_use()
    if unknown := state.evaluation.unknown():
        facts["unknown"] = {field: counted.record() for field, counted in unknown.items()}
    return facts | state.evaluation.facts(), (
        f"megatron_sas {__version__}: {parameters:,} parameters, {packed.num_sequences:,} sequences of "
        f"{packed.seq_length}, {world_size} × {name}, ZeRO-{train.zero_stage}, {train.precision}, attention by "
        f"{attention}{', compiled' if compiled else ''}, "
        f"batch {train.global_batch_size} = {world_size} × {train.micro_batch_size} × {state.dataset.accumulation}"
    )


def measure_throughput(config: Config, state: RunState, device: torch.device, clock: Callable[[], float]) -> Throughput:
    """The run's clock and token counter, from zero."""
    masked, peak = mean(config.masking_rate(), config.train.steps), None
    flops = flops_per_token(state.bert.config, state.dataset.packed.seq_length, masked)
    if device.type == "cuda":
        peak = peak_flops(torch.cuda.get_device_name(device), _dtype(config))
    return Throughput(
        clock=clock, flops_per_token=flops, peak_flops=None if peak is None else peak * distributed.world_size()
    )


def _dtype(config: Config) -> torch.dtype:
    return torch.bfloat16 if config.train.precision == "bf16" else torch.float32


def _model(
    bert_config: ModelConfig, config: Config, checkpoint: Path | None, tokenizer: PreTrainedTokenizerBase
) -> MaskedLM:
    """The model with the run's weights, else those of `model.init_from`, else random ones; equal on every rank."""
    torch.default_generator.manual_seed(config.seeds().init)
    bert = build_model(bert_config)
    if checkpoint is not None:
        _load_matching(bert, checkpoint, f"{checkpoint}: has", tokenizer)
    elif config.model.init_from is not None:
        source = Path(config.model.init_from)
        _load_matching(bert, source, f"model.init_from: {source} has", tokenizer)
    return bert


def _load_matching(bert: MaskedLM, source: Path, where: str, tokenizer: PreTrainedTokenizerBase) -> None:
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
