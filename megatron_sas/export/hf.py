"""Training checkpoints to Hugging Face directories, and back."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_sas.core.cli import InputError
from megatron_sas.core.device import DTYPES
from megatron_sas.core.files import atomic_directory, check_absent, write_json_atomic, write_text_atomic
from megatron_sas.core.manifest import write_manifest
from megatron_sas.data.tokenizer import save_tokenizer, tokenizer_identity, vocab_size, write_tokenizer
from megatron_sas.export.model_card import model_card
from megatron_sas.model.architectures import architecture_of, build_model
from megatron_sas.model.config import ModelConfig
from megatron_sas.model.huggingface import to_hf_config, to_hf_state
from megatron_sas.run.directory import (
    CONFIG,
    HF_CONFIG,
    MODEL_CONFIG,
    MODEL_WEIGHTS,
    STATE,
    TOKENIZER_DIRECTORY,
    is_checkpoint,
    newest_of_run,
)
from megatron_sas.run.reading import (
    CONVERTED_STEP,
    FORMAT,
    HF_STEP,
    VERSION,
    load_state,
    model_step,
    read_checkpoint,
    read_model,
    read_tokenizer,
    write_model_config,
    write_weights,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def to_hf(source: str | Path, output: str | Path, dtype: str = "fp32", overwrite: bool = False) -> Path:
    """Write a Hugging Face directory that transformers 4 and 5 load; returns the checkpoint it was made of.

    Args:
        source: a training checkpoint, or a run directory (the checkpoint published last).
        output: the directory to make: config.json, model.safetensors, the tokenizer's files, README.md.
        dtype: precision of the written weights, one of `core.device.DTYPES`.
        overwrite: replace `output`, if it is a Hugging Face model or empty.

    Raises:
        InputError: `source` is no whole checkpoint; `output` exists.
    """
    check_output(output, HF_CONFIG, overwrite)
    checkpoint = newest_of_run(source)
    if not is_checkpoint(checkpoint):
        what = "no such directory" if not checkpoint.is_dir() else "neither a training checkpoint nor a run with one"
        raise InputError(f"{source}: {what}; give a directory that pretrain_mlm.py wrote")
    config, state, tokenizer_path = read_checkpoint(checkpoint)
    with atomic_directory(output, overwrite) as directory:
        try:
            write_hf(directory, config, state, read_tokenizer(tokenizer_path), dtype, model_step(checkpoint))
        except InputError as error:
            raise InputError(f"{checkpoint}: {error}") from None
        write_text_atomic(directory / "README.md", model_card(checkpoint, config, dtype))
    return checkpoint


def write_hf(
    directory: Path,
    config: ModelConfig,
    state: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    dtype: str,
    step: int | None,
) -> None:
    """Write config.json, model.safetensors and the tokenizer's files of the architecture's class into `directory`.

    `state` is our state dict; `dtype` is one of `DTYPES`; `step`, if known, goes into config.json, from which
    `model_step` reads it. Raises `InputError` for a model that has no such form.
    """
    hf_state = {name: tensor.to(getattr(torch, DTYPES[dtype])) for name, tensor in to_hf_state(state, config).items()}
    write_weights(directory / "model.safetensors", hf_state)
    hf_config = to_hf_config(config) | {"torch_dtype": DTYPES[dtype]}
    write_json_atomic(directory / HF_CONFIG, hf_config | ({} if step is None else {HF_STEP: step}))
    takes_types = architecture_of(config).TAKES_TOKEN_TYPES
    save_tokenizer(tokenizer, directory, config.max_position_embeddings, takes_types)


def from_hf(source: str | Path, output: str | Path, overwrite: bool = False) -> int:
    """Write a training checkpoint of step 0 from a Hugging Face directory; returns the number of parameters.

    Raises:
        InputError: `source` is no masked LM of one of our architectures with its tokenizer; `output` exists.
    """
    check_output(output, MODEL_CONFIG, overwrite)
    source = Path(source)
    if is_checkpoint(newest_of_run(source)):
        raise InputError(f"{source}: is a training checkpoint or a run already; give a Hugging Face directory")
    config, state, tokenizer_path = read_model(source)
    model = build_model(config)
    load_state(model, state, where=str(source))
    tokenizer = read_tokenizer(tokenizer_path)
    if vocab_size(tokenizer) > config.vocab_size:
        raise InputError(
            f"{source}: its tokenizer has {vocab_size(tokenizer)} entries but its model only {config.vocab_size}; they "
            "do not belong together"
        )
    with atomic_directory(output, overwrite) as directory:
        write_model_config(directory / MODEL_CONFIG, config)
        write_weights(directory / MODEL_WEIGHTS, {name: tensor.contiguous() for name, tensor in state.items()})
        write_tokenizer(tokenizer, directory / TOKENIZER_DIRECTORY)
        origin = {"converted_from": str(source.resolve()), "tokenizer": asdict(tokenizer_identity(tokenizer))}
        if (step := model_step(source)) is not None:
            origin[CONVERTED_STEP] = step
        write_json_atomic(directory / STATE, {"step": 0, "tokens": 0, "seconds": 0.0, **origin})
        write_manifest(directory, format=FORMAT, version=VERSION, step=0)
    return sum(parameter.numel() for parameter in model.parameters())


def check_output(output: str | Path, marker: str, overwrite: bool) -> None:
    """Raise `InputError` when `output` exists, unless `overwrite` and it is empty or looks converted (has `marker`)."""
    check_absent(output, overwrite)
    output = Path(output)
    if not output.exists():
        return
    part_of_run = (output / CONFIG).is_file()
    if not output.is_dir() or part_of_run or (any(output.iterdir()) and not (output / marker).is_file()):
        raise InputError(f"{output}: is not what this command writes, so it is not overwritten; choose another output")
