"""The benchmark tools at sizes where only their mechanics matter."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine_runs import write_inputs
from synthetic_data import write_packed

from megatron_sas.cli import InputError
from megatron_sas.device import choose_device
from megatron_sas.metrics.benchmark import Times, describe_device, median_ratio, time_interleaved

ROOT = Path(__file__).parents[2]


def run_tool(name: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")


def test_loader_benchmark(tmp_path):
    data, output = write_packed(tmp_path, sequences=40, seq_length=32), tmp_path / "out.json"
    done = run_tool(
        *("benchmark_loader", "--data", data, "--batch", "4", "--tokens", "2560", "--rounds", "2"),
        *("--output", str(output)),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert set(result["tokens_per_second"]) == {"ours", "ours, prefetch", "hf", "hf, torch", "hf, heads"}
    assert result["data"] == {"sequences": 40, "seq_length": 32, "batch": 4}
    assert result["ratios"]["ours, prefetch / hf, heads"]["cpu"] > 0 and "| ours / hf |" in done.stdout
    done = run_tool("benchmark_loader", "--data", data, "--batch", "41")
    assert (done.returncode, done.stderr) == (2, f"error: --batch 41: {data} has only 40 sequences\n")


def test_saving_benchmark(tmp_path):
    config, output = write_inputs(tmp_path), tmp_path / "out.json"
    arguments = ["--config", str(config), "--every", "2", "--rounds", "2", "--threads", "1"]
    arguments += ["--run.output_dir", str(tmp_path / "try"), "--output", str(output)]
    done = run_tool("benchmark_saving", *arguments)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert set(result["slower"]) == {"checkpoint", "snapshot", "waited for", "deepspeed"}
    assert all(len(row["rounds"]) == 2 for row in result["slower"].values())
    assert result["bytes"]["checkpoint"] > 3 * result["bytes"]["snapshot"] > 0  # weights and moments, fp32; bf16
    assert "| checkpoint |" in done.stdout and not (tmp_path / "try").exists()
    (tmp_path / "try").mkdir()
    done = run_tool("benchmark_saving", *arguments, "--overwrite")
    message = f"error: run.output_dir: {tmp_path / 'try'} exists; name a directory to be made and removed\n"
    assert (done.returncode, done.stderr) == (2, message)
    assert (tmp_path / "try").is_dir()


def test_training_benchmark(tmp_path):
    output = tmp_path / "out.json"
    arguments = ["--model", "tiny", "--vocab-size", "200", "--seq-length", "16", "--batch", "2", "--pairs", "2"]
    arguments += ["--device", "cpu", "--threads", "1", "--output", str(output)]
    done = run_tool("benchmark_training", *arguments)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert set(result["variants"]) == {"ours_max", "ours_mlm", "paper", "hf_sdpa"}
    assert all(len(row["times"]["wall"]) == len(row["times"]["cpu"]) == 2 for row in result["variants"].values())
    assert result["ratios"]["paper / ours_max"] > 0 and result["left_out"] == {}
    assert (result["device"]["type"], result["device"]["torch"]) == ("cpu", torch.__version__)
    assert result["device"]["threads"] == 1
    assert "| paper / ours_max |" in done.stdout
    again = run_tool("benchmark_training", *arguments)
    assert again.returncode == 2
    assert again.stderr == f"error: {output}: exists already; choose another output or pass --overwrite\n"


def test_deepspeed_and_other_batches(tmp_path):
    output = tmp_path / "out.json"
    arguments = ["--model", "tiny", "--vocab-size", "200", "--seq-length", "16", "--batch", "2", "--pairs", "1"]
    arguments += ["--variants", "ours_max", "ours_deepspeed", "ours_uniform", "paper", "--paper-batch", "1"]
    done = run_tool("benchmark_training", *arguments, "--device", "cpu", "--output", str(output))
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert {name: row["batch"] for name, row in result["variants"].items()} == {
        "ours_max": 2, "ours_deepspeed": 2, "ours_uniform": 2, "paper": 1,
    }  # fmt: skip
    assert set(result["ratios"]) == {"paper / ours_max", "ours_deepspeed / ours_max"}


def test_attention_benchmark(tmp_path):
    output = tmp_path / "out.json"
    arguments = ["--seq-lengths", "8", "20", "--head-dims", "16", "--batch", "2", "--rounds", "1", "--device", "cpu"]
    done = run_tool("benchmark_attention", *arguments, "--output", str(output))
    assert done.returncode == 0, done.stderr
    records = json.loads(output.read_text())["records"]
    assert {r["backend"] for r in records} == {"reference", "sdpa", "chunked", "torch sdpa"}
    assert {r["gradient"] for r in records} == {"none", "max", "uniform"}
    assert {r["seq_length"] for r in records} == {8, 20}
    assert all(0 < r["gradient_error"] < 1e-5 for r in records)
    assert all(r["forward_host_seconds"] is None for r in records)  # a CPU queues nothing


def test_the_papers_way_computes_the_same_objective(monkeypatch):
    """All variants with the regularizer have one loss, all without it another."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import benchmark_training as tool

    config = tool.BertConfig(**tool.SIZES["tiny"], vocab_size=150, attention_dropout=0.0, hidden_dropout=0.0)
    cpu = torch.device("cpu")
    setting = tool.Setting(config, cpu, "fp32", False, tool.Bert(config).state_dict())
    batch = tool.random_batch(2, argparse.Namespace(seq_length=24, vocab_size=150, seed=0), cpu)
    monkeypatch.setattr(tool, "SAS_WEIGHT", 0.5)
    monkeypatch.setattr(tool, "_training_step", lambda _module, loss, *_: loss)
    names = ("ours_max", "ours_uniform", "ours_mlm", "paper", "hf_sdpa")
    losses = {name: float(tool.build_variant(name, setting, batch)().detach()) for name in names}
    assert losses["ours_max"] == pytest.approx(losses["paper"], rel=1e-5)
    assert losses["ours_mlm"] == pytest.approx(losses["hf_sdpa"], rel=1e-5)
    assert losses["ours_uniform"] > losses["ours_max"] > losses["ours_mlm"] + 0.1


