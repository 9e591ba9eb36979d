"""What every evaluation says of a model, alone or as one process of a group.

A rank of a group calls `main` (see fork_server.py) with STORE OUTPUT MODEL TREEBANK BLIMP PACKED, which writes
OUTPUT-RANK.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from megatron_sas.data.packed import PackedData
from megatron_sas.evaluation.base import Resources
from megatron_sas.evaluation.complexity import cls_vectors, intrinsic_dimension
from megatron_sas.evaluation.minimal_pairs import BlimpTask, load_blimp
from megatron_sas.evaluation.text import packed_text
from megatron_sas.evaluation.treebank import load_treebank
from megatron_sas.evaluation.uas import TreebankTask
from megatron_sas.evaluation.validation import ValidationEvaluation
from megatron_sas.run.reading import load_model

BATCH_TOKENS = 400
SEQUENCES = 27


def evaluate(model_path: str, treebank: str, blimp: str, packed: str) -> dict[str, Any]:
    """Results, the number of batches there are of each input, and of forward passes that this process made.

    Under a group a forward pass is a collective, as under ZeRO-3: a rank that ran more of them would wait for ever.
    """
    model, tokenizer = load_model(model_path)
    forwards = []

    def count(*_):
        forwards.append(1)
        if dist.is_initialized():
            dist.barrier()

    model.register_forward_pre_hook(count)
    text = PackedData(packed)
    task, pairs = (
        TreebankTask(load_treebank(treebank)[:25], tokenizer, 160),
        BlimpTask(load_blimp(blimp)[:3], tokenizer, pairs_per_set=2),
    )
    statistics = task.attention_statistics()
    section = SimpleNamespace(validation_sequences=SEQUENCES, batch_tokens=BATCH_TOKENS)
    validation = ValidationEvaluation(section, Resources(tokenizer, text, 160, mask_prob=0.15))
    batches = packed_text(text, num_sequences=SEQUENCES, batch_tokens=BATCH_TOKENS)
    return {
        "syntax": task.evaluate(model, batch_tokens=BATCH_TOKENS, observers=[statistics]),
        "sets": pairs.evaluate(model, batch_tokens=BATCH_TOKENS)["sets"],
        "dimension": intrinsic_dimension(cls_vectors(model, batches, SEQUENCES)),
        "validation": validation.run(model),
        "attention": statistics.result(),
        "batches": [len(task.batches(BATCH_TOKENS)), len(pairs.pll.batches(BATCH_TOKENS))],
        "forwards": len(forwards),
    }


def main() -> None:
    """Evaluate as one rank."""
    store, output, *inputs = sys.argv[1:]
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    Path(f"{output}-{rank}.json").write_text(json.dumps(evaluate(*inputs)))
    dist.destroy_process_group()
