"""GLUE: reading every layout, scores against their definitions, fine-tuning on a task that can be learnt."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from bert_pairs import tiny_hf_bert
from tool_calls import call_tool
from transformers import BertTokenizerFast

from megatron_sas.core.cli import InputError
from megatron_sas.core.manifest import write_manifest
from megatron_sas.data.tokenizer import load_tokenizer, vocab_size
from megatron_sas.data.unknown import Unknown
from megatron_sas.glue.data import Columns, Examples, read_file, read_hub, task_files
from megatron_sas.glue.finetune import Pretrained, Settings, encode, finetune
from megatron_sas.glue.tasks import TASKS
from megatron_sas.model.bert import Bert
from megatron_sas.model.config import BertConfig as OwnConfig
from megatron_sas.report.load import read_inputs
from megatron_sas.report.trajectories import GLUE
from megatron_sas.run.directory import MODEL_CONFIG, MODEL_WEIGHTS, STATE
from megatron_sas.run.reading import FORMAT, VERSION, write_model_config, write_weights

TOOL = str(Path(__file__).resolve().parents[2] / "tools" / "finetune_glue.py")
BLIMP_SET = "tough_vs_raising_1.jsonl"  # which adjective stands there decides: a bag of words can learn it

# First lines of each file as GLUE distributes it.
LAYOUTS = {
    "cola": ["gj04\t1\t\tOur friends won't buy \"this.", "gj04\t0\t*\tThe box fell"],
    "sst2": ["sentence\tlabel", "hide new secretions \t0", "a gorgeous film \t1"],
    "mrpc": ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
             '1\t1\t2\tHe said " yes .\tHe agreed .', "0\t3\t4\tA .\tB ."],
    "stsb": ["index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
             "0\tm\tf\t2012\t1\tn\tn\tA plane.\tAn air plane.\t5.000", "1\tm\tf\t2012\t1\tn\tn\tA man.\tA cat.\t0.25"],
    "qqp": ["id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
            "1\t1\t2\tHow?\tWhy?\t0", "2\t3\t4\tWho?\tWho is?\t1"],
    "mnli": ["index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
             "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
             "0\t1\t1n\tg\tp\tp\tp\tp\tIt rains.\tIt is wet.\tneutral\tneutral",
             "1\t1\t1c\tg\tp\tp\tp\tp\tIt rains.\tIt is dry.\tneutral\tcontradiction"],
    "qnli": ["index\tquestion\tsentence\tlabel", "0\tWhat?\tThis.\tentailment", "1\tWho?\tThat.\tnot_entailment"],
    "rte": ["index\tsentence1\tsentence2\tlabel", "0\tA.\tB.\tnot_entailment", "1\tC.\tD.\tentailment"],
    "wnli": ["index\tsentence1\tsentence2\tlabel", "0\tA.\tB.\t1", "1\tC.\tD.\t0"],
}  # fmt: skip
EXPECTED = {
    "cola": ([("Our friends won't buy \"this.",), ("The box fell",)], [1, 0]),
    "sst2": ([("hide new secretions ",), ("a gorgeous film ",)], [0, 1]),
    "mrpc": ([('He said " yes .', "He agreed ."), ("A .", "B .")], [1, 0]),
    "stsb": ([("A plane.", "An air plane."), ("A man.", "A cat.")], [5.0, 0.25]),
    "qqp": ([("How?", "Why?"), ("Who?", "Who is?")], [0, 1]),
    "mnli": ([("It rains.", "It is wet."), ("It rains.", "It is dry.")], [1, 2]),
    "qnli": ([("What?", "This."), ("Who?", "That.")], [0, 1]),
    "rte": ([("A.", "B."), ("C.", "D.")], [1, 0]),
    "wnli": ([("A.", "B."), ("C.", "D.")], [1, 0]),
}


def run_tool(*arguments):
    call_tool("finetune_glue", *arguments)


@pytest.mark.parametrize("name", TASKS)
def test_layouts_of_the_download(name, tmp_path):
    task = TASKS[name]
    folder = tmp_path / task.folder
    folder.mkdir()
    for file in ("train.tsv", *task.validation):
        (folder / file).write_bytes(("\ufeff" + "\r\n".join(LAYOUTS[name]) + "\r\n").encode())
    train, validation = task_files(task, tmp_path)
    assert len(validation) == (2 if name == "mnli" else 1)
    examples = read_file(task, train)
    assert (examples.texts, examples.labels.tolist()) == EXPECTED[name]
    assert examples.labels.dtype == (np.float32 if name == "stsb" else np.int64)
    # The hub's names as JSON lines, with numbers for labels.
    texts, labels = EXPECTED[name]
    rows = [dict(zip([group[0] for group in task.text], text, strict=True)) | {"label": label, "idx": 0}
            for text, label in zip(texts, labels, strict=True)]  # fmt: skip
    path = tmp_path / "hub.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    again = read_file(task, path)
    assert (again.texts, again.labels.tolist()) == EXPECTED[name]
    assert again.source["sha256"] == examples.source["sha256"] and again.source["path"] != examples.source["path"]
    validation[-1].unlink()
    with pytest.raises(InputError, match=rf"{validation[-1].name}: no such file"):
        task_files(task, tmp_path)


def test_named_columns_and_class_names(tmp_path):
    path = tmp_path / "mine.tsv"
    path.write_text("good\tbad\twords\nacceptable\t1\tA cat.\nunacceptable\t0\tCat a.\n")
    examples = read_file(TASKS["cola"], path, Columns(["words"], "good"))
    assert (examples.texts, examples.labels.tolist()) == ([("A cat.",), ("Cat a.",)], [1, 0])
    # The same file with other columns is other data.
    sums = {read_file(TASKS["cola"], path, Columns([text], "bad")).source["sha256"] for text in ("words", "good")}
    assert len(sums) == 2
    assert examples.source["sha256"] in sums


def test_lines_with_too_few_columns(tmp_path, capsys):
    """QQP as distributed has some."""
    path = tmp_path / "train.tsv"
    good = [f"{n}\t1\t2\tHow?\tWhy?\t{n % 2}" for n in range(200)]
    path.write_text("\n".join([LAYOUTS["qqp"][0], *good, "201\t1\t2\tbroken"]) + "\n")
    assert len(read_file(TASKS["qqp"], path)) == 200
    assert "left out 1 of 201 lines with too few columns" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "name", "content", "message"),
    [
        ("cola", "a.tsv", "", "no examples in it"),
        ("cola", "a.jsonl", "", "no examples in it"),
        ("sst2", "a.tsv", "sentence\tlabel\n", "no examples in it"),
        ("sst2", "a.tsv", "text\tlabel\nx\t1\ny\t0\n", ":2: no column 'sentence', found 'text', 'label'"),
        ("mrpc", "a.jsonl", '{"sentence1": "a", "label": 1}\n', ":1: no column 'sentence2' or '#2 String'"),
        ("cola", "a.tsv", "s\t1\t\ta\ns\t2\t\tb\n", ":2: label '2' is none of 0 to 1 or unacceptable, acceptable"),
        ("mnli", "a.jsonl", '{"premise": "a", "hypothesis": "b", "label": -1}\n', "test data without labels"),
        ("stsb", "a.jsonl", '{"sentence1": "a", "sentence2": "b", "label": 5.5}\n', "5.5 is not a score from 0 to 5"),
        ("stsb", "a.jsonl", '{"sentence1": "a", "sentence2": "b", "label": "x"}\n', "'x' is not a score"),
        ("cola", "a.tsv", "s\t1\t\ta\ns\t1\t\tb\n", "all 2 labels are 'acceptable'"),
        ("cola", "a.tsv", "one\ntwo\n", ":1: fewer than the 4 tab-separated columns that cola needs"),
        ("cola", "a.jsonl", "{\n", ":1: not JSON"),
        ("cola", "a.jsonl", "[" * 100_000, ":1: not JSON"),
        ("cola", "a.jsonl", '{"sentence": "\\ud83d", "label": 1}\n', ":1: half of a surrogate pair in '\\ud83d'"),
        ("cola", "a.jsonl", "[1]\n", ":1: not a JSON object"),
        ("cola", "a.jsonl", '{"sentence": 3, "label": 1}\n', "3 is not a text"),
        ("cola", "a.csv", "x", "unknown kind of file '.csv'"),
    ],
)  # fmt: skip
def test_bad_files_are_one_line(task, name, content, message, tmp_path):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        read_file(TASKS[task], path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_scores_follow_their_definitions():
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 2, 300), rng.integers(0, 2, 300)
    predictions[:150] = labels[:150]
    tp, tn = int(((labels == 1) & (predictions == 1)).sum()), int(((labels == 0) & (predictions == 0)).sum())
    fp, fn = int(((labels == 0) & (predictions == 1)).sum()), int(((labels == 1) & (predictions == 0)).sum())
    accuracy, f1 = (tp + tn) / 300, 2 * tp / (2 * tp + fp + fn)
    matthews = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert TASKS["cola"].score(labels, predictions) == pytest.approx(
        {"matthews_correlation": matthews, "accuracy": accuracy}
    )
    for name in ("mrpc", "qqp"):
        expected = {"f1": f1, "accuracy": accuracy, "combined_score": (f1 + accuracy) / 2}
        assert TASKS[name].score(labels, predictions) == pytest.approx(expected)
    for name in ("sst2", "mnli", "qnli", "rte", "wnli"):
        assert TASKS[name].score(labels, predictions) == pytest.approx({"accuracy": accuracy})
    scores = rng.permutation(100) / 20
    guesses = scores + rng.normal(0, 1, 100)
    ranks = [np.argsort(np.argsort(values)).astype(float) for values in (scores, guesses)]
    pearson, spearman = np.corrcoef(scores, guesses)[0, 1], np.corrcoef(*ranks)[0, 1]
    expected = {"pearson": pearson, "spearman": spearman, "combined_score": (pearson + spearman) / 2}
    assert TASKS["stsb"].score(scores, guesses) == pytest.approx(expected)
    # Predictions of one kind only have a score, not a NaN.
    assert TASKS["cola"].score(labels, np.ones_like(labels))["matthews_correlation"] == 0
    assert TASKS["mrpc"].score(labels, np.zeros_like(labels))["f1"] == 0
    assert TASKS["stsb"].score(scores, np.ones(100))["combined_score"] == 0


def test_learning_rate_rises_and_falls():
    rates = [Settings(warmup_share=0.1).rate(step, 100) for step in range(100)]
    assert rates[:3] == pytest.approx([0, 0.1, 0.2]) and rates[10] == 1 and rates[55] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(1 / 90) and max(rates) == 1
    assert Settings(warmup_share=0).rate(0, 1) == 1


@pytest.fixture(scope="module")
def cola_like(data_dir, tmp_path_factory):
    """A folder like the GLUE download with CoLA made of minimal pairs, and a small random model with real pieces."""
    path = tmp_path_factory.mktemp("glue")
    pairs = [json.loads(line) for line in (data_dir / "blimp" / BLIMP_SET).read_text().splitlines()]
    (path / "data" / "CoLA").mkdir(parents=True)
    for name, part in (("train", pairs[:350]), ("dev", pairs[800:])):
        lines = [f"blimp\t{label}\t\t{pair[key]}" for pair in part
                 for key, label in (("sentence_good", 1), ("sentence_bad", 0))]  # fmt: skip
        (path / "data" / "CoLA" / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    tokenizer = BertTokenizerFast(vocab=str(data_dir / "bert_vocab" / "vocab.txt"))
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64, "max_position_embeddings": 32}
    tiny_hf_bert(len(tokenizer), **sizes).save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    return path


FAST = ("--learning-rate", "5e-3", "--epochs", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def result(cola_like):
    output = cola_like / "one" / "cola.json"
    arguments = ("--task", "cola", "--data", cola_like / "data", "--model", cola_like / "model", "--output", output)
    run_tool(*arguments, *FAST, "--seeds", 1, 2)
    return output, arguments


def test_learns_and_says_so(result, cola_like):
    output, _ = result
    found = json.loads(output.read_text())
    assert (found["format"], found["version"], found["task"]) == ("megatron_sas glue", 1, "cola")
    assert (found["metric"], found["train_examples"], found["validation_examples"]) == (
        "matthews_correlation",
        700,
        400,
    )
    assert found["model"] == str(cola_like / "model") and found["settings"]["max_length"] == 32
    values = [seed["metrics"]["matthews_correlation"] for seed in found["seeds"]]
    assert found["mean"] == pytest.approx(sum(values) / 2)
    assert found["standard_error"] == pytest.approx(abs(values[0] - values[1]) / 2)
    assert [seed["seed"] for seed in found["seeds"]] == [1, 2]
    for seed in found["seeds"]:
        assert seed["metrics"] == seed["epochs"][-1] and seed["best_epoch"] in (1, 2)
        assert seed["metrics"]["accuracy"] > 0.8  # chance is 0.5; its standard error with 400 examples 0.025
        assert seed["train_loss"][1] < seed["train_loss"][0]
    assert list(output.parent.iterdir()) == [output]  # nothing partial is left


def test_same_seed_same_result_and_more_seeds_are_added(result, cola_like, tmp_path, capsys):
    output, arguments = result
    first = json.loads(output.read_text())
    again = tmp_path / "again.json"
    run_tool(*arguments[:-1], again, *FAST, "--seeds", 2)
    second = json.loads(again.read_text())
    assert second["seeds"] == first["seeds"][1:]  # bit for bit
    assert second["standard_error"] is None
    capsys.readouterr()
    run_tool(*arguments[:-1], again, *FAST, "--seeds", 2)
    assert "has these seeds already" in capsys.readouterr().out
    with pytest.raises(InputError, match="holds results with other settings; choose another output"):
        run_tool(*arguments[:-1], again, *FAST, "--seeds", 2, "--weight-decay", 0.1)
    again.write_text("{}")
    with pytest.raises(InputError, match="is not a result of this tool"):
        run_tool(*arguments[:-1], again, *FAST)


def test_the_report_reads_what_is_written(result, cola_like, tmp_path):
    """The step of a run's final model is in its result, by which the analysis knows it."""
    _, arguments = result
    run, final = tmp_path / "run", tmp_path / "run" / "snapshots" / "step_00000007"
    shutil.copytree(cola_like / "model", final)
    run_tool(*arguments[:4], "--model", final, "--output", run / "glue", *FAST, "--seeds", 1)
    (run / "config.yaml").write_text("run: {seed: 1}\n")
    for step, expected in ((7, json.loads((run / "glue" / "cola.json").read_text())["mean"]), (8, None)):
        (run / "metrics.jsonl").write_text(
            json.dumps({"kind": "evaluation", "step": step, "validation_mlm_loss": 2.0}) + "\n"
        )
        (loaded,), notes = read_inputs([run])
        assert loaded.final(GLUE) == expected and len(notes) == (expected is None)


