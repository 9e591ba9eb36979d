"""The benchmark tools at sizes where only their mechanics matter."""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine_runs import write_inputs
from synthetic_data import write_packed
from tool_calls import exit_code

from megatron_sas.core.benchmark import Times, describe_device, median_ratio, time_interleaved
from megatron_sas.core.cli import InputError
from megatron_sas.core.device import choose_device
from megatron_sas.kernels import reference
from megatron_sas.kernels.backends import BACKENDS, Backend
from megatron_sas.model.bert import Bert
from megatron_sas.model.config import SIZES, BertConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_tool(fork_server, tmp_path):
    """What a tool prints in a process of its own."""
    return functools.partial(fork_server.call, "tool_calls:main", log=tmp_path / "log")


def test_loader_benchmark(run_tool, tmp_path):
    data, output = write_packed(tmp_path, sequences=40, seq_length=32), tmp_path / "out.json"
    printed = run_tool(
        *("benchmark_loader", "--data", data, "--batch", "4", "--tokens", "2560", "--rounds", "2"),
        *("--output", str(output)),
    )
    result = json.loads(output.read_text())
    assert set(result["tokens_per_second"]) == {"ours", "ours, prefetch", "hf", "hf, torch", "hf, heads"}
    assert result["data"] == {"sequences": 40, "seq_length": 32, "batch": 4}
    assert result["ratios"]["ours, prefetch / hf, heads"]["cpu"] > 0 and "| ours / hf |" in printed
    printed = run_tool("benchmark_loader", "--data", data, "--batch", "41", expect=2)
    assert printed == f"error: --batch 41: {data} has only 40 sequences\n"


def test_linear_benchmark(run_tool, tmp_path):
    output = tmp_path / "out.json"
    arguments = [
        "--model",
        "tiny",
        "--batch",
        "1",
        "--seq-length",
        "20",
        "--rounds",
        "2",
        "--threads",
        "1",
        "--output",
        str(output),
    ]
    # Started from another folder, as a user would; the other tools are forked.
    command = [sys.executable, ROOT / "tools" / "benchmark_linear.py", *arguments]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/").stdout
    rows = json.loads(output.read_text())["matrices"]
    assert [row["rows"] for row in rows] == [20, 20, 20, 20, 3, 3]
    assert all(row[d][who] > 0 for row in rows for d in ("forward", "backward") for who in ("ours", "torch", "ratio"))
    assert "| LM head, decoder | 3 × 128 × 30528 |" in printed
    run_tool("benchmark_linear", *arguments, expect=2)  # the output exists


def test_saving_benchmark(run_tool, tmp_path):
    config, output = write_inputs(tmp_path), tmp_path / "out.json"
    arguments = ["--config", str(config), "--every", "2", "--rounds", "2", "--threads", "1"]
    arguments += ["--run.output_dir", str(tmp_path / "try"), "--output", str(output)]
    printed = run_tool("benchmark_saving", *arguments)
    result = json.loads(output.read_text())
    assert set(result["slower"]) == {"checkpoint", "snapshot", "waited for", "deepspeed"}
    assert all(len(row["rounds"]) == 2 for row in result["slower"].values())
    assert result["bytes"]["checkpoint"] > 3 * result["bytes"]["snapshot"] > 0  # weights and moments, fp32; bf16
    assert "| checkpoint |" in printed and not (tmp_path / "try").exists()
    (tmp_path / "try").mkdir()
    printed = run_tool("benchmark_saving", *arguments, "--overwrite", expect=2)
    assert printed == f"error: run.output_dir: {tmp_path / 'try'} exists; name a directory to be made and removed\n"
    assert (tmp_path / "try").is_dir()


def test_training_benchmark(run_tool, tmp_path):
    output = tmp_path / "out.json"
    arguments = ["--model", "tiny", "--vocab-size", "200", "--seq-length", "16", "--batch", "2", "--pairs", "2"]
    arguments += ["--device", "cpu", "--threads", "1", "--output", str(output)]
    printed = run_tool("benchmark_training", *arguments)
    result = json.loads(output.read_text())
    assert set(result["variants"]) == {"ours_max", "ours_mlm", "paper", "hf_sdpa"}
    assert all(len(row["times"]["wall"]) == len(row["times"]["cpu"]) == 2 for row in result["variants"].values())
    assert result["ratios"]["paper / ours_max"] > 0 and result["left_out"] == {}
    assert (result["device"]["type"], result["device"]["torch"]) == ("cpu", torch.__version__)
    assert result["device"]["threads"] == 1
    assert "| paper / ours_max |" in printed
    again = run_tool("benchmark_training", *arguments, expect=2)
    assert again == f"error: {output}: exists already; choose another output or pass --overwrite\n"


