"""Masked LMs of transformers behind the interface of Bert: equal to their own classes, and refused in one line."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from megatron_sas.core.cli import InputError
from megatron_sas.kernels.reference import entries, valid_heads
from megatron_sas.model.bert import Bert
from megatron_sas.model.foreign import load_foreign
from megatron_sas.run.reading import load_state, read_model

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
FEW_TOKENS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2}
KINDS = {
    "Bert": {},
    "Roberta": {"pad_token_id": 1},
    "XLMRoberta": {"pad_token_id": 1},
    "DebertaV2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8},
    "ModernBert": {**FEW_TOKENS, "local_attention": 8, "global_attn_every_n_layers": 2},
    "Electra": {"embedding_size": 16},
    "DistilBert": {"dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 48},
    "Albert": {"embedding_size": 16},
    "ConvBert": {"embedding_size": 32},
    "MPNet": {"pad_token_id": 1},
    "EuroBert": {"num_key_value_heads": 2, **FEW_TOKENS},
    "NomicBert": {"head_dim": 16},
}


def _saved(kind, directory, **options):
    """A model of random weights, larger than initialisation's, in a directory."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **KINDS.get(kind, {}), **options})
    model = getattr(transformers, f"{kind}ForMaskedLM")._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_its_own_class(kind, tmp_path):
    theirs, ours = _saved(kind, tmp_path), load_foreign(tmp_path)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 64, (3, 11), generator=generator)
    seqlens = torch.tensor([11, 1, 7])
    mask = (torch.arange(11) < seqlens[:, None]).long()
    ids = torch.where(mask == 1, ids, theirs.config.pad_token_id or 0)
    heads = torch.randint(-1, 11, (3, 11), generator=generator)
    positions = torch.tensor([0, 10, 11, 22, 28])
    maps = {}
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask, output_attentions=True)
        hidden = theirs.base_model(ids, attention_mask=mask)[0]
        output = ours(
            ids, heads=heads, seqlens=seqlens, masked_positions=positions, attention_observer=maps.__setitem__
        )
        plain = ours(ids, seqlens=seqlens)
        only = ours(ids, seqlens=seqlens, only_at=positions).hidden
    torch.testing.assert_close(output.logits, expected.logits.flatten(0, 1)[positions], rtol=1e-5, atol=1e-5)
    assert plain.hidden.equal(hidden) and plain.logits is None and plain.to_head == ()
    assert output.hidden.equal(hidden.flatten(0, 1)[positions]) and only.equal(output.hidden)
    assert sorted(maps) == list(range(ours.config.num_layers)) and ours.no_maps is None
    for layer, attention in maps.items():
        assert attention.equal(expected.attentions[layer])
        assert attention.shape[1] == ours.config.num_heads
        to_head, to_dependent = entries(attention, valid_heads(heads, seqlens))
        assert output.to_head[layer].equal(to_head) and output.to_dependent[layer].equal(to_dependent)


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "DebertaV2", "ModernBert"])
def test_takes_the_longest_sequence_that_it_names(kind, tmp_path):
    _saved(kind, tmp_path)
    model = load_foreign(tmp_path)
    longest = model.config.max_position_embeddings
    assert longest == (38 if kind == "Roberta" else 40)
    assert torch.isfinite(model(torch.full((1, longest), 7), masked_positions=torch.tensor([0])).logits).all()


