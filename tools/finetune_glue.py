#!/usr/bin/env python3
"""Fine-tune a model on GLUE tasks with several seeds: mean and standard error of each task's metric."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import _checkout
from megatron_sas.core.cli import InputError, progress, run_main
from megatron_sas.core.device import DEVICE_HELP, choose_device
from megatron_sas.core.files import write_json_atomic
from megatron_sas.data.unknown import Unknown
from megatron_sas.evaluation.command_line import add_model_argument, check_output
from megatron_sas.glue.data import Columns, read_file, read_hub, task_files
from megatron_sas.glue.tasks import FORMAT, NOT_AVERAGED, TASKS, Settings, Task

if TYPE_CHECKING:
    import torch

DESCRIPTION = """\
Data come from --data, a folder like the GLUE download (CoLA/train.tsv, CoLA/dev.tsv, ...), from --train-file and
--validation-file (TSV in GLUE's own layouts or with named columns, or JSON lines), or from the hub. The metric of a
task is Matthews' correlation (cola), the mean of F1 and accuracy (mrpc, qqp) or of Pearson's and Spearman's
correlation (stsb), else accuracy (mnli: matched). Metrics are those of the last epoch.

Finished seeds are kept, so the same command goes on where a killed one stopped; more seeds are added to a finished
result. With one task --output is a file, with several a folder of files TASK.json."""

DEFAULTS = Settings()


def main(finetune: Callable[..., dict] | None = None) -> None:
    """Fine-tune by `finetune`, by default that of `megatron_sas/glue/finetune.py`."""
    arguments = parse_arguments()
    tasks = chosen_tasks(arguments)
    settings = Settings(**{name: getattr(arguments, name) for name in vars(DEFAULTS)})
    if len(set(arguments.seeds)) < len(arguments.seeds):
        raise InputError("--seeds: a seed is given twice; results would count it twice")
    device = choose_device(arguments.device)
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # it would report the new layers, which are meant to be new
    inputs = {task.name: input_files(task, arguments) for task in tasks}  # names what is missing before any work
    folder = arguments.output if is_folder(arguments, tasks) else None
    outputs = {task.name: folder / f"{task.name}.json" if folder else arguments.output for task in tasks}
    for output in outputs.values():
        check_output(output, overwrite=True)  # seeds are added to what is there
    from megatron_sas.glue import finetune as glue

    finetune = finetune or glue.finetune
    results = [
        run_task(task, inputs[task.name], outputs[task.name], settings, arguments, device, finetune) for task in tasks
    ]
    print("\n".join(table(results)))


def run_task(
    task: Task,
    files: tuple[Path, list[Path]] | None,
    output: Path,
    settings: Settings,
    arguments: argparse.Namespace,
    device: torch.device,
    finetune: Callable[..., dict],
) -> dict:
    """Fine-tune with the seeds that are not done yet, write the result, and return it."""
    from megatron_sas.glue.finetune import Pretrained, encode, identity, record

    columns = Columns(arguments.text_columns, arguments.label_column)
    if files is None:
        train, *validation = (read_hub(task, split) for split in ("train", *task.hub_validation))
    else:
        train, *validation = (read_file(task, path, columns) for path in (files[0], *files[1]))
    pretrained = Pretrained(arguments.model, task)
    # Finished seeds wait beside the output, so that the output holds all of them or does not exist.
    partial = output.with_name(f".{output.name}.partial")
    wanted = identity(task, pretrained, train, validation, settings)
    with alone(output):
        if arguments.overwrite:
            partial.unlink(missing_ok=True)
        done = {} if arguments.overwrite else finished_seeds(output, wanted) | finished_seeds(partial, wanted)

    def result() -> dict:
        return record(task, pretrained, train, validation, settings, [done[seed] for seed in sorted(done)], device)

    missing = [seed for seed in arguments.seeds if seed not in done]
    if missing:
        max_length = wanted["settings"]["max_length"]
        encoded = [encode(examples, pretrained, max_length) for examples in (train, *validation)]
        unknown = sum((examples.unknown for examples in encoded), Unknown())
        print(unknown.line(f"the texts of {task.name}"))
        steps = settings.epochs * math.ceil(len(train) / settings.batch_size)
        with progress(total=steps * len(missing), unit="step", desc=task.name) as bar:
            for seed in missing:
                done[seed] = finetune(
                    pretrained, task, encoded[0], encoded[1:], settings, seed, device, after_step=bar.update
                )
                with alone(output):
                    done |= finished_seeds(partial, wanted)
                    write_json_atomic(partial, result())
    with alone(output):
        written = {} if arguments.overwrite else finished_seeds(output, wanted)
        done |= written | finished_seeds(partial, wanted)
        if done.keys() - written.keys():
            write_json_atomic(output, result())
            print(f"wrote {output}")
        else:
            print(f"{output}: has these seeds already")
        partial.unlink(missing_ok=True)
    return result()


@contextlib.contextmanager
def alone(output: Path) -> Iterator[None]:
    """Other jobs with the same output wait until the block has ended: each reads what is there and adds to it."""
    path = output.with_name(f".{output.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with open(path, "w", encoding="utf-8") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_nlink == 0:  # the job before has removed it
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def finished_seeds(path: Path, wanted: dict) -> dict[int, dict]:
    """Results by seed from an output or partial output; `InputError` when it is of another experiment."""
    if not path.exists():
        return {}
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["format"] != FORMAT:
            raise ValueError
        different = [name for name, value in wanted.items() if stored.get(name) != value]
        seeds = {seed["seed"]: seed for seed in stored["seeds"]}
    except (ValueError, KeyError, TypeError, OSError):
        raise InputError(f"{path}: is not a result of this tool; choose another output or pass --overwrite") from None
    if different:
        raise InputError(
            f"{path}: holds results with other {' and '.join(different)}; choose another output or pass --overwrite"
        )
    return seeds


def table(results: list[dict]) -> list[str]:
    """Lines to print: a row per task, and the average over tasks where there are several."""
    lines = [f"{'task':<6} {'metric':<22} {'mean':>7} {'s.e.':>7} {'seeds':>6} {'train':>8}  other metrics"]
    for result in results:
        error = "–" if result["standard_error"] is None else f"{result['standard_error']:.4f}"
        others = {name for name in result["seeds"][0]["metrics"] if name != result["metric"]}
        means = {n: sum(s["metrics"][n] for s in result["seeds"]) / len(result["seeds"]) for n in sorted(others)}
        lines.append(
            f"{result['task']:<6} {result['metric']:<22} {result['mean']:>7.4f} {error:>7} {len(result['seeds']):>6} "
            f"{result['train_examples']:>8}  " + ", ".join(f"{name} {value:.4f}" for name, value in means.items())
        )
    counted = [result["mean"] for result in results if result["task"] not in NOT_AVERAGED]
    if len(counted) > 1:
        without = " and ".join(sorted(NOT_AVERAGED))
        lines.append(f"average of {len(counted)} tasks, without {without}: {sum(counted) / len(counted):.4f}")
    return lines


def chosen_tasks(arguments: argparse.Namespace) -> list[Task]:
    """The tasks, after checking that the other arguments make sense for that many."""
    names = list(TASKS) if "all" in arguments.task else list(dict.fromkeys(arguments.task))
    files = (arguments.train_file, arguments.validation_file)
    if any(files) != all(files):
        raise InputError("--train-file, --validation-file: give both or neither")
    if any(files) and (arguments.data is not None or len(names) > 1):
        raise InputError("--train-file: stands for the data of one task; leave it out with --data or several tasks")
    if (arguments.text_columns or arguments.label_column) and not any(files):
        raise InputError(
            "--text-columns, --label-column: name columns of --train-file and --validation-file; give these"
        )
    tasks = [TASKS[name] for name in names]
    if arguments.text_columns and len(arguments.text_columns) != len(tasks[0].text):
        raise InputError(
            f"--text-columns: {tasks[0].name} takes {len(tasks[0].text)}, not {len(arguments.text_columns)}"
        )
    if arguments.validation_file and len(arguments.validation_file) > len(tasks[0].validation):
        raise InputError(f"--validation-file: {tasks[0].name} takes at most {len(tasks[0].validation)}")
    if is_folder(arguments, tasks) and arguments.output.is_file():
        raise InputError(f"--output: {arguments.output} is a file, results of several tasks need a folder")
    return tasks


def is_folder(arguments: argparse.Namespace, tasks: list[Task]) -> bool:
    """Whether --output names a folder."""
    return len(tasks) > 1 or arguments.output.suffix != ".json"


def input_files(task: Task, arguments: argparse.Namespace) -> tuple[Path, list[Path]] | None:
    """Training and validation files of a task, None for the hub."""
    if arguments.train_file is not None:
        return arguments.train_file, arguments.validation_file
    return None if arguments.data is None else task_files(task, arguments.data)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_model_argument(parser)
    parser.add_argument("--task", required=True, nargs="+", choices=(*TASKS, "all"), help="one, several, or all")
    parser.add_argument("--output", required=True, type=Path, metavar="PATH", help="FILE.json, or a folder")
    parser.add_argument("--data", type=Path, metavar="DIR", help="a folder like the GLUE download")
    parser.add_argument("--train-file", type=Path, metavar="FILE", help=".tsv or .jsonl, for one task")
    parser.add_argument(
        "--validation-file", type=Path, nargs="+", metavar="FILE", help="the same (for mnli: matched mismatched)"
    )
    parser.add_argument("--text-columns", nargs="+", metavar="NAME", help="columns with the sentence or sentences")
    parser.add_argument("--label-column", metavar="NAME", help="column with the label")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="N", help="(1 2 3)")
    for name, kind, text in (
        ("learning_rate", float, "highest learning rate"),
        ("batch_size", int, "examples an update"),
        ("epochs", int, "passes over the training data"),
        ("max_length", int, "tokens of an example, at most what the model takes"),
        ("warmup_share", float, "share of the updates in which the learning rate rises"),
        ("weight_decay", float, "of matrices"),
        ("grad_clip", float, "largest norm of a gradient"),
    ):
        default = getattr(DEFAULTS, name)
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=kind, default=default, metavar="X", help=f"{text} ({default:g})")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default=DEFAULTS.precision, help="(fp32)")
    parser.add_argument("--device", help=DEVICE_HELP)
    parser.add_argument("--overwrite", action="store_true", help="replace finished results instead of adding to them")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
