"""The objective against the paper's formulation on transformers' attention maps, and its reductions."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from bert_pairs import hf_gradients, hf_twin
from torch import Tensor
from transformers import BertForMaskedLM

from megatron_sas.model.architectures import build_model
from megatron_sas.model.bert import Bert
from megatron_sas.model.config import BertConfig
from megatron_sas.model.modernbert import ModernBertConfig
from megatron_sas.objective.base import Batch
from megatron_sas.objective.pretraining import MaskedLMWithTerms, mlm_loss_sum
from megatron_sas.objective.sas import SasSection, SasTerm
from megatron_sas.objective.terms import TERMS, Needs, make_terms

CONFIG = BertConfig(
    num_layers=2,
    hidden_size=64,
    num_heads=4,
    intermediate_size=128,
    vocab_size=211,
    max_position_embeddings=512,
    hidden_dropout=0.0,
    attention_dropout=0.0,
)


def make_model(config: BertConfig = CONFIG, **objective) -> MaskedLMWithTerms:
    torch.manual_seed(0)
    bert = Bert(config)
    with torch.no_grad():
        for name, parameter in bert.named_parameters():
            parameter += torch.randn_like(parameter) * (0.2 if "qkv.weight" in name else 0.02)
        bert.embeddings.word.weight[config.vocab_size :] = 0
        bert.head.bias[config.vocab_size :] = 0
    return MaskedLMWithTerms(bert, {"sas": SasTerm(SasSection(**objective))})


def make_batch(batch: int, seq: int, seed: int = 1) -> dict[str, Tensor]:
    """Masked tokens, and heads in all sequences but the first."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, CONFIG.vocab_size, (batch, seq), generator=generator)
    masked = torch.rand(batch, seq, generator=generator) < 0.15
    masked[:, 1] = True
    heads = torch.arange(seq) + torch.randint(-4, 5, (batch, seq), generator=generator)
    heads = torch.where((heads >= 0) & (heads < seq) & (torch.rand(batch, seq, generator=generator) < 0.7), heads, -1)
    if batch > 1:
        heads[0] = -1
    return {
        "input_ids": torch.where(masked, 4, ids),
        "masked_positions": masked.flatten().nonzero().squeeze(1),
        "labels": ids[masked],
        "heads": heads,
    }


def gradients(module: MaskedLMWithTerms) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in module.bert.named_parameters()}


def paper_loss(twin: BertForMaskedLM, batch: dict[str, Tensor], sas_weight: float, mode: str) -> Tensor:
    """MLM + λR as the paper's code has it: every attention map of every layer, one edge after another."""
    labels = torch.full_like(batch["input_ids"], -100)
    labels.view(-1)[batch["masked_positions"]] = batch["labels"]
    output = twin(batch["input_ids"], labels=labels, output_attentions=True)
    maps = torch.stack(output.attentions)  # (L, B, H, S, S)
    term = torch.zeros(())
    for b, heads in enumerate(batch["heads"].tolist()):
        for i, j in enumerate(heads):
            if j >= 0:
                for entries in (maps[:, b, :, i, j], maps[:, b, :, j, i]):
                    term = term + (entries.max() if mode == "max" else entries.sum())
    return output.loss + sas_weight * term


@pytest.mark.parametrize(("batch_size", "seq"), [(3, 128), (1, 512)])
@pytest.mark.parametrize("mode", ["max", "uniform"])
def test_loss_and_gradients_equal_the_papers_way(batch_size, seq, mode):
    module, batch = make_model(mode=mode, reduction="sum"), make_batch(batch_size, seq)
    twin = hf_twin(module.bert)
    parts = module(**batch, mlm_scale=1 / len(batch["labels"]), term_scales={"sas": 0.01})
    parts.loss.backward()
    expected = paper_loss(twin, batch, 0.01, mode)
    expected.backward()
    torch.testing.assert_close(parts.loss, expected, rtol=1e-5, atol=1e-5)
    theirs = hf_gradients(twin, module.bert)
    for name, ours in gradients(module).items():
        assert (ours - theirs[name]).norm() <= 1e-4 * theirs[name].norm() + 1e-8, name


