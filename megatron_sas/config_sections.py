"""The sections of a configuration: every field with its type, default and meaning, and what must hold between them."""

from __future__ import annotations

import typing
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from megatron_sas.model.config import SIZES
from megatron_sas.optim.schedules import Stage, check_stages

FAULT_SEPARATOR = "\x1f"  # between the faults of one section, which pydantic passes on as one message


class Section(BaseModel):
    """A part of the configuration: unknown fields are errors, values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_truth_values(cls, value: Any, info: ValidationInfo) -> Any:
        """`yes` is no number, though it is one to Python."""
        annotation = cls.model_fields[info.field_name].annotation
        if isinstance(value, bool) and bool not in (annotation, *typing.get_args(annotation)):
            raise PydanticCustomError("truth_value", "input should not be true or false")
        return value

    def faults(self) -> list[str]:
        """What is wrong between the fields of this section; each begins with the field's name."""
        return []

    @model_validator(mode="after")
    def _report_faults(self) -> Section:
        if faults := self.faults():
            raise ValueError(FAULT_SEPARATOR.join(faults))
        return self


class RunSection(Section):
    """Where a run lives and how it is repeated."""

    output_dir: str = Field(description="directory of the run: configuration, metrics, checkpoints")
    seed: int = Field(
        1234, description="initial weights, sample order, masks and dropout are functions of it", ge=0, lt=2**63
    )
    resume: Literal["auto", "never"] = Field(
        "auto", description="auto: continue from the newest checkpoint in output_dir; never: output_dir must be new"
    )
    branch_from: str | None = Field(
        None, description="checkpoint of another run, or a run (its newest): begin there and share its past exactly"
    )
    timeout_minutes: float = Field(
        30.0, description="a run that makes no progress for so long ends, naming the process it waits for", gt=0, le=1e6
    )


class ModelSection(Section):
    """The architecture: a named size, and fields that replace its own."""

    size: Literal["tiny", "mini", "small", "medium", "base", "large"] = Field("base", description="named size")
    num_layers: int | None = Field(None, description="instead of the size's", ge=1)
    hidden_size: int | None = Field(None, description="instead of the size's", ge=1)
    num_heads: int | None = Field(None, description="instead of the size's", ge=1)
    intermediate_size: int | None = Field(None, description="instead of the size's", ge=1)
    max_position_embeddings: int = Field(512, description="longest sequence the model can take", ge=3)
    norm_placement: Literal["post", "pre"] = Field("post", description="LayerNorm after (BERT) or before each block")
    hidden_dropout: float = Field(0.1, description="dropout of embeddings and block outputs", ge=0, lt=1)
    attention_dropout: float = Field(0.1, description="dropout of attention probabilities; use 0 on CPU", ge=0, lt=1)
    attention_backend: Literal["auto", "triton", "sdpa", "cudnn", "flex", "fa4", "chunked", "reference"] = Field(
        "auto", description="kernel behind dependency attention"
    )
    init_from: str | None = Field(
        None, description="Hugging Face directory or checkpoint with the initial weights; default: random ones"
    )

    def dimensions(self) -> dict[str, int]:
        """Layers, hidden size, heads and intermediate size: the named size's, or what replaces them."""
        return {name: getattr(self, name) or value for name, value in SIZES[self.size].items()}

    def faults(self) -> list[str]:
        """The hidden size must divide among the heads."""
        size = self.dimensions()
        if size["hidden_size"] % size["num_heads"]:
            return [f"hidden_size: {size['hidden_size']} is not a multiple of num_heads {size['num_heads']}"]
        return []


class TrainingPart(Section):
    """One of several sources of training data."""

    prefix: str = Field(description="prefix of packed data")
    weight: float | None = Field(None, description="share of the stream, relative to the others'", gt=0)


