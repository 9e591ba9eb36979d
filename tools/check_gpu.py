#!/usr/bin/env python3
"""Check and measure a machine with an NVIDIA GPU, in stages, within a budget of minutes.

    python tools/check_gpu.py --minutes 8         # `make gpu`; once more: goes on with what is missing
    python tools/check_gpu.py --minutes 0         # only the tables of what is there
    python tools/check_gpu.py --write-preference  # `auto` takes the backends by what was measured

Stages run in this order, each in processes of its own, and each writes its result before the next begins:

    gradients-BACKEND    gradients of the regularizer alone and with the output's, against float64
    attention-DROPOUT    TFLOP/s at (64, 12, 512, 64) in bf16, without and with edges, and torch's kernels
    training-BATCH       tokens/s, MFU and memory of BERT-base with λ = 0 and λ ≠ 0, the paper's way, and HF's sdpa
    evaluation           BLiMP and UAS with BERT-base
    tests-PART         the tests that need a GPU
    speedup-NAME         a training step with one change that was predicted to help

A stage that needs more than is left of the budget is named and left for the next call, and so is one that the end of
the budget cuts off. One that fails, or takes three times as long as it should, is recorded with its error, and the
others go on; later calls try it again, after what was never tried. A result counts as long as the stage's commands stay
the same, whatever the commit; --again measures anew.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _checkout
from megatron_sas.core.cli import InputError, run_main
from megatron_sas.core.files import write_json_atomic

ROOT = Path(__file__).resolve().parents[1]
PREFERENCE = ROOT / "megatron_sas" / "kernels" / "preference.json"
BACKENDS = ("triton", "sdpa", "cudnn", "flex", "fa4", "chunked")
AUTO = ("triton", "cudnn", "sdpa", "chunked")
"""What `auto` chooses from. FlexAttention is compiled for every shape, and FlashAttention-4 hands out no logsumexp for
`attention_entropy`: these are taken only where they are named."""
ON_CPU = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
CUT_OFF = "cut off"  # a stage's status: its time was over
PATIENCE = 3.0  # times what a stage should take, after which it hangs
MODEL = (
    "import json, sys, torch, transformers as t; torch.manual_seed(0); shape = json.loads(sys.argv[2]); "
    "tokenizer = t.BertTokenizer(sys.argv[1]); tokenizer.save_pretrained(sys.argv[3]); "
    "t.BertForMaskedLM(t.BertConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(sys.argv[3])"
)
"""A BERT with random weights: how fast it is evaluated does not depend on them."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """Commands for this interpreter; "{out}" is a folder that is gone afterwards, whose NAME.json are the result."""

    name: str
    seconds: float  # that it should take where no kernel is compiled yet: an estimate
    commands: tuple[tuple[str, ...], ...]


def stages(small: bool, model: str | None = None, blimp: str | None = None, treebank: str | None = None) -> list[Stage]:
    """All stages in their order; `small`: the same at sizes for a CPU and Triton's interpreter."""
    device = ("--device", "cpu") if small else ()
    found = [*_attention_stages(small, device), *_training_stages(small, device)]
    found.append(_evaluation_stage(small, device, model, blimp, treebank))
    at = next(i for i, stage in enumerate(found) if stage.name.startswith("speedup"))
    return [*found[:at], found[-1], *_test_stages(small), *found[at:-1]]


def _attention_stages(small: bool, device: tuple[str, ...]) -> Iterator[Stage]:
    tool = ("tools/benchmark_attention.py", "--output", "{out}/attention.json", *device)
    if small:
        tool += ("--num-heads", "2", "--head-dims", "16", "--rounds", "1", "--batch", "1")
        checked, measured = ("--tolerance", "1e-4", "--seq-lengths", "1", "17"), ("--seq-lengths", "16", "--maps", "2")
    else:
        tool += ("--num-heads", "12", "--head-dims", "64", "--precision", "bf16")
        checked = ("--tolerance", "0.02", "--batch", "2", "--rounds", "1")
        checked += ("--seq-lengths", "1", "17", "128", "129", "512")
        measured = ("--batch", "64", "--seq-lengths", "512", "--maps", "144")
    for name in BACKENDS:
        seconds = {"triton": 40.0, "flex": 60.0}.get(name, 15.0)
        yield Stage(
            f"gradients-{name}", seconds, ((*tool, "--backends", name, "--gradients", "alone", "uniform", *checked),)
        )
    for dropout in ("0.0", "0.1"):
        asked = ("--dropout", dropout, "--gradients", "none", "max", "--backends", *BACKENDS[:-1])
        yield Stage(f"attention-{dropout}", 60.0, ((*tool, *asked, *measured),))


