"""Evaluations in a real process group: equal results, and no rank is left waiting in a forward pass."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from synthetic_data import write_packed

from megatron_sas.data.packed import PackedData
from megatron_sas.evaluation.complexity import cls_vectors, intrinsic_dimension
from megatron_sas.evaluation.minimal_pairs import BlimpTask, load_blimp
from megatron_sas.evaluation.text import packed_forwards, packed_text
from megatron_sas.evaluation.treebank import load_treebank
from megatron_sas.evaluation.uas import TreebankTask
from megatron_sas.evaluation.validation import evaluate_validation
from megatron_sas.run.reading import load_model

ROOT = Path(__file__).resolve().parents[2]
BATCH_TOKENS = 400

WORKER = """
import json, sys
import torch, torch.distributed as dist
from megatron_sas.data.packed import PackedData
from megatron_sas.evaluation.minimal_pairs import BlimpTask, load_blimp
from megatron_sas.evaluation.complexity import cls_vectors, intrinsic_dimension
from megatron_sas.evaluation.text import packed_text
from megatron_sas.evaluation.treebank import load_treebank
from megatron_sas.evaluation.uas import TreebankTask
from megatron_sas.evaluation.validation import evaluate_validation
from megatron_sas.run.reading import load_model

rank, ranks, batch_tokens, store, model_path, treebank, blimp, packed, output = sys.argv[1:]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(ranks))
model, tokenizer = load_model(model_path)
forwards = []
# As under ZeRO-3, a forward pass is a collective: a rank that ran more of them than another would wait for ever.
def count(module, arguments):
    forwards.append(1)
    dist.barrier()

model.register_forward_pre_hook(count)
task = TreebankTask(load_treebank(treebank)[:25], tokenizer, 160)
attention = [task.attention_statistics() for _ in range(2)]
syntax = task.evaluate(model, batch_tokens=int(batch_tokens), statistics=attention[0])
pairs = BlimpTask(load_blimp(blimp)[:3], tokenizer, pairs_per_set=2).evaluate(model, batch_tokens=int(batch_tokens))
text = packed_text(PackedData(packed), num_sequences=27, batch_tokens=int(batch_tokens))
dimension = intrinsic_dimension(cls_vectors(model, text, 27))
sizes = {"num_sequences": 27, "batch_tokens": int(batch_tokens), "mask_prob": 0.15}
evaluate_validation(model, PackedData(packed), {}, **sizes, statistics=attention[1])
attention = [statistics.result() for statistics in attention]
with open(f"{output}-{rank}.json", "w") as file:
    json.dump({"syntax": syntax, "sets": pairs["sets"], "dimension": dimension, "attention": attention,
               "forwards": len(forwards)}, file)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(data_dir, model_directory, tmp_path):
    treebank, blimp = data_dir / "ud_ewt" / "en_ewt-ud-test.conllu", data_dir / "blimp"
    packed = write_packed(tmp_path / "packed", sequences=28)
    arguments = [BATCH_TOKENS, tmp_path / "store", model_directory, treebank, blimp, packed, tmp_path / "result"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, *map(str, [rank, 2, *arguments])], env=environment)
        for rank in range(2)
    ]
    try:
        assert [worker.wait(timeout=300) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    results = [json.loads((tmp_path / f"result-{rank}.json").read_text()) for rank in range(2)]
    assert results[0] == results[1]

    model, tokenizer = load_model(model_directory)
    syntax = TreebankTask(load_treebank(treebank)[:25], tokenizer, 160)
    pairs = BlimpTask(load_blimp(blimp)[:3], tokenizer, pairs_per_set=2)
    text = list(packed_text(PackedData(packed), num_sequences=27, batch_tokens=BATCH_TOKENS))
    batches = [len(syntax.batches(BATCH_TOKENS)), len(pairs.pll.batches(BATCH_TOKENS)), len(text)]
    forwards = packed_forwards(PackedData(packed), num_sequences=27, batch_tokens=BATCH_TOKENS)
    assert len(text) == forwards and forwards % 2, "the text should leave a rank without a batch"
    alone = intrinsic_dimension(cls_vectors(model, text, 27))
    assert alone["num_points"] + alone["duplicates"] == 27 and alone["twonn"] is not None
    assert results[0]["dimension"] == pytest.approx(alone, rel=1e-4)
    assert results[0]["forwards"] == sum(-(-number // 2) for number in [*batches, len(text)])
    assert results[0]["sets"] == pairs.evaluate(model, batch_tokens=BATCH_TOKENS)["sets"]
    attention = [syntax.attention_statistics() for _ in range(2)]
    syntax.evaluate(model, batch_tokens=BATCH_TOKENS, statistics=attention[0])
    sizes = {"num_sequences": 27, "batch_tokens": BATCH_TOKENS, "mask_prob": 0.15}
    evaluate_validation(model, PackedData(packed), {}, **sizes, statistics=attention[1])
    for ours, alone in zip(results[0]["attention"], (statistics.result() for statistics in attention), strict=True):
        assert ours["uniform_entropy"] == pytest.approx(alone["uniform_entropy"], rel=1e-12)
        for name in ("entropy", "to_cls", "to_sep"):
            np.testing.assert_allclose(ours[name]["per_head"], alone[name]["per_head"], rtol=1e-4)
    ours, alone = (
        np.array(result["counts"]["correct"])
        for result in (results[0]["syntax"], syntax.evaluate(model, batch_tokens=BATCH_TOKENS))
    )
    assert np.abs(ours - alone).sum() <= 2  # near ties: another number of threads rounds differently