class DataSection(Section):
    """Packed data, as written by tools/preprocess_data.py."""

    train: str | tuple[TrainingPart, ...] = Field(
        description="prefix of the training data, or a list of prefixes (shuffled together) or of {prefix, weight}"
    )
    validation: str | None = Field(None, description="prefix of the validation data")
    tokenizer: str | None = Field(None, description="vocabulary or directory; default: the one named by the data")
    mask_prob: float = Field(0.15, description="probability with which a token is masked", gt=0, lt=1)
    heads: str | None = Field(None, description="name of a control made by tools/make_control.py instead of the parses")

    @field_validator("train", mode="before")
    @classmethod
    def _list_of_parts(cls, value: Any) -> Any:
        """A list's faults are told here: pydantic would tell them once as a text and once as a list."""
        if isinstance(value, str):
            return value
        try:
            if not isinstance(value, list | tuple):
                raise TypeError
            parts = [{"prefix": part} if isinstance(part, str) else part for part in value]
            return tuple(TrainingPart.model_validate(part) for part in parts)
        except (TypeError, ValidationError):
            raise PydanticCustomError(
                "training_data", "should be a prefix, a list of prefixes, or a list of {prefix, weight}, weight > 0"
            ) from None

    def parts(self) -> list[tuple[str, float | None]]:
        """Prefix and weight of every part of the training data."""
        return [(self.train, None)] if isinstance(self.train, str) else [(p.prefix, p.weight) for p in self.train]

    def faults(self) -> list[str]:
        """A mixture needs parts, all with weights or all without."""
        weights = [weight for _, weight in self.parts()]
        if not weights:
            return ["train: is an empty list"]
        if None in weights and any(weights):
            return ["train: some parts have a weight and some have none; give all of them one, or none"]
        return []


class SasSection(Section):
    """The SAS regularizer: loss = MLM + λ·R. λ > 0 suppresses syntactic attention, λ < 0 promotes it."""

    schedule: tuple[Stage, ...] = Field(
        (), description="λ by completed updates: a number, or stages {start, end, value[, end_value]}; default 0"
    )
    mode: Literal["max", "uniform"] = Field("max", description="R: best (layer, head) per edge, or all of them")
    p: float = Field(1.0, description="exponent of mode uniform", ge=1)
    directions: Literal["both", "to_head", "to_dependent"] = Field("both", description="attention that counts")
    reduction: Literal["sequence", "sum"] = Field(
        "sequence", description="mean over the global batch, or the paper's sum over the micro-batch"
    )

    @field_validator("schedule", mode="before")
    @classmethod
    def _number_is_a_constant(cls, value: Any) -> Any:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return ({"start": 0, "value": float(value)},) if value else ()
        return value

    def faults(self) -> list[str]:
        """Stages must be well-formed and must not overlap."""
        return [f"schedule: {fault}" for fault in check_stages(self.schedule)]


