"""What every optimizer promises: state as it says, exact skipping on `found_inf`, and reasons where it can't be had."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from megatron_sas.config import Config
from megatron_sas.model.bert import Bert
from megatron_sas.model.config import BertConfig
from megatron_sas.optim.optimizers import OPTIMIZERS, moments_of
from megatron_sas.optim.section import TrainSection
from megatron_sas.run.memory import count_parameters, optimizer_bytes

CONFIG = BertConfig(num_layers=2, hidden_size=32, num_heads=2, intermediate_size=64, vocab_size=70)
TRAIN = TrainSection(steps=9, micro_batch_size=1, learning_rate=1e-2, weight_decay=0.1)


def model_and_optimizer(name: str) -> tuple[Bert, torch.optim.Optimizer]:
    """A small model, and the optimizer with the state that the engine makes for it."""
    torch.manual_seed(0)
    bert = Bert(CONFIG)
    named = list(bert.named_parameters())
    optimizer = OPTIMIZERS[name].build(named, TRAIN, None)
    for parameter_name, parameter in named:
        optimizer.state[parameter] = OPTIMIZERS[name].initial_state(parameter_name, parameter)
    return bert, optimizer


def update(bert: Bert, optimizer: torch.optim.Optimizer, seed: int, found_inf: float = 0.0, bad: float = 1.0) -> None:
    """One update with random gradients, times `bad`."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in bert.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * bad
    optimizer.found_inf = torch.tensor(found_inf)
    optimizer.step()


def everything(bert: Bert, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Copies of weights and state by name."""
    found = {name: parameter.detach().clone() for name, parameter in bert.named_parameters()}
    for name, parameter in bert.named_parameters():
        found |= {f"{key}.{name}": value.clone() for key, value in optimizer.state[parameter].items()}
    return found


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1.0])
def test_found_inf_changes_no_bit_of_weights_and_state(name, bad):
    bert, optimizer = model_and_optimizer(name)
    update(bert, optimizer, 1)
    before = everything(bert, optimizer)
    update(bert, optimizer, 2, found_inf=1.0, bad=bad)
    after = everything(bert, optimizer)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    update(bert, optimizer, 2)
    again = everything(bert, optimizer)
    assert not any(torch.equal(before[key], again[key]) for key in before)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_first_update_that_is_skipped_leaves_no_trace(name):
    clean, spoilt = model_and_optimizer(name), model_and_optimizer(name)
    update(*spoilt, 2, found_inf=1.0, bad=float("nan"))
    for pair in (clean, spoilt):
        update(*pair, 3)
    first, second = everything(*clean), everything(*spoilt)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_what_the_optimizer_makes_itself(name):
    """Its names and shapes, so that nothing else appears in a checkpoint of a later update."""
    bert, optimizer = model_and_optimizer(name)
    names = {parameter_name: set(optimizer.state[p]) for parameter_name, p in bert.named_parameters()}
    update(bert, optimizer, 1)
    for parameter_name, parameter in bert.named_parameters():
        assert set(optimizer.state[parameter]) == names[parameter_name]
        moments = moments_of(OPTIMIZERS[name], parameter_name, parameter)
        assert {key: value.shape for key, value in moments.items()} == dict.fromkeys(moments, parameter.shape)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_learning_rate_reaches_every_parameter(name):
    bert, optimizer = model_and_optimizer(name)
    before = everything(bert, optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    update(bert, optimizer, 1)
    assert all(torch.equal(before[key], value) for key, value in bert.named_parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_owns_its_section(name):
    section = OPTIMIZERS[name].OPTIONS
    assert (name in Config.model_fields) == (section is not None)
    assert section is None or Config.model_fields[name].annotation is section


def test_bytes_of_adamw_are_two_moments():
    assert optimizer_bytes(CONFIG, "adamw") == 8 * count_parameters(CONFIG)


def test_the_trainer_loads_neither_the_compiler_nor_scipy():
    """Seconds of every start, for nothing that an uncompiled run needs."""
    code = (
        "import sys, torch, megatron_sas.train.trainer\n"
        "from megatron_sas.optim import adamw, optimizers\n"
        "from megatron_sas.optim.section import TrainSection\n"
        "weight = torch.nn.Parameter(torch.ones(2, 2))\n"
        "optimizers.without_compiler()\n"
        "optimizers.moment_names(adamw, 'weight', weight)\n"
        "section = TrainSection(steps=1, global_batch_size=1, micro_batch_size=1)\n"
        "optimizer = adamw.build([('weight', weight)], section, None)\n"
        "weight.grad = torch.ones(2, 2)\n"
        "optimizer.step()\n"
        "print(*{'torch._dynamo', 'scipy', 'sympy', 'ruptures', 'torch.utils.tensorboard'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == ""
