"""What all evaluation tools share: their arguments, the bar over forward passes, and the file that they write."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sas.core.cli import InputError, progress
from megatron_sas.core.device import DEVICE_HELP, choose_device
from megatron_sas.core.files import check_absent, write_json_atomic
from megatron_sas.run.directory import newest_of_run

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


def evaluation_parser(description: str, batch_tokens: int) -> argparse.ArgumentParser:
    """A parser with --model, --output, --batch-tokens (and its default), --device, --precision and --overwrite."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_model_argument(parser)
    parser.add_argument("--output", required=True, type=Path, metavar="FILE.json", help="where to write the result")
    text = f"tokens a batch, with padding ({batch_tokens})"
    parser.add_argument("--batch-tokens", type=int, default=batch_tokens, metavar="N", help=text)
    parser.add_argument("--device", help=DEVICE_HELP)
    text = "bf16: matrix products in bfloat16, faster on GPUs and good to two or three digits (fp32)"
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    return parser


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """Add --model, one model in any form."""
    text = (
        "a Hugging Face directory of any masked language model that transformers has, a training checkpoint, or a run "
        "(its newest checkpoint)"
    )
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help=text)


def check_arguments(arguments: argparse.Namespace) -> torch.device:
    """Refuse an output that cannot be written and an empty batch before any work, and return the device.

    A run as --model or --untrained becomes its newest checkpoint, once: the result is of that, whatever comes after it.

    Raises:
        InputError: one of these, or the device is not there.
    """
    check_output(arguments.output, arguments.overwrite)
    if arguments.batch_tokens < 1:
        raise InputError(f"--batch-tokens: {arguments.batch_tokens} is below 1")
    for name in ("model", "untrained"):
        if getattr(arguments, name, None) is not None:
            setattr(arguments, name, newest_of_run(getattr(arguments, name)))
    return choose_device(arguments.device)


def check_output(path: Path, overwrite: bool) -> None:
    """Refuse a file that exists (unless `overwrite`), or that could not be written once all the work is done.

    Raises:
        InputError: it exists or is a directory, or nothing can be written where it is to be. Nothing is left there.
    """
    if path.is_dir():
        raise InputError(f"{path}: is a directory; --output names the file to write")
    check_absent(path, overwrite)
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"{path}: cannot be written in {folder} ({error.strerror}); choose another --output") from None


@contextlib.contextmanager
def evaluation_pass(arguments: argparse.Namespace, model: torch.nn.Module, forwards: int, name: str) -> Iterator[None]:
    """Evaluate in the block: in the precision asked for, with a progress bar over `forwards` forward passes."""
    import torch

    from megatron_sas.core.processes import keep_freed_memory
    from megatron_sas.evaluation.batching import after_each_forward

    keep_freed_memory()
    device, is_bf16 = next(model.parameters()).device, arguments.precision == "bf16"
    with (
        torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_bf16),
        progress(total=forwards, unit="batch", desc=name) as bar,
        after_each_forward(model, bar.update),
    ):
        yield


def write_result(
    arguments: argparse.Namespace, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, values: dict[str, Any]
) -> None:
    """Write --output: which model was measured, and the values."""
    from megatron_sas.evaluation.provenance import provenance

    source = provenance(arguments.model, model, tokenizer)
    write_json_atomic(arguments.output, {**source, "precision": arguments.precision, **values})
    print(f"wrote {arguments.output}")