def test_architectures_benchmark(run_tool, tmp_path):
    output = tmp_path / "out.json"
    sizes = ("--size", "tiny", "--seq-length", "16", "--batch", "2", "--rounds", "2")
    run_tool("benchmark_architectures", *sizes, "--output", str(output))
    variants = json.loads(output.read_text())["variants"]
    assert set(variants) == {"bert", "modernbert", "global"} and variants["bert"]["cpu_ratio"] == 1.0
    assert (
        variants["modernbert"]["megaflops_per_token"] == variants["global"]["megaflops_per_token"]
    )  # a window sees 16


def test_deepspeed_and_other_batches(run_tool, tmp_path):
    output = tmp_path / "out.json"
    arguments = ["--model", "tiny", "--vocab-size", "200", "--seq-length", "16", "--batch", "2", "--pairs", "1"]
    arguments += ["--variants", "ours_max", "ours_deepspeed", "ours_uniform", "paper", "--paper-batch", "1"]
    run_tool("benchmark_training", *arguments, "--device", "cpu", "--output", str(output))
    result = json.loads(output.read_text())
    assert {name: row["batch"] for name, row in result["variants"].items()} == {
        "ours_max": 2, "ours_deepspeed": 2, "ours_uniform": 2, "paper": 1,
    }  # fmt: skip
    assert set(result["ratios"]) == {"paper / ours_max", "ours_deepspeed / ours_max"}


def test_attention_benchmark(run_tool, tmp_path):
    output = tmp_path / "out.json"
    arguments = ["--seq-lengths", "8", "20", "--head-dims", "16", "--tokens", "40", "--rounds", "1", "--device", "cpu"]
    printed = run_tool("benchmark_attention", *arguments, "--output", str(output))
    result = json.loads(output.read_text())
    records = result["records"]
    assert {r["backend"] for r in records} == {"reference", "sdpa", "chunked", "torch sdpa"}
    assert {r["gradient"] for r in records} == {"none", "max", "uniform"}
    assert {(r["batch"], r["seq_length"]) for r in records} == {(5, 8), (2, 20)}
    assert all(0 < r["gradient_error"] < 1e-5 for r in records)
    assert all(r["forward_host_seconds"] is None for r in records)  # a CPU queues nothing
    assert {"cudnn", "flex"} <= set(result["left_out"])
    assert f"cudnn is left out: {result['left_out']['cudnn']}\n" in printed


def test_attention_is_measured_on_the_models_layout(monkeypatch):
    """Views of one projection, gradients token by token; and what is compiled can repeat its backward."""
    import benchmark_attention as tool
    from torch._functorch import config as functorch_config

    arguments = argparse.Namespace(
        num_heads=2, precision="fp32", seed=0, dropout=0.0, maps=4, backends=None, gradients=tool.GRADIENTS[:-1]
    )
    attend = torch.compile(lambda q, k, v: (q @ k.mT).softmax(-1).sin() @ v, backend="aot_eager")

    def run(q, k, v, *rest):
        return (attend(q, k, v), *reference.run(q, k, v, *rest)[1:])

    monkeypatch.setitem(BACKENDS, "compiled", Backend(run))
    left_out: dict[str, str] = {}
    with functorch_config.patch(donated_buffer=True):
        rows = tool.build_variants(arguments, 3, 10, 8, torch.device("cpu"), left_out, {})
    assert not any(name.startswith("compiled") for name in left_out)
    assert [gradient for name, gradient, *_ in rows if name == "compiled"] == ["none", "max", "uniform"]
    for _, _, variant, _ in rows:
        for x in variant.qkv:
            assert x.shape == (3, 2, 10, 8) and x.stride() == (10 * 48, 8, 48, 1)
        assert variant.gradients[0].stride() == (10 * 16, 8, 16, 1)


def test_the_check_of_attention(monkeypatch, tmp_path, capsys):
    """Too large an error fails it, and so does a backend that takes the inputs and then does not work."""
    shape = ("--seq-lengths", "1", "9", "--head-dims", "8", "--batch", "1", "--num-heads", "1", "--rounds", "1")
    arguments = (*shape, "--device", "cpu", "--gradients", "alone", "uniform", "--tolerance")

    def broken(*_):
        raise KeyError("a compiler's error")

    monkeypatch.setitem(BACKENDS, "broken", Backend(broken))
    assert exit_code("benchmark_attention", *arguments, "1e-5", "--backends", "sdpa", "reference") == 0
    assert exit_code("benchmark_attention", *arguments, "1e-30", "--backends", "sdpa") == 1
    assert "sdpa, alone, S 9, D 8 failed: gradient error " in capsys.readouterr().out
    output = tmp_path / "out.json"
    assert exit_code("benchmark_attention", *arguments, "1", "--backends", "broken", "sdpa", "--output", output) == 1
    result = json.loads(output.read_text())
    assert result["failed"]["broken, alone, S 1, D 8"] == 'KeyError: "a compiler\'s error"'
    assert [r["gradient"] for r in result["records"]] == ["alone", "uniform"] * 2
    assert exit_code("benchmark_attention", *arguments, "1", "--backends", "sdpb") == 2
    assert "error: --backends: sdpb: choose from triton, " in capsys.readouterr().err


