"""Fine-tuning on GLUE, on a task that can be learnt."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from bert_pairs import tiny_hf_bert
from glue_layouts import LAYOUTS
from tool_calls import call_tool
from transformers import BertTokenizerFast, ModernBertForSequenceClassification

from megatron_sas.core.cli import InputError
from megatron_sas.core.manifest import write_manifest
from megatron_sas.data.tokenizer import load_tokenizer, vocab_size
from megatron_sas.data.unknown import Unknown
from megatron_sas.glue.data import Examples, read_file
from megatron_sas.glue.finetune import Pretrained, Settings, encode, finetune
from megatron_sas.glue.tasks import TASKS
from megatron_sas.model.architectures import build_model
from megatron_sas.model.config import BertConfig as OwnConfig
from megatron_sas.model.modernbert import ModernBertConfig
from megatron_sas.report.load import read_inputs
from megatron_sas.report.trajectories import GLUE
from megatron_sas.run.directory import MODEL_CONFIG, MODEL_WEIGHTS, STATE
from megatron_sas.run.reading import FORMAT, VERSION, write_model_config, write_weights

TOOL = str(Path(__file__).resolve().parents[2] / "tools" / "finetune_glue.py")
BLIMP_SET = "tough_vs_raising_1.jsonl"  # which adjective stands there decides: a bag of words can learn it


def run_tool(*arguments, **options):
    call_tool("finetune_glue", *arguments, **options)


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


def test_a_killed_call_goes_on(result, tmp_path):
    """Stopped in its second seed: no output, but the first seed is kept, and the next call makes only the second."""
    output, arguments = result
    made, seeds = [], json.loads(output.read_text())["seeds"]  # as `test_same_seed_same_result` would train them again

    def stop_in_seed_two(*args, **kwargs):
        made.append(args[5])
        if args[5] == 2 and len(made) == 2:
            raise KeyboardInterrupt
        return seeds[args[5] - 1]

    target = tmp_path / "cola.json"
    with pytest.raises(KeyboardInterrupt):
        run_tool(*arguments[:-1], target, *FAST, "--seeds", 1, 2, finetune=stop_in_seed_two)
    assert not target.exists()
    run_tool(*arguments[:-1], target, *FAST, "--seeds", 1, 2, finetune=stop_in_seed_two)
    assert made == [1, 2, 2]
    assert json.loads(target.read_text()) == json.loads(output.read_text())


def test_jobs_with_different_seeds_of_one_output_lose_none(result, tmp_path, capsys):
    """While one makes its second seed, another makes a third one and ends; then a killed one has left a seed behind."""
    _, arguments = result
    target = tmp_path / "cola.json"
    first = {"metrics": {"matthews_correlation": 0.5, "accuracy": 0.5}, "best_epoch": 1, "epochs": [], "train_loss": []}

    def call(*seeds):
        run_tool(*arguments[:-1], target, *FAST, "--seeds", *seeds, finetune=other_job_meanwhile)

    def other_job_meanwhile(*args, **kwargs):
        if args[5] == 2:
            call(3)
        return {"seed": args[5], **first}

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


def write_checkpoint(path, tokenizer_path, config_class=OwnConfig):
    """A training checkpoint of a small model none of whose parameters has its initial value; returns the model."""
    tokenizer = load_tokenizer(tokenizer_path)
    config = config_class(
        num_layers=2,
        hidden_size=32,
        num_heads=2,
        intermediate_size=48,
        vocab_size=vocab_size(tokenizer),
        max_position_embeddings=32,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(1)
    model = build_model(config)
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


def test_a_modernbert_becomes_a_classifier(cola_like, tmp_path):
    """With the masked LM's head, as its class has one, and without token types, which its class does not take."""
    own = write_checkpoint(tmp_path / "run" / "step_00000000", cola_like / "model", ModernBertConfig)
    pretrained = Pretrained(tmp_path / "run" / "step_00000000", TASKS["mrpc"])
    model = pretrained.fresh().eval()
    assert type(model) is ModernBertForSequenceClassification
    ids = torch.randint(5, 1000, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model.model(ids).last_hidden_state, own(ids).hidden, atol=1e-4, rtol=1e-4)
    assert torch.equal(model.head.dense.weight, own.head.dense.weight)
    examples = Examples([("the dog barks", "a cat"), ("a cat sat", "no")] * 4, np.array([0, 1] * 4), {})
    encoded = encode(examples, pretrained, 32)
    assert encoded.types is None
    settings = Settings(learning_rate=1e-2, epochs=6, batch_size=4)
    found = finetune(pretrained, TASKS["mrpc"], encoded, [encoded], settings, 1, torch.device("cpu"))
    assert found["metrics"]["accuracy"] == 1.0 and found["train_loss"][-1] < found["train_loss"][0]


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
        (measured,) = (call for call in calls if "eval_trajectory" in call[0])
        assert measured[1:4] == [*map(str, runs), "--treebank"] and "analyze_trajectory" in calls[-1][0]


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


def test_no_network_is_one_line(cola_like, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"--task cola: nyu-mll/glue cannot be read .* give --data, or") as caught:
        run_tool("--model", cola_like / "model", "--task", "cola", "--output", tmp_path / "out.json", "--device", "cpu")
    assert "\n" not in str(caught.value)
