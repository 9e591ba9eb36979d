"""tools/convert_checkpoint.py: its command line (the conversion itself is tested in tests/export/test_hf.py)."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bert_pairs import tiny_hf_bert
from tool_calls import exit_code
from transformers import AutoModelForMaskedLM, BertTokenizerFast

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_checkpoint.py"


@pytest.fixture
def original(tmp_path):
    """A Hugging Face model that this project did not make."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "dog", "##s", "bark"]
    model = tiny_hf_bert(len(words), num_hidden_layers=1, max_position_embeddings=12)
    model.save_pretrained(tmp_path / "original")
    BertTokenizerFast(vocab={word: number for number, word in enumerate(words)}).save_pretrained(tmp_path / "original")
    return tmp_path / "original"


@pytest.fixture
def tool(capsys):
    """Runs the tool in this process; gives its exit code, stdout and stderr."""

    def run(*arguments):
        return exit_code("convert_checkpoint", *arguments), *capsys.readouterr()

    return run


def test_there_and_back(original, tool, tmp_path):
    code, out, _ = tool("from-hf", original, tmp_path / "checkpoint")
    assert code == 0
    assert f"wrote {tmp_path / 'checkpoint'}: a checkpoint of step 0 with" in out
    code, out, _ = tool("to-hf", tmp_path / "checkpoint", tmp_path / "copy")
    assert code == 0
    assert out == f"wrote {tmp_path / 'copy'} from {tmp_path / 'checkpoint'}\n"
    copy = AutoModelForMaskedLM.from_pretrained(tmp_path / "copy").state_dict()
    state = AutoModelForMaskedLM.from_pretrained(original).state_dict()
    assert state.keys() == copy.keys()
    assert all(torch.equal(tensor, copy[name]) for name, tensor in state.items())

    code, _, error = tool("to-hf", tmp_path / "checkpoint", tmp_path / "copy")
    assert code == 2
    assert error.endswith(f"error: {tmp_path / 'copy'}: exists already; choose another output or pass --overwrite\n")
    assert tool("to-hf", tmp_path / "checkpoint", tmp_path / "copy", "--overwrite", "--dtype", "bf16")[0] == 0
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "copy", dtype="auto").dtype == torch.bfloat16


def test_wrong_use(original, tool, tmp_path):
    code, _, error = tool("to-hf", original, tmp_path / "other")
    assert code == 2
    assert error.startswith(f"error: {original}: neither a training checkpoint nor a run")
    assert error.count("\n") == 1
    assert not (tmp_path / "other").exists()
    assert tool("to-onnx", original, tmp_path / "other")[0] == 2


def test_a_full_disk_is_one_line_and_leaves_nothing(original, tool, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # the weights are larger
    try:
        code, _, error = tool("from-hf", original, tmp_path / "checkpoint")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2
    assert re.search(r"error: \S+/model.safetensors: .*File too large", error)
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


def test_it_runs_from_anywhere_without_installation():
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, TOOL, "--help"], capture_output=True, text=True, cwd="/", env=environment)
    assert done.returncode == 0
    assert "from-hf" in done.stdout
