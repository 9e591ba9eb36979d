"""The part of training that knows DeepSpeed: one update at a time, and the full state as named float32 tensors.

Full tensors, gathered parameter by parameter, are the same whatever the ZeRO stage and the number of processes, so a
checkpoint made of them resumes exactly and moves between both.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megatron_sas.core import distributed
from megatron_sas.core.settings import Section
from megatron_sas.data.masking import hash_u64
from megatron_sas.data.mlm_dataset import Window
from megatron_sas.kernels import choose_backend
from megatron_sas.kernels.layer_norm import use_apex_layer_norm_
from megatron_sas.launch.kernel_cache import distinct_windows
from megatron_sas.model.base import MaskedLM
from megatron_sas.objective.pretraining import MaskedLMWithTerms
from megatron_sas.optim.optimizers import OPTIMIZERS, moment_names, without_compiler
from megatron_sas.optim.section import TrainSection
from megatron_sas.train.deepspeed_config import deepspeed_config

DROPOUT = 0x64726F70  # keeps these seeds apart from every other use of the run's seed


@dataclass
class UpdateResult:
    """Sums of this rank over one accumulation window; scalars on the device, not yet reduced over ranks."""

    mlm_sum: Tensor
    num_masked: Tensor  # already summed over all ranks
    term_sums: dict[str, Tensor]  # of the terms that were computed
    edge_counts: dict[str, Tensor]
    grad_norm: Tensor  # of the whole update, before clipping; not finite: the update was skipped
    flags: list[int]  # the callers' flags, summed over all ranks


class Engine:
    """A model under DeepSpeed with the optimizer of the section `train`."""

    def __init__(
        self,
        module: MaskedLMWithTerms,
        train: TrainSection,
        seed: int,
        device: torch.device,
        options: Section | None = None,
    ) -> None:
        """Wrap `module`, whose weights must be equal on all ranks; `options` are the optimizer's own.

        Raises:
            InputError: see `deepspeed_config`.
        """
        import deepspeed

        self.train_section, self.seed, self.device = train, seed, device
        world_size = distributed.world_size()
        config = deepspeed_config(train, world_size)
        self.accumulation = config["gradient_accumulation_steps"]
        self.world_size = world_size
        self._initial = {name: tensor.detach().clone() for name, tensor in module.bert.state_dict().items()}
        named = list(module.bert.named_parameters())
        self._kind = OPTIMIZERS[train.optimizer]
        self._moments_of = {name: moment_names(self._kind, name, parameter) for name, parameter in named}
        self.moments = tuple(dict.fromkeys(key for keys in self._moments_of.values() for key in keys))
        without_compiler()
        optimizer = self._kind.build(named, train, options)
        optimizer.register_step_pre_hook(self._skip_unless_finite)
        self._norm: Tensor | None = None
        # One process that trains whole tensors has nothing to reduce, so DeepSpeed's wrappers and hooks around forward,
        # backward and step would only take time: half a millisecond a micro-batch. A JSON may ask them for something.
        self._alone = world_size == 1 and train.zero_stage == 0 and train.deepspeed_config is None
        if train.zero_stage == 3:
            # The word embedding is used again by the LM head, outside the module that owns it.
            for user in (module, module.bert):
                deepspeed.zero.register_external_parameter(user, module.bert.embeddings.word.weight)
        if train.compiles(device.type):
            module.compile_parts()
        elif device.type == "cuda":
            use_apex_layer_norm_(module)
        self._engine, *_ = deepspeed.initialize(
            model=module.to(device), optimizer=optimizer, config=config, dist_init_required=False
        )
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        self._autocast = train.precision == "bf16" and train.zero_stage == 0
        module.precision = self.precision
        self._module, self._parameters = module, list(module.parameters())
        if world_size == 1 and train.zero_stage == 0:  # it would flatten all gradients and copy them back
            self._engine.enable_backward_allreduce = False
        self._create_moments()
        if train.precision == "bf16" and train.zero_stage > 0:
            self._set_full(None, self._initial.__getitem__)  # DeepSpeed made its fp32 weights from rounded ones
        del self._initial

    @property
    def bert(self) -> MaskedLM:
        """The model. Under ZeRO-3 its parameters are gathered while a forward runs."""
        return self._module.bert

    def precision(self) -> contextlib.AbstractContextManager:
        """The context in which forwards run."""
        if self._autocast:
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def attention_backend(self, seq_length: int) -> str:
        """The kernel that training's attention takes, by name; where windows take another, both."""
        config = self.bert.config
        if config.attention_backend != "auto":
            return config.attention_backend
        dtype = torch.bfloat16 if self.train_section.precision == "bf16" else torch.float32
        probe = torch.empty(1, config.num_heads, seq_length, config.head_dim, dtype=dtype, device=self.device)
        windows = distinct_windows(config, seq_length)
        names = [choose_backend(probe, config.attention_dropout, window=window) for window in windows]
        return " and ".join(dict.fromkeys(names))

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """The context in which evaluations run: not compiled, because their batches have many shapes."""
        compiled = self.train_section.compiles(self.device.type)  # to ask the compiler for nothing takes seconds once
        with self.precision(), torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext():
            yield

    def set_learning_rate(self, value: float) -> None:
        """Use `value` from the next update on."""
        for group in self._engine.basic_optimizer.param_groups:
            group["lr"] = value

    def update(
        self, window: Window, weights: Mapping[str, float], measure: bool, flags: Sequence[int] = ()
    ) -> UpdateResult:
        """One update from this rank's accumulation window; skipped by all ranks if loss or gradient is not finite.

        Args:
            window: the micro-batches of this rank.
            weights: λ of the module's terms by name. With 0 a term is computed only if `measure`, without gradient.
            flags: small numbers to be summed over all ranks; they travel with the count of masked tokens, for nothing.
        """
        train = self.train_section
        if not self.bert.training:
            self._engine.train()
        counts = self._to_device(_pinned([window.num_masked, *flags], self.device))
        num_masked, *_ = distributed.all_reduce_sum_(counts)
        read_flags = _reader(counts[1:])
        rounds = self.world_size * self.accumulation
        mlm_scale = rounds / num_masked.clamp(min=1)
        # Those with a weight first: a kernel treats the first set of edges on its own, and whether others are measured
        # must not show in what it rounds.
        terms = sorted(self._module.terms.items(), key=lambda term: weights[term[0]] == 0.0)
        scales = {
            name: weights[name] * (rounds / train.global_batch_size if term.reduction == "sequence" else 1.0)
            for name, term in terms
            if weights[name] or measure
        }
        mlm_sum = torch.zeros((), device=self.device)
        term_sums = {name: torch.zeros((), device=self.device) for name in scales}
        edge_counts = {name: torch.zeros((), dtype=torch.int64, device=self.device) for name in scales}
        # Dropout belongs to the micro-batch, so it is the same in a resumed run and on any number of processes.
        indices = np.array([batch.index for batch in window.micro_batches])
        seeds = hash_u64(DROPOUT, self.seed, window.step, indices) >> np.uint64(1)
        forward = self._module.forward if self._alone else self._engine
        for batch, seed in zip(window.micro_batches, seeds.tolist(), strict=True):
            seed_generators(seed, self.device)
            parts = forward(
                self._to_device(batch.input_ids),
                self._to_device(batch.masked_positions),
                self._to_device(batch.labels),
                self._to_device(batch.heads) if scales else None,
                mlm_scale=mlm_scale,
                term_scales=scales,
            )
            mlm_sum += parts.mlm_sum
            for name, value in parts.term_sums.items():
                term_sums[name] += value
            for name, count in parts.edge_counts.items():
                edge_counts[name] += count
            # Times 1, or NaN where the loss is not finite: then so is the gradient, and with it the norm, on all ranks.
            self._accumulate(parts.loss * (1.0 + 0.0 * parts.loss.detach()), batch is window.micro_batches[-1])
        if train.zero_stage > 0:
            self._norm = torch.as_tensor(self._engine.get_global_grad_norm(), device=self.device)
        return UpdateResult(mlm_sum, num_masked, term_sums, edge_counts, self._norm, read_flags())

    def _accumulate(self, loss: Tensor, last: bool) -> None:
        """Backward of one micro-batch, and after the `last` one clipping and the optimizer's step."""
        if self._alone:
            (loss / self.accumulation).backward()
        else:
            self._engine.backward(loss)
        if last and self.train_section.zero_stage == 0:
            self._norm = clip_gradients(self._parameters, self.train_section.grad_clip or float("inf"))
        if not self._alone:
            self._engine.step()  # which knows itself which micro-batch is the last
        elif last:
            self._engine.basic_optimizer.step()
            for parameter in self._parameters:
                parameter.grad = None

    def _skip_unless_finite(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Before the step: have it change nothing, its step count included, when the gradient's norm is not finite.

        The optimizer reads `found_inf` on the device, so the host does not wait. Stage 3 never comes here with such a
        norm: DeepSpeed reads it, and leaves the step out, itself. Offloaded parameters are on the CPU, where the
        optimizer would not wait for a copy from the GPU.
        """
        norm = self._norm if self.train_section.zero_stage == 0 else self._engine.optimizer._global_grad_norm
        device = next(p.device for group in optimizer.param_groups for p in group["params"])
        optimizer.found_inf = (~torch.isfinite(torch.as_tensor(norm, device=device))).float()

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The model's parameters in a fixed order."""
        return list(self.bert.named_parameters())

    def weight_norm(self) -> float:
        """Euclidean norm of all weights, in the precision that the model computes with. A collective."""
        if self.train_section.zero_stage == 3:
            parts = [own_elements(parameter, distributed.rank()) for _, parameter in self.named_parameters()]
        else:
            parts = [parameter.detach() for _, parameter in self.named_parameters()]
        total = torch.stack([part.double().square().sum() for part in parts]).sum()
        total = total.to(self.device)  # offloaded parameters are not there
        if self.train_section.zero_stage == 3:
            distributed.all_reduce_sum_(total)
        return float(total.sqrt())

    def full_tensors(self, key: str | None, names: set[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Every weight (`key` None) or optimizer moment (`key` of `moments`) in full, float32 on the CPU.

        A collective: all ranks must iterate to the end. A rank gets (and copies) only the tensors in `names`.
        Parameters of which the optimizer keeps no such moment are left out.
        """
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        for name, parameter in self._parameters_with(key):
            if self.train_section.zero_stage == 0:
                value = parameter.detach() if key is None else self._engine.optimizer.state[parameter][key]
            elif key is None:
                value = safe_get_full_fp32_param(parameter)
            else:
                value = safe_get_full_optimizer_state(parameter, key)
            if names is None or name in names:
                yield name, value.detach().to("cpu", torch.float32, copy=True)

    def load_moments(self, read: Callable[[str, str], Tensor], updates: int) -> None:
        """Set the moments to `read(key, name)` for each key of `moments`, and step counts to `updates`.

        `updates` are those that changed the weights: skipped ones do not count.
        """
        for _, tensor in self._optimizer_tensors():
            state = self._engine.basic_optimizer.state[tensor]
            if "step" in state:
                state["step"].fill_(updates)
        for key in self.moments:
            self._set_full(key, lambda name, key=key: read(key, name))

    def _create_moments(self) -> None:
        """Create the optimizer's state as its first step would, so that it can be read and written from the start.

        DeepSpeed's ZeRO-1 and -2 tie moments to parameters when the first of several parameter groups has been
        updated, and so miss those of the others.
        """
        for name, tensor in self._optimizer_tensors():
            self._engine.basic_optimizer.state[tensor] = self._kind.initial_state(name, tensor)
        link = getattr(self._engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:
            link()

    def _optimizer_tensors(self) -> list[tuple[str, Tensor]]:
        """What the optimizer updates on this rank: the parameters by name, or under ZeRO the rank's flat partitions."""
        if self.train_section.zero_stage == 0:
            return self.named_parameters()
        if self.train_section.zero_stage == 3:
            return [("", tensor) for tensor in self._engine.optimizer.fp32_partitioned_groups_flat]
        return [("", p) for group in self._engine.basic_optimizer.param_groups for p in group["params"]]

    def _parameters_with(self, key: str | None) -> list[tuple[str, nn.Parameter]]:
        """The parameters of which the optimizer keeps the moment `key`; all for None."""
        return [(name, p) for name, p in self.named_parameters() if key is None or key in self._moments_of[name]]

    def _set_full(self, key: str | None, value_of: Callable[[str], Tensor]) -> None:
        """Write full tensors (weights for `key` None) into this rank's part of them."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        for name, parameter in self._parameters_with(key):
            value = value_of(name).to(self.device, torch.float32)
            if self.train_section.zero_stage == 0:
                target = parameter.data if key is None else self._engine.optimizer.state[parameter][key]
                target.copy_(value)
            elif self.train_section.zero_stage == 3:
                _set_partition(parameter, key, value)
            elif key is None:
                safe_set_full_fp32_param(parameter, value)
            else:
                safe_set_full_optimizer_state(parameter, value, key)


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed what a step on `device` draws from as `torch.manual_seed` does.

    That one also seeds every other kind of device, and keeps a traceback for each that is not in use: 1 to 2 ms.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
    """`nn.utils.clip_grad_norm_`: scale gradients down to the norm `limit`, and return the norm before.

    On CPUs, where nobody waits for a number, gradients that are short enough are not multiplied by 1.
    """
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if norm.device.type != "cpu" or not norm + 1e-6 <= limit:  # the divisor of torch's factor
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


def own_elements(parameter: nn.Parameter, rank: int) -> Tensor:
    """ZeRO-3: the rank's partition, which is here, without the padding, which DeepSpeed never initialises."""
    before = parameter.ds_tensor.numel() * rank  # elements that lower ranks hold
    return parameter.ds_tensor[: max(parameter.ds_numel - before, 0)]


def _set_partition(parameter: nn.Parameter, key: str | None, value: Tensor) -> None:
    """ZeRO-3: write this rank's partition of a full tensor; the last partition may be padded."""
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    size = parameter.ds_tensor.numel()
    start = size * distributed.rank()
    part = torch.zeros(size, device=value.device)
    available = value.flatten()[start : start + size]
    part[: available.numel()] = available
    if key is None:
        safe_set_local_fp32_param(parameter, part)
    else:
        safe_set_local_optimizer_state(parameter, part, key)


def _pinned(values: list[int], device: torch.device) -> Tensor:
    """Integers from which a copy to `device` does not wait for the device."""
    return torch.tensor(values, pin_memory=device.type == "cuda")


def _reader(values: Tensor) -> Callable[[], list[int]]:
    """Begin copying integers to the host; calling the result waits for that copy, not for work queued after it."""
    if values.device.type != "cuda":
        return values.tolist
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> list[int]:
        copied.synchronize()
        return host.tolist()

    return read