def test_bert_is_equal_to_ours(tmp_path):
    """The two ways to read the same directory."""
    _saved("Bert", tmp_path, hidden_dropout_prob=0.1)
    config, state, _ = read_model(tmp_path)
    native = Bert(config).eval()
    load_state(native, state, str(tmp_path))
    foreign = load_foreign(tmp_path)
    ids, heads, positions = torch.randint(5, 64, (2, 20)), torch.randint(-1, 20, (2, 20)), torch.arange(40)
    with torch.no_grad():
        ours, theirs = (model(ids, heads=heads, masked_positions=positions) for model in (native, foreign))
    torch.testing.assert_close(ours.logits[:, :64], theirs.logits, rtol=1e-4, atol=1e-4)
    for layer in range(3):
        torch.testing.assert_close(ours.to_head[layer], theirs.to_head[layer], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(ours.to_dependent[layer], theirs.to_dependent[layer], rtol=1e-4, atol=1e-6)
    assert foreign.config.architecture == "BertForMaskedLM"


@pytest.mark.parametrize(
    ("kind", "reason"), [("FNet", "returns no attention maps"), ("SqueezeBert", "are no probabilities")]
)
def test_models_without_maps_have_logits(kind, reason, tmp_path):
    options = {"embedding_size": 32} if kind == "SqueezeBert" else {}
    theirs, ours = _saved(kind, tmp_path, **options), load_foreign(tmp_path)
    ids = torch.randint(5, 64, (2, 9))
    with torch.no_grad():
        logits = ours(ids, masked_positions=torch.tensor([4, 12])).logits
        torch.testing.assert_close(logits, theirs(ids).logits.flatten(0, 1)[[4, 12]], rtol=1e-5, atol=1e-5)
        with pytest.raises(InputError, match=f"^{kind}ForMaskedLM: .*{reason}; leave out what reads attention"):
            ours(ids, attention_observer=lambda layer, maps: None)
    assert ours.config.num_heads is None and ours.config.num_layers == 3


def _config(directory, **values):
    (directory / "config.json").write_text(json.dumps(values))


def test_what_is_no_masked_encoder_is_refused(tmp_path):
    cases = [
        ({"model_type": "gpt2"}, r"config.json: model_type 'gpt2' has no masked LM in transformers"),
        ({"model_type": "bart"}, r"config.json: model_type 'bart' is a decoder or has one; give an encoder$"),
        ({"model_type": "bert", "is_decoder": True}, "is a decoder or has one"),
        ({"model_type": "nobody's"}, "config.json: transformers cannot read it"),
        ({"model_type": "roberta"}, "transformers cannot load it"),  # no weights
        ({}, "config.json: transformers cannot read it"),
    ]
    for values, message in cases:
        _config(tmp_path, **values)
        with pytest.raises(InputError, match=message) as error:
            load_foreign(tmp_path)
        assert "\n" not in str(error.value)


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    _config(
        tmp_path, model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModelForMaskedLM": "own.OwnForMaskedLM"}
    )
    (tmp_path / "own.py").write_text("raise SystemExit('this was run')\n")
    with pytest.raises(InputError, match=r"config.json: transformers cannot read it \(.*custom code") as error:
        load_foreign(tmp_path)
    assert "\n" not in str(error.value)


def test_weights_must_be_all_there_and_all_used(tmp_path):
    """An encoder without its head would be given a random one."""
    model = _saved("Roberta", tmp_path / "whole")
    model.base_model.save_pretrained(tmp_path / "headless")
    with pytest.raises(InputError, match=r"has no weights for lm_head\..*, so it is no masked LM"):
        load_foreign(tmp_path / "headless")
    state = {**model.state_dict(), "roberta.encoder.layer.7.output.dense.bias": torch.zeros(32)}
    model.save_pretrained(tmp_path / "more", state_dict=state)
    with pytest.raises(InputError, match=r"roberta.encoder.layer.7.output.dense.bias is no part of a RobertaFor"):
        load_foreign(tmp_path / "more")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Funnel", {"block_sizes": [1, 1, 1], "d_model": 32, "n_head": 2, "d_head": 16, "d_inner": 48}),
        ("Perceiver", {"d_model": 32, "num_latents": 8, "d_latents": 32, "num_self_attends_per_block": 1}),
    ],
)
def test_models_of_another_make_are_refused_in_a_line(kind, options, tmp_path):
    config = getattr(transformers, f"{kind}Config")(**{"vocab_size": 64, **options})
    getattr(transformers, f"{kind}ForMaskedLM")(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"a {kind}ForMaskedLM cannot be measured") as error:
        load_foreign(tmp_path)
    assert "\n" not in str(error.value)


def test_a_short_text_does_not_change_the_attention_of_long_ones(tmp_path):
    """BigBird switches to another kind of attention for short texts, and does not switch back."""
    options = {"block_size": 8, "num_random_blocks": 2, "max_position_embeddings": 512, "initializer_range": 0.5}
    torch.manual_seed(0)
    theirs = transformers.BigBirdForMaskedLM(transformers.BigBirdConfig(**{**SIZES, **options})).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_foreign(tmp_path)
    ids, positions = torch.randint(5, 64, (1, 400)), torch.arange(0, 400, 50)
    with torch.no_grad():
        expected = theirs(ids).logits[0, positions]  # first, so with the attention of its configuration
        for _ in range(2):
            torch.testing.assert_close(ours(ids, masked_positions=positions).logits, expected, rtol=1e-4, atol=1e-4)
            ours(ids[:, :9], masked_positions=torch.tensor([1]))


def test_positions_that_are_counted_from_behind_the_padding(tmp_path):
    """Also where they are no `nn.Embedding`."""
    torch.manual_seed(0)
    config = transformers.IBertConfig(**{**SIZES, "max_position_embeddings": 42, "pad_token_id": 1})
    transformers.IBertForMaskedLM(config).save_pretrained(tmp_path)
    model = load_foreign(tmp_path)
    assert model.config.max_position_embeddings == 40
    model(torch.full((1, 40), 7), masked_positions=torch.tensor([0]))