class TrainSection(Section):
    """Optimization. Gradient accumulation is derived: global_batch_size / (micro_batch_size × processes)."""

    steps: int = Field(description="updates", ge=1)
    global_batch_size: int = Field(256, description="sequences per update", ge=1)
    micro_batch_size: int = Field(description="sequences per forward on one device", ge=1)
    precision: Literal["fp32", "bf16"] = Field("bf16", description="arithmetic of the model; weights are kept in fp32")
    learning_rate: float = Field(1e-4, description="peak", gt=0, le=1e3)
    warmup_steps: int = Field(10_000, description="linear warm-up", ge=0)
    decay_horizon: int = Field(1_000_000, description="step at which the linear decay would reach 0", ge=1)
    weight_decay: float = Field(0.0, description="AdamW, not on biases and LayerNorms", ge=0)
    adam_betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW")
    adam_eps: float = Field(1e-8, description="AdamW", ge=1e-30)  # smaller ones are 0 beside 0 in float32
    grad_clip: float = Field(1.0, description="largest global gradient norm; 0: no clipping", ge=0)
    compile: bool | None = Field(None, description="torch.compile, not with ZeRO stage 3; default: on GPUs")
    deterministic: bool = Field(
        False, description="on GPUs: fixed kernels, so that a run repeated or resumed there has the same bits; slower"
    )
    max_nonfinite_updates: int = Field(
        10, description="updates with NaN or infinity are skipped; so many in a row end the run", ge=1
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(0, description="DeepSpeed ZeRO: what is sharded over processes")
    deepspeed_config: str | None = Field(None, description="DeepSpeed JSON for what this file does not own")

    def compiles(self, device_type: str) -> bool:
        """Whether the model's parts are compiled on such a device."""
        if self.compile is None:
            return device_type == "cuda" and self.zero_stage < 3
        return self.compile

    def faults(self) -> list[str]:
        """Batch sizes must divide, and the run must end before the learning rate does."""
        faults = []
        if self.global_batch_size % self.micro_batch_size:
            faults.append(
                f"global_batch_size: {self.global_batch_size} is not a multiple of micro_batch_size "
                f"{self.micro_batch_size}"
            )
        if self.warmup_steps >= self.decay_horizon:
            faults.append(f"warmup_steps: {self.warmup_steps} is not before decay_horizon {self.decay_horizon}")
        if self.compile and self.zero_stage == 3:
            faults.append(
                "compile: ZeRO stage 3 gathers weights inside the layers; set compile: false or zero_stage: 2"
            )
        if self.steps > self.decay_horizon:
            faults.append(f"steps: {self.steps} is beyond decay_horizon {self.decay_horizon}, where lr reaches 0")
        if not all(0 <= beta < 1 for beta in self.adam_betas):
            faults.append(f"adam_betas: {list(self.adam_betas)} must be at least 0 and less than 1")
        return faults


class When(Section):
    """A set of completed updates: step 0, the last, every `every`, and every `dense_every` until `dense_until`."""

    every: int | None = Field(None, description="regular interval in steps; none: only the first and last step", ge=1)
    dense_every: int | None = Field(None, description="interval of the early, dense part", ge=1)
    dense_until: int = Field(0, description="where the dense part ends (included)", ge=0)
    at: tuple[int, ...] = Field((), description="further steps")

    @property
    def names_steps(self) -> bool:
        """Whether any step but the first and the last is asked for."""
        return self.every is not None or self.dense_every is not None or bool(self.at)

    def faults(self) -> list[str]:
        """The dense part needs an interval and an end."""
        if (self.dense_every is None) != (self.dense_until == 0):
            return ["dense_every: needs dense_until, and the other way round"]
        return []

    def due(self, step: int, last_step: int) -> bool:
        """Whether `step` belongs to the set, for a run that ends at `last_step`."""
        return (
            step in (0, last_step)
            or step in self.at
            or (self.every is not None and step % self.every == 0)
            or (self.dense_every is not None and step <= self.dense_until and step % self.dense_every == 0)
        )


class CheckpointSection(When):
    """When complete checkpoints are written, and which are kept; default: every 10 minutes, the last two."""

    minutes: float | None = Field(
        None, description="also after so many minutes; 0: never; default: 10 when no steps are named here", ge=0, le=1e6
    )
    keep_last: int | None = Field(
        None, description="keep so many of the newest; default: all, but 2 when no steps are named here", ge=1
    )
    keep_every: int | None = Field(None, description="also keep those at multiples of this step", ge=1)

    @property
    def seconds(self) -> float | None:
        """After how long a checkpoint is due, whatever the step; None: never by the clock."""
        minutes = self.minutes if self.minutes is not None or self.names_steps else 10.0
        return 60.0 * minutes if minutes else None

    @property
    def kept(self) -> int | None:
        """How many of the newest are kept; None: all."""
        return self.keep_last if self.keep_last is not None or self.names_steps else 2

    def faults(self) -> list[str]:
        """`keep_every` makes exceptions from `keep_last`, and what the clock writes has no other limit."""
        faults = super().faults()
        if self.kept is None:
            faults += ["keep_every: needs keep_last"] if self.keep_every else []
            faults += ["minutes: needs keep_last, or there is no end of checkpoints"] if self.minutes else []
        return faults


class SnapshotSection(When):
    """When the model alone is written, as a Hugging Face directory in snapshots/; default: never."""

    dtype: Literal["bf16", "fp32"] = Field("bf16", description="precision of the written weights")

    def due(self, step: int, last_step: int) -> bool:
        """Whether `step` belongs to the set; no step does when nothing is configured."""
        return self.names_steps and super().due(step, last_step)


class WatchSection(Section):
    """Detection of onsets while they happen, with dense snapshots around them (docs/branching.md); default: off."""

    metrics: tuple[Literal["uas", "loss"], ...] = Field(
        (), description="curves to watch: uas (live evaluation), loss (masked-LM loss in training)"
    )
    delta: int | None = Field(None, description="Δ, steps over which an onset is a bend", ge=4)
    start: int = Field(0, description="step from which the curves count: after the loss's first fall", ge=0)
    every: int | None = Field(None, description="steps between snapshots; default: a quarter of delta", ge=1)
    keep: int = Field(12, description="snapshots in the ring, kept when an onset is detected", ge=1)
    after: int | None = Field(None, description="steps of snapshots after the detection; default: 4 delta", ge=0)

    @property
    def interval(self) -> int:
        """Steps between snapshots."""
        return self.every or self.delta // 4

    @property
    def reach_after(self) -> int:
        """Steps after a detection whose snapshots are kept."""
        return 4 * self.delta if self.after is None else self.after

    @property
    def most_snapshots(self) -> int:
        """How many there can be at most: the ring, what a restart would need, and those that are kept."""
        if not self.metrics:
            return 0
        return 3 * self.keep + len(self.metrics) * (self.keep + self.reach_after // self.interval + 1)

    def due(self, step: int) -> bool:
        """Whether the ring takes a snapshot after `step` updates."""
        return bool(self.metrics) and step >= self.start and step % self.interval == 0

    def faults(self) -> list[str]:
        """A watch needs its Δ, and a ring that reaches back over both windows of the bend."""
        if not self.metrics:
            return []
        if self.delta is None:
            return ["delta: is required when metrics are watched"]
        if self.keep * self.interval < 2 * self.delta:
            return [
                f"keep: {self.keep} snapshots, one every {self.interval} steps, reach back less than twice delta "
                f"{self.delta}, where an onset is seen; keep more"
            ]
        return []


class EvaluationSection(When):
    """When and on what the model is evaluated while it trains."""

    treebank: str | None = Field(None, description="CoNLL-U or JSON lines for UAS")
    treebank_sentences: int | None = Field(None, description="use the first so many sentences", ge=1)
    blimp: str | None = Field(None, description="directory of minimal pairs (*.jsonl)")
    blimp_pairs_per_set: int | None = Field(None, description="use the first so many pairs of each set", ge=1)
    blimp_metric: Literal["pll", "within_word_l2r"] = Field("pll", description="how a sentence is scored")
    validation_sequences: int = Field(256, description="sequences of data.validation for the MLM loss", ge=1)
    complexity_sequences: int | None = Field(
        None, description="sequences of data.validation for TwoNN intrinsic dimension; none: not measured", ge=10
    )
    batch_tokens: int = Field(16_384, description="tokens per evaluation forward", ge=1)
    max_time_share: float = Field(0.25, description="evaluations are thinned out beyond this share of time", gt=0, lt=1)


class LoggingSection(Section):
    """Records of every step; they are read off the device and written every `every` steps."""

    every: int = Field(10, description="steps between writes", ge=1)
    tensorboard: bool = Field(True, description="also write TensorBoard files")