def _training_stages(small: bool, device: tuple[str, ...]) -> Iterator[Stage]:
    tool = ("tools/benchmark_training.py", "--output", "{out}/training.json", *device)
    if small:
        tool += ("--model", "tiny", "--vocab-size", "100", "--seq-length", "16", "--pairs", "1")
    else:
        tool += ("--model", "base", "--seq-length", "512", "--precision", "bf16", "--dropout", "0.1", "--pairs", "7")
    for batch in ("1", "2") if small else ("32", "64", "128"):
        asked = ("--batch", batch, "--paper-batch", batch, "--variants", "ours_max", "ours_mlm", "paper", "hf_sdpa")
        yield Stage(f"training-{batch}", 75.0, ((*tool, *asked),))
    batch = "2" if small else "64"
    for name in SPEEDUPS[small:]:
        yield Stage(f"speedup-{name}", 60.0, ((*tool, "--batch", batch, "--variants", "ours_max", f"ours_{name}"),))


SPEEDUPS = ("cudnn", "packed", "uncompiled", "autotuned", "graphs", "deepspeed")
"""Variants of tools/benchmark_training.py. The first needs a GPU; the last is what the trainer costs."""


def _evaluation_stage(
    small: bool, device: tuple[str, ...], model: str | None, blimp: str | None, treebank: str | None
) -> Stage:
    count, shape = (
        ("2", '{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}') if small else ("1000", "{}")
    )
    corpus = ("--output", "{out}/toy", "--train-sentences", "1", "--treebank-sentences", count, "--pairs", count)
    commands = [("tools/make_toy_corpus.py", *corpus)]
    if model is None:
        commands.append(("-c", MODEL, "{out}/toy/vocab.txt", shape, "{out}/model"))
    shared = ("--model", model or "{out}/model", *(device or ("--precision", "bf16")))
    data = ("--blimp", blimp or "{out}/toy/blimp", "--output", "{out}/blimp.json")
    commands.append(("tools/eval_blimp.py", *shared, *data))
    data = ("--treebank", treebank or "{out}/toy/treebank.conllu", "--output", "{out}/uas.json")
    commands.append(("tools/eval_syntax.py", *shared, *data))
    return Stage("evaluation", 60.0, tuple(commands))


def _test_stages(small: bool) -> Iterator[Stage]:
    tool = ("-m", "pytest", "-q", "-m", "not full", "--continue-on-collection-errors", *(() if small else ("-n", "8")))
    folders = {
        "gpu": ("tests/kernels/test_gpu.py", "tests/run/test_nvml.py"),
        "training": ("tests/train/test_gpu_training.py",),
        "kernels": ("tests/kernels", "--ignore", "tests/kernels/test_gpu.py"),
        "objective": ("tests/objective",),
    }
    for name, arguments in folders.items() if not small else [("gpu", folders["gpu"])]:
        yield Stage(f"tests-{name}", 150.0 if name == "gpu" else 120.0, ((*tool, *arguments),))