def test_a_killed_call_goes_on(result, tmp_path, monkeypatch):
    """Stopped in its second seed: no output, but the first seed is kept, and the next call makes only the second."""
    import megatron_sas.glue.finetune as glue

    output, arguments = result
    made, own = [], glue.finetune

    def stop_in_seed_two(*args, **kwargs):
        made.append(args[5])
        if args[5] == 2 and len(made) == 2:
            raise KeyboardInterrupt
        return own(*args, **kwargs)

    monkeypatch.setattr(glue, "finetune", stop_in_seed_two)
    target = tmp_path / "cola.json"
    with pytest.raises(KeyboardInterrupt):
        run_tool(*arguments[:-1], target, *FAST, "--seeds", 1, 2)
    assert not target.exists()
    run_tool(*arguments[:-1], target, *FAST, "--seeds", 1, 2)
    assert made == [1, 2, 2]
    assert json.loads(target.read_text()) == json.loads(output.read_text())


def test_jobs_with_different_seeds_of_one_output_lose_none(result, tmp_path, monkeypatch, capsys):
    """While one makes its second seed, another makes a third one and ends; then a killed one has left a seed behind."""
    import megatron_sas.glue.finetune as glue

    _, arguments = result
    target = tmp_path / "cola.json"
    first = {"metrics": {"matthews_correlation": 0.5, "accuracy": 0.5}, "best_epoch": 1, "epochs": [], "train_loss": []}

    def call(*seeds):
        run_tool(*arguments[:-1], target, *FAST, "--seeds", *seeds)

    def other_job_meanwhile(*args, **kwargs):
        if args[5] == 2:
            call(3)
        return {"seed": args[5], **first}

    monkeypatch.setattr(glue, "finetune", other_job_meanwhile)
    call(1, 2)
    assert [seed["seed"] for seed in json.loads(target.read_text())["seeds"]] == [1, 2, 3]
    partial = target.with_name(".cola.json.partial")
    partial.write_text(target.read_text())
    found = json.loads(target.read_text())
    target.write_text(json.dumps({**found, "seeds": found["seeds"][:2]}))
    call(1, 2)
    assert [seed["seed"] for seed in json.loads(target.read_text())["seeds"]] == [1, 2, 3]
    assert list(tmp_path.iterdir()) == [target]