def test_the_papers_way_computes_the_same_objective():
    """All variants with the regularizer have one loss, all without it another."""
    pytest.importorskip("triton")
    import benchmark_training as tool

    config = BertConfig(**SIZES["tiny"], vocab_size=150, attention_dropout=0.0, hidden_dropout=0.0)
    cpu = torch.device("cpu")
    setting = tool.Setting(config, cpu, "fp32", False, Bert(config).state_dict())
    batch = tool.random_batch(2, argparse.Namespace(seq_length=24, vocab_size=150, seed=0), cpu)
    names = ("ours_max", "ours_packed", "ours_uniform", "ours_mlm", "paper", "hf_sdpa")
    losses = {name: float(tool.module_and_loss(name, setting, batch, 0.5)[1]().detach()) for name in names}
    assert losses["ours_max"] == pytest.approx(losses["paper"], rel=1e-5)
    assert losses["ours_max"] == pytest.approx(losses["ours_packed"], rel=1e-5)
    assert losses["ours_mlm"] == pytest.approx(losses["hf_sdpa"], rel=1e-5)
    assert losses["ours_uniform"] > losses["ours_max"] > losses["ours_mlm"] + 0.1


def test_variants_take_turns():
    """Each once in a round, after every other one equally often; in the same order when it is done again."""
    runs = []
    for _ in range(2):
        calls = []
        variants = {name: (lambda name=name, calls=calls: calls.append(name)) for name in "abc"}
        times = time_interleaved(variants, rounds=300, device=torch.device("cpu"), warmup=0)
        assert all(len(times[name].wall) == len(times[name].cpu) == 300 for name in "abc")
        runs.append("".join(calls))
    assert runs[0] == runs[1]
    rounds = [runs[0][i : i + 3] for i in range(0, 900, 3)]
    assert all(sorted(round_) == ["a", "b", "c"] for round_ in rounds)
    assert all(80 < sum(pair in round_ for round_ in rounds) < 120 for pair in ("ab", "ba", "ac", "ca", "bc", "cb"))


@pytest.fixture
def fake_gpu(monkeypatch):
    """A stand-in for the GPU, whose time between two stamps is 5 ms a call of "a": what is called in which order."""
    calls = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            self.at = len(calls)
            calls.append(f"record {stream}")

        def elapsed_time(self, end):
            return 5.0 * calls[self.at : end.at].count("a")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("synchronize"))
    return calls


def test_calls_are_queued_between_time_stamps_of_the_gpu(fake_gpu):
    """One that is not timed keeps the GPU busy meanwhile; how many more is what the warm-up said."""
    variants = {"a": lambda: fake_gpu.append("a")}
    gpu = torch.device("cuda")
    times = time_interleaved(variants, rounds=1, device=gpu, warmup=1, queue_seconds=0.02)["a"]
    turns = [["synchronize", "a", "record stream", *"a" * n, "record stream", "synchronize"] for n in (1, 4)]
    assert fake_gpu == turns[0] + turns[1]
    assert times.wall == [0.005]
    assert len(times.host) == len(times.cpu) == 1


@pytest.mark.parametrize(("seconds", "most"), [(0.001, 1), (1.0, 20), (None, 1)])
def test_queues_are_not_too_short_nor_too_long(fake_gpu, seconds, most):
    variants = {"a": lambda: fake_gpu.append("a")}
    time_interleaved(variants, rounds=2, device=torch.device("cuda"), warmup=2, queue_seconds=seconds)
    last = fake_gpu[-fake_gpu[::-1].index("synchronize", 1) :]
    assert last.count("a") == most + (seconds is not None)  # a save, for instance, is not made once more


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