def test_variants_take_turns():
    calls = []
    variants = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    times = time_interleaved(variants, rounds=3, device=torch.device("cpu"), warmup=0)
    assert "".join(calls) == "abcbcacab"
    assert all(len(times[name].wall) == len(times[name].cpu) == 3 for name in "abc")


def test_calls_are_queued_between_time_stamps_of_the_gpu(monkeypatch):
    """With a stand-in for the GPU: what is called in which order, and what becomes of the numbers."""
    calls = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            calls.append(f"record {stream}")

        def elapsed_time(self, end):
            return 40.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("synchronize"))
    variants = {"a": lambda: calls.append("a")}
    times = time_interleaved(variants, rounds=1, device=torch.device("cuda"), warmup=0, queued=4)["a"]
    assert calls == ["synchronize", "record stream", *"aaaa", "record stream", "synchronize"]
    assert times.wall == [0.01]
    assert len(times.host) == len(times.cpu) == 1


def test_a_variant_without_memory_is_left_out():
    calls = []

    def too_large():
        calls.append("large")
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.\nand so on")

    variants = {"small": lambda: None, "large": too_large}
    left_out: dict[str, str] = {}
    times = time_interleaved(variants, rounds=4, device=torch.device("cpu"), warmup=0, left_out=left_out)
    assert (len(calls), set(times), len(times["small"].wall)) == (3, {"small"}, 4)
    assert left_out == {"large": "CUDA out of memory. Tried to allocate 3 GiB."}
    calls.clear()
    with pytest.raises(torch.OutOfMemoryError):
        time_interleaved(variants, rounds=4, device=torch.device("cpu"))


def test_the_largest_batch_that_fits(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import benchmark_training as tool

    for limit in (0, 1, 2, 3, 7, 15, 16, 31, 32, 47, 48, 63, 100, 1000):
        tried = []
        found = tool.largest_that_fits(lambda n, limit=limit, tried=tried: tried.append(n) or n <= limit)
        assert found <= limit < found + max(1, found // 16) or found == limit == 0
        assert len(tried) < 20


def test_the_papers_way_gets_what_the_others_leave(monkeypatch):
    """Its batch is chosen when all others have their states; one that does not fit does not end the others."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import benchmark_training as tool

    log = []

    def build(name, setting, batch):
        def step():
            log.append((name, len(batch.input_ids)))
            if name == "ours_uniform" or (name == "paper" and len(batch.input_ids) > 11):
                raise torch.OutOfMemoryError("no memory")

        return step

    monkeypatch.setattr(tool, "build_variant", build)
    monkeypatch.setattr(tool, "release_memory", lambda device: None)
    make_batch = tool.random_batch
    monkeypatch.setattr(
        tool, "random_batch", lambda size, arguments, _: make_batch(size, arguments, torch.device("cpu"))
    )
    arguments = argparse.Namespace(seq_length=8, vocab_size=50, seed=0, batch=4, paper_batch=None)
    setting = argparse.Namespace(device=torch.device("cuda"))
    built = tool.build_variants(["paper", "ours_max", "ours_uniform", "hf_sdpa"], setting, arguments)
    assert built.sizes == {"ours_max": 4, "hf_sdpa": 4, "paper": 11}
    assert built.left_out == {"ours_uniform": "no memory"}
    assert log[:3] == [("ours_max", 4), ("ours_uniform", 4), ("hf_sdpa", 4)]
    assert set(built.steps) == set(built.sizes)
    assert {len(batch.input_ids) for batch in built.batches.values()} == {4, 11}


def test_ratio_is_taken_round_by_round():
    assert median_ratio([2.0, 20.0, 4.0], [1.0, 10.0, 1.0]) == 2.0
    assert Times().wall == []


def test_device():
    assert choose_device("cpu") == torch.device("cpu")
    assert describe_device(torch.device("cpu"))["name"]
    if not torch.cuda.is_available():
        assert choose_device(None).type == "cpu"
        with pytest.raises(InputError, match="--device: 'cuda' is not available here"):
            choose_device("cuda")