def run(stage: Stage, limit: float, environment: dict[str, str]) -> dict[str, Any]:
    """Run a stage's commands for at most `limit` seconds: its status, seconds, result and error, if there is one."""
    begin, code, output, seconds = time.monotonic(), 0, "", []
    with tempfile.TemporaryDirectory(prefix="check_gpu-") as out:
        log = Path(out) / "log"
        for command in stage.commands:
            before = time.monotonic()
            with log.open("wb") as file:
                arguments = [argument.replace("{out}", out) for argument in command]
                try:
                    code = _run(arguments, file, limit - (before - begin), environment)
                except subprocess.TimeoutExpired:
                    code = None
            seconds.append(round(time.monotonic() - before, 1))
            output = log.read_text(encoding="utf-8", errors="replace")
            if code != 0:
                break
        result = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(out).glob("*.json"))}
    if "pytest" in stage.commands[-1]:
        result["tests"] = read_tests(output)
    record = {"status": "done", "seconds": round(sum(seconds), 1), "command_seconds": seconds, "result": result}
    if code != 0:
        lines = [line for line in output.splitlines() if line.strip()]
        reason = f"stopped after {record['seconds']:.0f} s" if code is None else f"exit code {code}"
        record |= {"status": "failed", "error": reason, "output": lines[-30:]}
    return record


def _run(arguments: list[str], log: Any, limit: float, environment: dict[str, str]) -> int:
    """The exit code of a command in a session of its own, all of whose processes end with it."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True,
    )  # fmt: skip
    try:
        return process.wait(max(limit, 0.0))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def read_tests(output: str) -> dict[str, Any]:
    """How many tests passed, failed and so on, and which failed, from what pytest printed."""
    lines = output.splitlines() or [""]
    counts = {name: int(number) for number, name in re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1])}
    return {**counts, "failures": [line for line in lines if line.startswith(("FAILED", "ERROR"))]}


def read_records(folder: Path, wanted: list[Stage]) -> dict[str, dict[str, Any]]:
    """The records of these stages with these commands, by name, in the stages' order."""
    records = {}
    for stage in wanted:
        path = folder / f"{stage.name}.json"
        record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if record.get("commands") == [list(command) for command in stage.commands]:
            records[stage.name] = record
    return records


def check(folder: Path, wanted: list[Stage], minutes: float, about: dict[str, Any], small: bool) -> list[str]:
    """Run what is missing, each result written before the next begins; the names of what the budget left out."""
    deadline, left = time.monotonic() + 60.0 * minutes, []
    environment = {"OMP_NUM_THREADS": "2", **os.environ, **(ON_CPU if small else {})}
    records = read_records(folder, wanted)
    due = [stage for stage in wanted if records.get(stage.name, {}).get("status") != "done"]
    for stage in sorted(due, key=lambda stage: stage.name in records):  # those that were never tried come first
        remaining = deadline - time.monotonic()
        if stage.seconds > remaining:
            left.append(stage.name)
            continue
        limit = PATIENCE * stage.seconds
        record = run(stage, min(limit, remaining), environment)
        if record["status"] == "failed" and time.monotonic() >= deadline:
            record["status"] = CUT_OFF
            left.append(stage.name)
        head = {"stage": stage.name, "commands": stage.commands, **about}
        write_json_atomic(folder / f"{stage.name}.json", head | record)
        print(f"{stage.name}: {record['status']} in {record['seconds']:.0f} s", flush=True)
        for line in record.get("output", []):
            print(f"    {line}", flush=True)
    return left