def test_texts_are_cut_as_transformers_cuts_them_but_special_tokens_are_text(cola_like):
    pretrained = Pretrained(cola_like / "model", TASKS["mrpc"])
    texts = [("the dog barks " * a, "a cat sat on it " * b) for a in range(1, 6) for b in range(1, 6)]
    expected = pretrained.tokenizer(*map(list, zip(*texts, strict=True)), truncation=True, max_length=17)
    found = encode(Examples(texts, np.zeros(len(texts)), {}), pretrained, 17)
    assert (found.ids, found.types) == (expected["input_ids"], expected["token_type_ids"])
    assert max(map(len, found.ids)) == 17 > min(map(len, found.ids))
    special = encode(Examples([("the [SEP] dog ☃", "[MASK]")], np.array([0]), {}), pretrained, 32)
    apart = encode(Examples([("the [ sep ] dog ☃", "[ mask ]")], np.array([0]), {}), pretrained, 32)
    assert special.ids == apart.ids and special.ids[0].count(102) == 2
    assert special.unknown == Unknown(tokens=9, unknown=1)


def test_tokenizers_that_put_nothing_around_a_text_get_berts_way(cola_like, tmp_path):
    shutil.copytree(cola_like / "model", tmp_path / "model")
    examples = Examples([("the dog barks", "a cat")], np.array([0]), {})
    expected = encode(examples, Pretrained(tmp_path / "model", TASKS["mrpc"]), 32)
    path = tmp_path / "model" / "tokenizer.json"
    serialised = json.loads(path.read_text())
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "unk_token": "[UNK]",
        "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]",
    }))  # fmt: skip
    path.write_text(json.dumps({**serialised, "post_processor": None}))
    found = encode(examples, Pretrained(tmp_path / "model", TASKS["mrpc"]), 32)
    assert (found.ids, found.types) == (expected.ids, expected.types)
    # RoBERTa's own way stays: another [SEP] between the texts.
    roberta = {"type": "RobertaProcessing", "sep": ["[SEP]", 102], "cls": ["[CLS]", 101]}
    path.write_text(
        json.dumps({**serialised, "post_processor": {**roberta, "trim_offsets": True, "add_prefix_space": False}})
    )
    assert encode(examples, Pretrained(tmp_path / "model", TASKS["mrpc"]), 32).ids[0].count(102) == 3