@pytest.mark.parametrize("name", ["ours_max", "paper", "hf_sdpa"])
def test_every_bare_step_clips_gradients(name, monkeypatch):
    """As the trainer does, with which it is compared."""
    import benchmark_training as tool

    cpu, clipped = torch.device("cpu"), []
    config = BertConfig(**SIZES["tiny"], vocab_size=50)
    setting = tool.Setting(config, cpu, "fp32", False, Bert(config).state_dict())
    step = tool.build_variant(
        name, setting, tool.random_batch(2, argparse.Namespace(seq_length=8, vocab_size=50, seed=0), cpu)
    )
    monkeypatch.setattr(
        torch.nn.utils,
        "clip_grad_norm_",
        lambda parameters, norm: clipped.append((norm, any(p.grad is not None for p in parameters))),
    )
    step()
    assert clipped == [(1.0, True)]


def test_the_largest_batch_that_fits():
    import benchmark_training as tool

    for limit in (0, 1, 2, 3, 7, 15, 16, 31, 32, 47, 48, 63, 100, 1000):
        tried = []
        found = tool.largest_that_fits(lambda n, limit=limit, tried=tried: tried.append(n) or n <= limit)
        assert found <= limit < found + max(1, found // 16) or found == limit == 0
        assert len(tried) < 20


def test_the_papers_way_gets_what_the_others_leave(monkeypatch):
    """Its batch is chosen when all others have their states; one that does not fit does not end the others."""
    import benchmark_training as tool

    log = []

    def build(name, setting, batch):
        def step():
            log.append((name, len(batch.input_ids)))
            if name == "ours_uniform" or (name == "paper" and len(batch.input_ids) > 11):
                raise torch.OutOfMemoryError("no memory")

        if name == "ours_deepspeed":
            raise ModuleNotFoundError("No module named 'deepspeed'")
        return step

    monkeypatch.setattr(tool, "build_variant", build)
    make_batch = tool.random_batch
    monkeypatch.setattr(
        tool, "random_batch", lambda size, arguments, _: make_batch(size, arguments, torch.device("cpu"))
    )
    arguments = argparse.Namespace(seq_length=8, vocab_size=50, seed=0, batch=4, paper_batch=None)
    setting = argparse.Namespace(device=torch.device("cuda"))
    names = ["paper", "ours_max", "ours_uniform", "ours_deepspeed", "hf_sdpa"]
    built = tool.build_variants(names, setting, arguments)
    assert built.sizes == {"ours_max": 4, "hf_sdpa": 4, "paper": 11}
    assert built.left_out == {"ours_uniform": "no memory", "ours_deepspeed": "No module named 'deepspeed'"}
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


def test_blimp_benchmark(run_tool, tmp_path):
    words = ["the", "dog", "dogs", "bark", "##s", "."]
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n")
    pair = {"sentence_good": "The dog barks.", "sentence_bad": "The dogs barks."}
    line = json.dumps(pair | {"field": "f", "linguistics_term": "t", "UID": "u"})
    (tmp_path / "u.jsonl").write_text(f"{line}\n{line}\n{line}\n")
    output = tmp_path / "out.json"
    arguments = ["--blimp", str(tmp_path), "--vocab", str(tmp_path / "vocab.txt"), "--size", "tiny", "--pairs", "2"]
    arguments += ["--against", str(ROOT), "--no-peer", "--rounds", "2", "--output", str(output)]
    run_tool("benchmark_blimp", *arguments)
    result = json.loads(output.read_text())
    assert (result["sentences"], result["masked_copies"]) == (4, 20)
    assert set(result["seconds"]) == {"this", "against"} and set(result["ratios"]) == {"against"}
    assert all(len(rounds) == 2 for rounds in result["rounds"].values())
    assert result["largest_difference_a_token"] == {"this": 0.0, "against": 0.0}
    run_tool("benchmark_blimp", *arguments, expect=2)  # the output exists


def test_checkouts_benchmark_names_what_is_missing(run_tool, tmp_path):
    arguments = ["--against", str(tmp_path), "--config", str(ROOT / "examples" / "toy.yaml")]
    printed = run_tool("benchmark_checkouts", *arguments, expect=2)
    assert printed == f"error: {tmp_path}/pretrain_mlm.py: there is no such file\n"


@pytest.mark.slow
def test_checkouts_benchmark(run_tool, tmp_path):
    output = tmp_path / "out.json"
    arguments = ["--against", str(ROOT), "--config", str(write_inputs(tmp_path)), "--output", str(output)]
    printed = run_tool("benchmark_checkouts", *arguments, "--rounds", "2", "--updates", "2")
    result = json.loads(output.read_text())
    assert set(result["ratios"]) == {"cpu", "wall", "peak", "more", "start"}
    assert all(len(rounds) == 2 for rounds in result["rounds"].values()) and "| against / this |" in printed
    assert "model.size" in run_tool("benchmark_checkouts", *arguments[:4], "--model.size", "huge", expect=2)