def machine() -> dict[str, Any]:
    """The GPUs by name, the packages, and the commit: what all records of a call share. It starts nothing on a GPU."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        lines = []
    about: dict[str, Any] = {
        "gpu": ", ".join(sorted({line.split(",")[0].strip() for line in lines})) or None,
        "driver": lines[0].split(",")[1].strip() if lines else None,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "git": None,
    }
    with contextlib.suppress(ImportError):  # the kernels can be checked with torch alone
        from megatron_sas.run.starts import git_state, package_versions

        about |= {"git": git_state(ROOT), "packages": package_versions()}
    return about


def headline(name: str, result: dict[str, Any]) -> str:
    """The most important figures of a stage."""
    kind = name.split("-")[0]
    if kind == "gradients":
        rows = result["attention"]["records"]
        reason = "; ".join({**result["attention"]["left_out"], **result["attention"]["failed"]}.values())
        worst = f"largest error {max(r['gradient_error'] for r in rows):.1e}" if rows else ""
        return "; ".join(filter(None, (worst, reason)))
    if kind == "attention":
        return "; ".join(
            f"{r['backend']} {r['forward_tflops']:.3g}/{r['backward_tflops']:.3g}"
            for r in result["attention"]["records"] if r["gradient"] == "max" or r["backend"].startswith("torch")
        ) + " TFLOP/s"  # fmt: skip
    if kind in ("training", "speedup"):
        rows = result["training"]["variants"]
        figures = []
        for variant, row in rows.items():
            mfu = f" ({row['mfu']:.1%})" if row["mfu"] else ""
            figures.append(f"{variant} {row['tokens_per_second']:,.0f}{mfu}")
        return "; ".join(figures) + " tokens/s" + "".join(f"; no {n}" for n in result["training"]["left_out"])
    if kind == "evaluation":
        blimp, uas = result["blimp"], result["uas"]
        return (
            f"BLiMP {blimp['num_sentences']} sentences in {blimp['seconds']:.1f} s; "
            f"UAS {uas['num_sentences']} sentences"
        )
    tests = result["tests"]
    return ", ".join(f"{number} {name}" for name, number in tests.items() if name != "failures")


def marks(records: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """(figure, measured, published or aimed at)."""
    results = {name: record["result"] for name, record in records.items() if record["status"] == "done"}
    plain = results.get("attention-0.0", {}).get("attention", {"records": []})["records"]
    trained = [results[name]["training"] for name in results if name.startswith("training-")]

    def best(rows: list[float], form: str, low: bool = False) -> str:
        return form.format((min if low else max)(rows)) if rows else "-"

    for part, published in (
        ("forward", "340 (Triton), 335 (cuDNN), 333 (FA3), 282 (FA2)"),
        ("backward", "272 (FA3), 266 (cuDNN), 198 (FA2)"),
    ):
        for who in ("triton", "any"):
            rows = [r[f"{part}_tflops"] for r in plain if r["gradient"] == "none" and who in ("any", r["backend"])]
            yield f"attention {part}, {who}, TFLOP/s", best(rows, "{:.0f}"), published
    rate = [t["variants"]["ours_max"]["tokens_per_second"] for t in trained if "ours_max" in t["variants"]]
    published = "target 670k; ModernBERT 438k; 80M parameters (BioNeMo) 419k padded, 1.03M packed"
    yield "BERT-base with the regularizer, tokens/s", best(rate, "{:,.0f}"), published
    for ratio, form, low, aim in (
        ("ours_max / ours_mlm", "{:.3f}", True, "target 1.015"),
        ("paper / ours_max", "{:.1f}", False, "target 8"),
        ("hf_sdpa / ours_mlm", "{:.2f}", False, "-"),
    ):
        yield f"seconds of {ratio}", best([t["ratios"][ratio] for t in trained if ratio in t["ratios"]], form, low), aim


def tables(wanted: list[Stage], records: dict[str, dict[str, Any]]) -> str:
    """Every stage with its status and figures, and the figures beside published ones (H100, D = 64, S = 512, bf16)."""
    lines = ["| stage | status | s | commit | figures |", "|---|---|---:|---|---|"]
    for stage in wanted:
        record = records.get(stage.name)
        if record is None:
            lines.append(f"| {stage.name} | missing | {stage.seconds:.0f}? | | |")
            continue
        try:
            figures = headline(stage.name, record["result"])
        except (KeyError, ValueError):  # it did not come so far
            figures = ""
        figures = "; ".join(filter(None, (record.get("error"), figures)))
        commit = (record["git"] or {}).get("commit", "?")[:8]
        lines.append(f"| {stage.name} | {record['status']} | {record['seconds']:.0f} | {commit} | {figures} |")
    lines += ["", "| figure | measured | published or aimed at, H100 |", "|---|---:|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in marks(records))])


def preference(folders: list[Path]) -> dict[str, dict[str, list[str]]]:
    """By architecture, with and without dropout, the backends of `auto` by their time with edges, the fastest first.

    Only what was measured and whose gradients passed counts; `chunked`, which takes everything, is the last.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for folder in folders:
        records = read_records(folder, stages(False))
        done = {name: record["result"]["attention"] for name, record in records.items()
                if record["status"] == "done" and "attention" in record["result"]}  # fmt: skip
        right = {name for name in AUTO if done.get(f"gradients-{name}", {}).get("records")}
        for dropout, name in (("no_dropout", "attention-0.0"), ("dropout", "attention-0.1")):
            tried = [records.get(f"gradients-{backend}", {}).get("status", CUT_OFF) for backend in AUTO]
            if name not in done or CUT_OFF in tried:  # nobody knows yet
                continue
            rows = [r for r in done[name]["records"] if r["gradient"] == "max" and r["backend"] in right - {"chunked"}]
            rows.sort(key=lambda r: r["forward_seconds"] + r["backward_seconds"])
            order = [*(r["backend"] for r in rows), "chunked"]
            found.setdefault(done[name]["device"]["architecture"], {})[dropout] = order
    return found


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="budget of this call (8)")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "gpu", metavar="DIR",
        help="where a folder of every kind of GPU has a file of every stage (benchmarks/gpu)",
    )  # fmt: skip
    parser.add_argument("--stages", nargs="+", metavar="NAME", help="only these, or those that begin so (all)")
    parser.add_argument("--again", action="store_true", help="forget the results that are there of these stages")
    parser.add_argument("--small", action="store_true", help="tiny sizes on the CPU: does everything work?")
    parser.add_argument("--model", metavar="DIR", help="for `evaluation` (BERT-base with random weights)")
    parser.add_argument("--blimp", metavar="DIR", help="for `evaluation` (minimal pairs of the embedded language)")
    parser.add_argument("--treebank", metavar="FILE", help="for `evaluation` (1000 sentences of that language)")
    text = f"write {PREFERENCE.relative_to(ROOT)} from the results in --output, and run nothing"
    parser.add_argument("--write-preference", action="store_true", help=text)
    return parser.parse_args()