def write_checkpoint(path, tokenizer_path):
    """A training checkpoint of a small model none of whose parameters has its initial value; returns the model."""
    tokenizer = load_tokenizer(tokenizer_path)
    config = OwnConfig(
        num_layers=2,
        hidden_size=32,
        num_heads=2,
        intermediate_size=48,
        vocab_size=vocab_size(tokenizer),
        max_position_embeddings=32,
    )
    torch.manual_seed(1)
    model = Bert(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    path.mkdir(parents=True)
    write_model_config(path / MODEL_CONFIG, config)
    write_weights(path / MODEL_WEIGHTS, {n: t.contiguous() for n, t in model.state_dict().items()})
    tokenizer.save_pretrained(path / "tokenizer")
    (path / STATE).write_text("{}")
    write_manifest(path, format=FORMAT, version=VERSION, step=0)
    return model.eval()


def test_checkpoints_become_classifiers(cola_like, tmp_path):
    """The encoder of a fresh classifier computes what our own model computes."""
    own = write_checkpoint(tmp_path / "run" / "step_00000000", cola_like / "model")
    pretrained = Pretrained(tmp_path / "run" / "step_00000000", TASKS["mnli"])
    model = pretrained.fresh().eval()
    ids = torch.randint(5, 1000, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = model.bert(ids).last_hidden_state
        torch.testing.assert_close(hidden, own(ids).hidden, atol=1e-4, rtol=1e-4)
        assert model(ids).logits.shape == (3, 3)


def test_pairs_regression_and_two_validation_sets(cola_like, tmp_path):
    """Scores that follow from the words are learnt; MNLI's two sets have metrics of their own."""
    rng = np.random.default_rng(0)
    words = ["cat", "dog", "house", "river"]
    rows = [(a, str(rng.choice(words))) for a in rng.choice(words, 120).tolist()]
    (tmp_path / "stsb.jsonl").write_text(
        "".join(
            json.dumps({"sentence1": a, "sentence2": b, "label": 2.5 * ((a == "cat") + (b == "dog"))}) + "\n"
            for a, b in rows
        )
    )
    examples = read_file(TASKS["stsb"], tmp_path / "stsb.jsonl")
    pretrained = Pretrained(cola_like / "model", TASKS["stsb"])
    encoded = encode(examples, pretrained, 8)
    tokens = pretrained.tokenizer.convert_ids_to_tokens(encoded.ids[0])
    assert tokens == ["[CLS]", rows[0][0], "[SEP]", rows[0][1], "[SEP]"] and encoded.types[0] == [0, 0, 0, 1, 1]
    settings = Settings(learning_rate=5e-3, epochs=8, batch_size=16)
    metrics = finetune(pretrained, TASKS["stsb"], encoded, [encoded], settings, 1, torch.device("cpu"))["metrics"]
    assert metrics["pearson"] > 0.5

    mnli = tmp_path / "MNLI"
    mnli.mkdir()
    for name in ("train", "dev_matched", "dev_mismatched"):
        (mnli / f"{name}.tsv").write_text("\n".join(LAYOUTS["mnli"]) + "\n")
    options = ("--model", cola_like / "model", "--epochs", 1, "--seeds", 3, "--device", "cpu")
    run_tool("--task", "mnli", "--data", tmp_path, "--output", tmp_path / "glue", *options)
    found = json.loads((tmp_path / "glue" / "mnli.json").read_text())
    assert set(found["seeds"][0]["metrics"]) == {"accuracy", "accuracy_mismatched"}
    assert found["validation_examples_mismatched"] == 2


def test_measuring_a_sweep_fine_tunes_its_final_models(tmp_path):
    """examples/experiments/measure.sh with a stand-in for Python that writes down what it is asked for."""
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@" >> "$LOG"\n')
    (tmp_path / "python").chmod(0o755)
    runs = [tmp_path / "runs" / name for name in ("base/seed-1", "minus/seed-1")]
    for run in runs:
        (run / "snapshots" / "step_00000000").mkdir(parents=True)
    (tmp_path / "runs" / "minus" / "seed-2" / "snapshots").mkdir(parents=True)  # it has just begun
    script = Path(TOOL).parents[1] / "examples" / "experiments" / "measure.sh"
    for glue in (None, tmp_path, tmp_path / "absent"):
        log = tmp_path / f"{glue and glue.name}.log"
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(log)}
        environment |= {} if glue is None else {"GLUE": str(glue)}
        command = ["bash", script, tmp_path / "runs", "TREEBANK", "BLIMP", "TEXT", "REPORT", "--workers", "2"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if glue == tmp_path / "absent":
            assert done.returncode == 2 and "absent: no such folder" in done.stderr and not log.exists()
            continue
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("minus/seed-2 has no models yet and is passed over") == 1
        calls = [line.split() for line in log.read_text().splitlines()]
        tuned = [["--model", f"{run}", "--task", "all", "--data", f"{glue}", "--output", f"{run}/glue"] for run in runs]
        assert [call[1:] for call in calls if "finetune_glue" in call[0]] == (tuned if glue else [])
        assert sum("eval_trajectory" in call[0] for call in calls) == 2 and "analyze_trajectory" in calls[-1][0]


def test_all_tasks_into_a_folder(cola_like, tmp_path, capsys):
    for name, task in TASKS.items():
        (tmp_path / "data" / task.folder).mkdir(parents=True)
        for file in ("train.tsv", *task.validation):
            (tmp_path / "data" / task.folder / file).write_text("\n".join(LAYOUTS[name]) + "\n")
    arguments = ("--model", cola_like / "model", "--data", tmp_path / "data", "--output", tmp_path / "glue")
    run_tool(*arguments, "--task", "all", "--epochs", 1, "--seeds", 1, "--device", "cpu")
    assert {path.name for path in (tmp_path / "glue").iterdir()} == {f"{name}.json" for name in TASKS}
    lines = capsys.readouterr().out.splitlines()
    means = {name: json.loads((tmp_path / "glue" / f"{name}.json").read_text())["mean"] for name in TASKS}
    average = sum(value for name, value in means.items() if name != "wnli") / 8
    assert lines[-1] == f"average of 8 tasks, without wnli: {average:.4f}"
    assert [line.split()[0] for line in lines[-10:-1]] == list(TASKS)
    (tmp_path / "data" / "WNLI" / "dev.tsv").unlink()
    with pytest.raises(InputError, match=r"WNLI/dev.tsv: no such file"):
        run_tool(*arguments[:-1], tmp_path / "other", "--task", "all", "--seeds", 1)
    assert not (tmp_path / "other").exists()


def test_bad_arguments_are_one_line(cola_like, tmp_path):
    file, output = cola_like / "data" / "CoLA" / "dev.tsv", tmp_path / "out.json"
    two = ("--train-file", file, "--validation-file", file)
    for options, message in [
        (("--task", "cola", "--train-file", file), "give both or neither"),
        (("--task", "cola", "rte", *two), "stands for the data of one task"),
        (("--task", "cola", "--data", tmp_path, "--label-column", "x"), "name columns of --train-file"),
        (("--task", "rte", *two, "--text-columns", "x"), "--text-columns: rte takes 2, not 1"),
        (("--task", "cola", *two, file), "--validation-file: cola takes at most 1"),
        (("--task", "cola", *two, "--text-columns", "x"), "no column 'x'"),
        (("--task", "cola", *two, "--seeds", 1, 1), "a seed is given twice"),
        (("--task", "cola", *two, "--epochs", 0), "--epochs: 0 is not above 0"),
        (("--task", "cola", *two, "--warmup-share", 1), "--warmup-share: 1.0 is not a share"),
        (("--task", "cola", "--data", tmp_path), "CoLA/train.tsv: no such file"),
        (("--task", "cola", *two, "--model", tmp_path), "neither a Hugging Face model"),
        (("--task", "cola", *two, "--learning-rate", 1e6, "--seeds", 1), "the loss is not finite"),
    ]:
        with pytest.raises(InputError, match=re.escape(message)) as caught:
            run_tool("--model", cola_like / "model", "--output", output, "--device", "cpu", *options)
        assert "\n" not in str(caught.value) and not output.exists()


def test_data_of_the_hub(tmp_path):
    """A data set of the hub's columns and splits, from a folder instead of the network."""
    import datasets

    texts, labels = EXPECTED["mrpc"]
    columns = {"sentence1": [a for a, _ in texts], "sentence2": [b for _, b in texts], "label": labels, "idx": [0, 1]}
    for split in ("train", "validation"):
        datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / split)
    examples = read_hub(TASKS["mrpc"], "validation", hub=str(tmp_path))
    assert (examples.texts, examples.labels.tolist()) == EXPECTED["mrpc"]
    assert examples.source.keys() == {"hub", "split", "sha256"}
    assert (examples.source["hub"], examples.source["split"]) == (str(tmp_path), "validation")


def test_no_network_is_one_line(cola_like, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"--task cola: nyu-mll/glue cannot be read .* give --data, or") as caught:
        run_tool("--model", cola_like / "model", "--task", "cola", "--output", tmp_path / "out.json", "--device", "cpu")
    assert "\n" not in str(caught.value)