def test_the_term_moves_the_gradient():
    """Otherwise the comparison above would prove little."""
    batch, found = make_batch(3, 128), {}
    for weight in (0.0, 0.01):
        module = make_model()
        module(**batch, mlm_scale=1 / len(batch["labels"]), term_scales={"sas": weight}).loss.backward()
        found[weight] = gradients(module)["layers.0.attention.qkv.weight"]
    assert (found[0.01] - found[0.0]).norm() > 0.1 * found[0.0].norm()


def split(batch: dict[str, Tensor], pieces: int) -> list[dict[str, Tensor]]:
    """The batch cut into micro-batches of equally many sequences."""
    size, seq = len(batch["heads"]) // pieces, batch["heads"].shape[1]
    result = []
    for number in range(pieces):
        first, last = number * size * seq, (number + 1) * size * seq
        inside = (batch["masked_positions"] >= first) & (batch["masked_positions"] < last)
        rows = slice(number * size, (number + 1) * size)
        result.append(
            {
                "input_ids": batch["input_ids"][rows],
                "masked_positions": batch["masked_positions"][inside] - first,
                "labels": batch["labels"][inside],
                "heads": batch["heads"][rows],
            }
        )
    return result


@pytest.mark.parametrize("reduction", ["sequence", "sum"])
def test_reductions_over_micro_batches(reduction):
    """With "sequence" the gradient does not depend on how the batch is cut; with "sum" λ is divided by the cuts."""
    batch, weight = make_batch(4, 40), 0.05
    found = {}
    for pieces in (1, 2, 4):
        module = make_model(reduction=reduction)
        sas_scale = weight * (pieces / 4 if reduction == "sequence" else 1.0)
        sums = torch.zeros(2)
        for micro in split(batch, pieces):
            parts = module(**micro, mlm_scale=pieces / len(batch["labels"]), term_scales={"sas": sas_scale})
            (parts.loss / pieces).backward()  # as DeepSpeed does
            sums += torch.stack([parts.mlm_sum, parts.term_sums["sas"]])
        found[pieces] = (gradients(module), sums)
    for pieces in (2, 4):
        torch.testing.assert_close(found[pieces][1], found[1][1])
        same = all(
            torch.allclose(found[pieces][0][name], found[1][0][name], rtol=1e-3, atol=1e-6) for name in found[1][0]
        )
        assert same == (reduction == "sequence")


def test_reduction_sum_is_sequence_with_another_weight():
    """λ_sequence = λ_paper × micro-batch."""
    batch, found = make_batch(4, 40), []
    for scale in (0.02, 0.08 / 4):  # λ_paper; λ_sequence · W·A/G with W·A = 1
        module = make_model()
        module(**batch, mlm_scale=1.0, term_scales={"sas": scale}).loss.backward()
        found.append(gradients(module))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_measuring_with_weight_zero_changes_no_bit():
    batch, found = make_batch(2, 60), []
    for scales in ({}, {"sas": 0.0}):
        module = make_model()
        parts = module(**batch, mlm_scale=0.01, term_scales=scales)
        parts.loss.backward()
        found.append((parts, gradients(module)))
    (unmeasured, first), (measured, second) = found
    assert unmeasured.term_sums == {}
    assert measured.term_sums["sas"] > 0
    assert not measured.term_sums["sas"].requires_grad
    assert torch.equal(unmeasured.loss, measured.loss)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_unparsed_batch_has_a_zero_term():
    batch = make_batch(2, 30)
    batch["heads"] = torch.full_like(batch["heads"], -1)
    for mode, p in (("max", 1.0), ("uniform", 1.0), ("uniform", 2.0)):
        module = make_model(mode=mode, p=p)
        parts = module(**batch, mlm_scale=0.0, term_scales={"sas": 1.0})
        parts.loss.backward()
        assert parts.term_sums["sas"] == 0
        assert all((g == 0).all() for g in gradients(module).values())


