"""tools/eval_syntax.py and tools/eval_blimp.py as commands in this process, on a small random model."""

from __future__ import annotations

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from bert_pairs import tiny_hf_bert
from tool_calls import exit_code
from transformers import BertTokenizerFast

from megatron_sas.core.cli import InputError
from megatron_sas.core.files import sha256_file
from megatron_sas.evaluation.command_line import check_output
from megatron_sas.evaluation.minimal_pairs import BlimpTask, load_blimp
from megatron_sas.evaluation.treebank import load_treebank
from megatron_sas.evaluation.uas import TreebankTask
from megatron_sas.run.reading import load_model

WORDS = "the a old dog dogs cat cats saw see sees bark barks run runs .".split()  # noqa: SIM905
PAIR = {"field": "morphology", "linguistics_term": "agreement", "UID": "agreement_1"}


@pytest.fixture
def run_tool(capsys):
    """Runs a tool in this process; gives its exit code and what it printed."""

    def run(name, *arguments):
        capsys.readouterr()
        code = exit_code(name, *arguments)
        printed = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=printed.out, stderr=printed.err)

    return run


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model directory, another with another vocabulary, a treebank and a folder of minimal pairs."""
    path = tmp_path_factory.mktemp("inputs")
    for name, words in (("model", WORDS), ("other", WORDS[:-1])):
        vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
        model = tiny_hf_bert(len(vocabulary), max_position_embeddings=12, initializer_range=0.3)
        model.save_pretrained(path / name)
        BertTokenizerFast(vocab=vocabulary).save_pretrained(path / name)
    sentence = {
        "words": ["the", "old", "dog", "saw", "a", "cat", "."],
        "heads": [3, 3, 4, 0, 6, 4, 4],
        "relns": ["det", "amod", "nsubj", "root", "det", "obj:x", "punct"],
    }
    too_long = {"words": ["dog"] * 11, "heads": [0] + [1] * 10, "relns": ["root"] + ["dep"] * 10}
    (path / "treebank.jsonl").write_text("".join(json.dumps(s) + "\n" for s in [sentence] * 60 + [too_long]))
    blanked = {"words": ["_"] * 3, "heads": [2, 0, 2], "relns": ["nsubj", "root", "obj"]}
    with open(path / "treebank.jsonl", "a") as file:
        file.write(json.dumps(blanked) + "\n")
    (path / "blimp").mkdir()
    for number in (1, 2):
        lines = [
            {
                **PAIR,
                "UID": f"agreement_{number}",
                "sentence_good": f"The {a} dogs bark.",
                "sentence_bad": f"The {a} dog bark.",
            }
            for a in ("old", "a", "the")
        ]
        (path / "blimp" / f"{number}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_syntax_writes_the_result_and_prints_the_table(run_tool, inputs, tmp_path):
    output = tmp_path / "syntax.json"
    model, treebank = inputs / "model", inputs / "treebank.jsonl"
    done = run_tool("eval_syntax", "--model", model, "--treebank", treebank, "--output", output, "--device", "cpu")
    assert (done.returncode, done.stderr) == (0, "")
    record = json.loads(output.read_text())
    own_model, tokenizer = load_model(model)
    expected = TreebankTask(load_treebank(treebank), tokenizer, 12).evaluate(own_model)
    assert {key: record[key] for key in expected} == json.loads(json.dumps(expected))
    assert record["model"] == str(model)
    assert record["treebank"] == {"path": str(treebank), "sha256": sha256_file(treebank)}
    assert (record["num_skipped"], record["num_blanked"], record["num_edges"]) == (1, 1, 60 * 5)
    assert "\n1 sentences left out, whose words are blanked (_)\n" in done.stdout
    assert "untrained model" in record["note"]
    assert set(record["versions"]) >= {"megatron_sas", "torch", "transformers"}
    lines = done.stdout.splitlines()
    det = record["relations"]["det"]
    assert next(line.split() for line in lines if line.startswith("det")) == [
        "det",
        "120",
        f"{det['accuracy']:.3f}",
        f"{det['layer']}-{det['head']}",
        det["direction"],
        f"{det['baseline']:.3f}",
        f"({det['baseline_offset']:+d})",
    ]
    assert not any(line.startswith("amod") for line in lines)  # 60 edges: not in the table
    assert any(line.startswith(f"UAS              {record['uas']:.4f}") for line in lines)
    assert record["unknown"]["num_unknown"] == 0 and "0 of 420 pieces of these words are [UNK] (0.00%)" in lines

    arguments = ("--model", model, "--treebank", treebank, "--output", output)
    refused = run_tool("eval_syntax", *arguments)
    assert refused.returncode == 2
    assert refused.stderr == f"error: {output}: exists already; choose another output or pass --overwrite\n"
    beside = run_tool("eval_syntax", *arguments, "--untrained", model, "--overwrite")
    assert beside.returncode == 0, beside.stderr
    assert json.loads(output.read_text())["untrained"]["uas"] == record["uas"]
    assert f"untrained model  {record['uas']:.4f}" in beside.stdout


def test_blimp_writes_the_result_and_prints_the_table(run_tool, inputs, tmp_path):
    output = tmp_path / "blimp.json"
    arguments = ("--model", inputs / "model", "--blimp", inputs / "blimp", "--output", output)
    done = run_tool("eval_blimp", *arguments, "--metric", "within_word_l2r", "--pairs-per-set", 2)
    assert (done.returncode, done.stderr) == (0, "")
    record = json.loads(output.read_text())
    model, tokenizer = load_model(inputs / "model")
    data = load_blimp(inputs / "blimp")
    expected = BlimpTask(data, tokenizer, "within_word_l2r", pairs_per_set=2).evaluate(model)
    timing = {"seconds", "sentences_per_second"}
    assert {key: record[key] for key in expected.keys() - timing} == {
        key: expected[key] for key in expected.keys() - timing
    }
    assert (record["metric"], record["num_pairs"], record["num_masked_copies"]) == ("within_word_l2r", 4, 8 * 5)
    assert record["seconds"] > 0
    assert len(record["data"]["sha256"]) == 64
    assert f"overall {record['blimp']:.4f}" in done.stdout
    assert "sentences/s" in done.stdout
    assert "ties, which count" not in done.stdout
    assert "  agreement " in done.stdout


def test_ties_are_printed_with_a_warning_and_recorded_per_set(run_tool, inputs, tmp_path):
    shutil.copytree(inputs / "blimp", tmp_path / "blimp")
    line = {**PAIR, "UID": "same", "sentence_good": "The dog barks.", "sentence_bad": "The dog barks."}
    (tmp_path / "blimp" / "same.jsonl").write_text(json.dumps(line) + "\n")
    arguments = ("--model", inputs / "model", "--blimp", tmp_path / "blimp", "--output", tmp_path / "out.json")
    done = run_tool("eval_blimp", *arguments)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out.json").read_text())
    assert {uid: (row["ties"], row["identical"]) for uid, row in record["sets"].items()} == {
        "agreement_1": (0, 0),
        "agreement_2": (0, 0),
        "same": (1, 1),
    }
    assert "warning: 1 ties, which count as wrong; 1 pairs of identical sentences" in done.stdout


def test_bf16_is_close_and_recorded(run_tool, inputs, tmp_path):
    sentences = load_blimp(inputs / "blimp")
    model, tokenizer = load_model(inputs / "model", torch.device("cpu"))
    exact = BlimpTask(sentences, tokenizer).evaluate(model)
    done = run_tool(
        "eval_blimp", "--model", inputs / "model", "--blimp", inputs / "blimp", "--output", tmp_path / "out.json",
        "--precision", "bf16",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["precision"] == "bf16"
    assert result["blimp"] == pytest.approx(exact["blimp"], abs=0.1)


def test_outputs_that_cannot_be_written_are_refused_before_any_work(tmp_path):
    (tmp_path / "file").touch()
    for path, message in [
        (tmp_path, f"{tmp_path}: is a directory; --output names the file to write"),
        (tmp_path / "file" / "more" / "a.json", f"a.json: cannot be written in {tmp_path / 'file'} (Not a directory)"),
    ]:
        with pytest.raises(InputError, match=re.escape(message)):
            check_output(path, overwrite=True)
    check_output(tmp_path / "new" / "a.json", overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_bad_input_is_one_line_and_leaves_nothing(run_tool, inputs, tmp_path):
    output = tmp_path / "out" / "result.json"
    syntax = {"--model": inputs / "model", "--treebank": inputs / "treebank.jsonl", "--output": output}
    blimp = {"--model": inputs / "model", "--blimp": inputs / "blimp", "--output": output}
    shutil.copytree(inputs / "model", tmp_path / "wordless")
    (tmp_path / "wordless" / "tokenizer.json").unlink()
    for tool, good, change, message in [
        ("eval_blimp", blimp, {"--model": tmp_path / "wordless"}, "no word is among the tokenizer's 5 entries"),
        ("eval_syntax", syntax, {"--model": tmp_path / "none"}, "none: no such directory"),
        ("eval_syntax", syntax, {"--untrained": inputs / "other"}, "other: tokenizer or maximum length differs"),
        (
            "eval_syntax",
            syntax,
            {"--model": tmp_path / "missing", "--output": tmp_path},
            f"{tmp_path}: is a directory",
        ),
        ("eval_syntax", syntax, {"--device": "cuda:99"}, "--device: 'cuda:99' is not available here"),
        ("eval_blimp", blimp, {"--blimp": tmp_path}, "no .jsonl files in it"),
        ("eval_blimp", blimp, {"--pairs-per-set": 0}, "pairs_per_set: 0 is below 1"),
    ]:
        arguments = [item for pair in {**good, **change}.items() for item in pair]
        done = run_tool(tool, *arguments)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("error: ")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
        assert not output.parent.exists()
