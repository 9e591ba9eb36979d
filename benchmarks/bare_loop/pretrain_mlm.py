"""The same model, data and objective in a plain loop of PyTorch: what a trainer adds to is measured against this.

    python tools/benchmark_checkouts.py --against benchmarks/bare_loop --config FILE.yaml --updates 10

Windows of micro-batches are made beforehand and used in turn. Nothing is checked, recorded, evaluated or saved.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from megatron_sas.config import load_config
from megatron_sas.data.mlm_dataset import MLMDataset
from megatron_sas.data.packed import PackedData
from megatron_sas.model.architectures import build_model
from megatron_sas.objective.pretraining import MaskedLMWithTerms
from megatron_sas.objective.terms import weights
from megatron_sas.optim import adamw

WINDOWS = 50

config = load_config(sys.argv[sys.argv.index("--config") + 1], sys.argv[sys.argv.index("--config") + 2 :], print)
train, packed = config.train, PackedData(config.data.train)
sizes = {"global_batch_size": train.global_batch_size, "micro_batch_size": train.micro_batch_size}
data = MLMDataset(packed, seed=config.run.seed, mask_prob=config.data.mask_prob, rank=0, world_size=1, **sizes)
torch.manual_seed(config.run.seed)
bert = build_model(config.shape(packed.tokenizer.vocab_size, packed.tokenizer.pad_id))
terms = config.terms(packed.tokenizer.special_ids)
module = MaskedLMWithTerms(bert, terms).train()
optimizer = adamw.build(list(bert.named_parameters()), train, None)
windows = [data.window(step) for step in range(WINDOWS)]
for step in range(train.steps):
    window = windows[step % WINDOWS]
    scales = {name: weight / train.global_batch_size for name, weight in weights(terms, step).items() if weight}
    for batch in window.micro_batches:
        inputs = batch.input_ids, batch.masked_positions, batch.labels, batch.heads if scales else None
        module(*inputs, mlm_scale=1 / window.num_masked, term_scales=scales).loss.backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), train.grad_clip)
    for group in optimizer.param_groups:
        group["lr"] = train.schedule(step)
    optimizer.step()
    optimizer.zero_grad()