def main() -> int:
    """Run what is missing and print the tables; 1 if a stage failed."""
    arguments = read_arguments()
    if arguments.write_preference:
        found = preference(sorted(path for path in arguments.output.glob("*") if path.is_dir()))
        if not found:
            raise InputError(f"{arguments.output}: lacks results of the stages gradients and attention; run `make gpu`")
        known = json.loads(PREFERENCE.read_text(encoding="utf-8"))
        write_json_atomic(PREFERENCE, known | {name: known.get(name, {}) | orders for name, orders in found.items()})
        print(f"{PREFERENCE}: {json.dumps(found)}")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is running ends as well
    wanted = stages(arguments.small, arguments.model, arguments.blimp, arguments.treebank)
    if arguments.stages:
        wanted = [stage for stage in wanted if stage.name.startswith(tuple(arguments.stages))]
    if not wanted:
        names = ", ".join(stage.name for stage in stages(False))
        raise InputError(f"--stages: nothing is called {' or '.join(arguments.stages)}; there are {names}")
    about = machine()
    if about["gpu"] is None and not arguments.small:
        raise InputError("nvidia-smi finds no GPU here; --small runs every stage on the CPU, at tiny sizes")
    name = "cpu" if arguments.small else re.sub(r"[^a-z0-9]+", "-", about["gpu"].lower())
    folder = arguments.output / name
    if arguments.again:
        for stage in wanted:
            (folder / f"{stage.name}.json").unlink(missing_ok=True)
    left = check(folder, wanted, arguments.minutes, about, arguments.small)
    records = read_records(folder, wanted)
    print(f"\n{folder}\n\n{tables(wanted, records)}")
    if left:
        print(f"\nnot within {arguments.minutes:g} minutes: {', '.join(left)}; call this again for them")
    return int(any(record["status"] == "failed" for record in records.values()))


if __name__ == "__main__":
    run_main(main)