def test_dropout_path_also_trains():
    module = make_model(replace(CONFIG, attention_dropout=0.1, hidden_dropout=0.1))
    module.train()(**make_batch(2, 40), mlm_scale=0.01, term_scales={"sas": 0.01}).loss.backward()
    assert all(torch.isfinite(g).all() for g in gradients(module).values())


def test_mlm_loss_ignores_padded_columns():
    logits = torch.randn(7, 20)
    padded = F.pad(logits, (0, 12), value=float("-inf")).requires_grad_()
    labels = torch.randint(0, 20, (7,))
    loss = mlm_loss_sum(padded, labels)
    loss.backward()
    torch.testing.assert_close(loss, -logits.log_softmax(-1)[torch.arange(7), labels].sum())
    assert (padded.grad[:, 20:] == 0).all()
    assert mlm_loss_sum(logits[:0], labels[:0]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "size"), [((1, 1), 1.0), ((309, 4099), 1.0), ((67, 9001), 30.0), ((5, 300_001), 1.0)]
)
def test_mlm_loss_and_its_gradient(dtype, shape, size):
    """Against float64, over several parts of the rows, with some that do not count; the gradient is rounded once."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    logits = (size * torch.randn(shape)).to(dtype).double().requires_grad_()
    labels = torch.randint(0, shape[1], shape[:1])
    labels[1::3] = -100
    expected = F.cross_entropy(logits, labels, reduction="sum")
    (expected * 0.37).backward()
    tested = logits.detach().to(device, dtype).requires_grad_()
    loss = mlm_loss_sum(tested.view(shape), labels.to(device))
    assert loss.dtype == torch.float32
    (loss * 0.37).backward()
    torch.testing.assert_close(loss.double().cpu(), expected, rtol=1e-6, atol=1e-5)
    rtol = {torch.float32: 3e-6 * max(1.0, size), torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(tested.grad.double().cpu(), logits.grad, rtol=rtol, atol=3e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mlm_loss_adds_a_bias(dtype):
    """One that takes columns of the padded vocabulary away, too; its own gradient is right."""
    torch.manual_seed(0)
    logits = torch.randn(70, 9000).to(dtype).double().requires_grad_()
    bias = torch.randn(9000).index_fill(0, torch.arange(8990, 9000), float("-inf")).double().requires_grad_()
    labels = torch.randint(0, 8990, (70,))
    labels[::4] = -100
    expected = F.cross_entropy(logits + bias, labels, reduction="sum")
    expected.backward()
    tested = [x.detach().to(kind, copy=True).requires_grad_() for x, kind in ((logits, dtype), (bias, torch.float32))]
    loss = mlm_loss_sum(tested[0] * 1.0, labels, tested[1])
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-5)
    rtol = {torch.float32: 3e-5, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(tested[0].grad.double(), logits.grad, rtol=rtol, atol=1e-6)
    torch.testing.assert_close(tested[1].grad.double(), bias.grad, rtol=3e-5, atol=1e-6)


def test_mlm_loss_is_differentiated_once():
    logits = torch.randn(4, 9, requires_grad=True) * 2.0
    loss = mlm_loss_sum(logits, torch.tensor([3, -100, 5, 8]))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_labels_outside_of_the_vocabulary_are_refused():
    for label in (-1, 9):
        with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
            mlm_loss_sum(torch.randn(2, 9), torch.tensor([3, label]))


SMALL = {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "vocab_size": 70}
CONFIGS = [
    BertConfig(**SMALL, hidden_dropout=0.0, attention_dropout=0.0),
    ModernBertConfig(**SMALL | {"num_layers": 3}, pad_token_id=0, global_attn_every_n_layers=2, local_attention=8),
]


def test_the_word_embedding_has_one_dense_gradient():
    """Of tokens and head together, equal to that of a lookup with a dense one; over two backwards."""
    gradients_, batch = [], make_batch(3, 20)
    for dense in (True, False):
        module = make_model()
        word = module.bert.embeddings.word
        if dense:
            word.forward = lambda ids, word=word: F.embedding(ids, word.weight, word.padding_idx)
        for _ in range(2):
            module(**batch, mlm_scale=1.0, term_scales={}).loss.backward()
        gradients_.append(word.weight.grad)
    assert all(gradient.layout == torch.strided for gradient in gradients_)
    torch.testing.assert_close(*gradients_)


@pytest.mark.parametrize("config", CONFIGS, ids=["bert", "modernbert"])
@pytest.mark.parametrize("masked", [5, 0, 40], ids=["some", "none", "all"])
def test_loss_and_terms_are_those_of_the_full_last_layer(config, masked):
    """With several sets of edges, one of which ends at the last token, and a term that reads queries and keys."""
    torch.manual_seed(0)
    sections = {name: term.section_class(schedule=0.1) for name, term in TERMS.items()}
    module = MaskedLMWithTerms(build_model(config), make_terms(sections, (0, 2, 3)))
    ids, positions = torch.randint(4, 70, (2, 20)), torch.randperm(40)[:masked].sort().values
    batch = Batch(ids, positions, torch.randint(5, 70, (masked,)), torch.randint(-1, 20, (2, 20)))
    batch.heads[0, 1], bert = 19, module.bert
    scales = {"sas": 0.3, "offset": -0.2, "entropy": 0.1}
    loss = module(*vars(batch).values(), mlm_scale=0.5, term_scales=scales).loss
    loss.backward()
    found = [parameter.grad for parameter in bert.parameters()]
    bert.zero_grad()
    needs = Needs(module.terms, batch)
    output = bert(ids, **needs.arguments)
    expected = 0.5 * mlm_loss_sum(bert.logits(output.hidden.flatten(0, 1)[positions]), batch.labels)
    for name, scale in scales.items():
        expected = expected + scale * module.terms[name](needs.output_for(name, output), batch).sum()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, [parameter.grad.to_dense() for parameter in bert.parameters()])


@pytest.mark.parametrize("sas_scale", [0.0, 0.3])
@pytest.mark.parametrize("config", CONFIGS, ids=["bert", "modernbert"])
def test_compiled_parts_compute_the_same(sas_scale, config, monkeypatch):
    """Through the same tracing as on a GPU; only the generated code differs."""
    compiler = functools.partial(torch.compile, backend="aot_eager")
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        module = MaskedLMWithTerms(build_model(config), {"sas": SasTerm(SasSection())})
        names = list(module.state_dict())
        if compiled:
            with monkeypatch.context() as patch:
                patch.setattr(torch, "compile", compiler)
                module.compile_parts()
        assert list(module.state_dict()) == names
        ids, heads = torch.randint(5, 70, (2, 20)), torch.randint(-1, 20, (2, 20))
        positions = torch.tensor([1, 4, 25, 0, 0])
        labels = torch.tensor([7, 9, 11, -100, -100])  # filled up
        parts = module(ids, positions, labels, heads, mlm_scale=1 / 3, term_scales={"sas": sas_scale})
        parts.loss.backward()
        found = [p.grad for p in module.parameters() if p.grad is not None]
        results.append((parts.loss, parts.term_sums["sas"], *found))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_filled_up_positions_do_not_count():
    logits = torch.randn(4, 9)
    full = mlm_loss_sum(logits, torch.tensor([3, -100, 5, -100]))
    assert full == mlm_loss_sum(logits[[0, 2]], torch.tensor([3, 5]))
