"""ModernBERT equals transformers': outputs, gradients, initialisation, and the exchange of weights."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from bert_pairs import SMALL_MODERN, hf_gradients, hf_twin, perturbed_bert, random_ids
from transformers import AutoConfig, ModernBertForMaskedLM
from transformers import ModernBertConfig as HFConfig

from megatron_sas.core.cli import InputError
from megatron_sas.model.architectures import ARCHITECTURES
from megatron_sas.model.huggingface import from_hf_config, from_hf_state, to_hf_config, to_hf_state
from megatron_sas.model.modernbert import SIZES, ModernBert, ModernBertConfig, rotate, rotations
from megatron_sas.run.reading import load_model

GLOBAL = replace(SMALL_MODERN, global_attn_every_n_layers=1)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(SMALL_MODERN.vocab_size - 5))]


@pytest.mark.parametrize("config", [SMALL_MODERN, GLOBAL, replace(SMALL_MODERN, local_attention=2)])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("backend", ["auto", "reference", "chunked"])
@pytest.mark.parametrize("padded", [False, True])
def test_logits_and_hidden_states_equal_transformers_layer_by_layer(config, attention, backend, padded):
    model = perturbed_bert(replace(config, attention_backend=backend)).eval()
    ids, seqlens, layers = random_ids(config, 3, 50), torch.tensor([50, 23, 1]), []
    valid = torch.arange(50) < (seqlens if padded else torch.full((3,), 50))[:, None]
    for layer in model.layers:
        layer.register_forward_hook(lambda _m, _i, output: layers.append(output[0]))
    with torch.no_grad():
        every = torch.arange(ids.numel())
        output = model(ids, masked_positions=every, seqlens=seqlens if padded else None)
        mask = valid.long() if padded else None
        expected = hf_twin(model, attention).eval()(ids, attention_mask=mask, output_hidden_states=True)
    # transformers has the last norm in place of the last layer's output.
    ours = [*layers[:-1], output.hidden.view(3, 50, -1)]
    assert len(ours) == len(expected.hidden_states) - 1 == config.num_layers
    for mine, theirs in zip(ours, expected.hidden_states[1:], strict=True):
        torch.testing.assert_close(mine[valid], theirs[valid], rtol=1e-4, atol=1e-4)
    logits = output.logits[:, : config.vocab_size].view_as(expected.logits)
    torch.testing.assert_close(logits[valid], expected.logits[valid], rtol=0, atol=1e-4)
    assert (output.logits[:, config.vocab_size :] == float("-inf")).all()
    assert torch.isfinite(output.hidden).all()


@pytest.mark.slow
def test_modernbert_base_equals_transformers():
    """The real size once: 22 layers of width 768, windows of 128, and a sequence that they do not span."""
    config = ModernBertConfig(vocab_size=3000, pad_token_id=0)
    torch.manual_seed(1)
    model = ModernBert(config).eval()
    ids = random_ids(config, 1, 200)
    with torch.no_grad():
        ours = model(ids, masked_positions=torch.arange(200)).logits[:, : config.vocab_size]
        theirs = hf_twin(model).eval()(ids).logits[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_loss_and_parameter_gradients_equal_transformers():
    model = perturbed_bert(SMALL_MODERN)
    twin, ids = hf_twin(model), random_ids(SMALL_MODERN, 4, 30)
    masked = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    inputs = torch.where(masked, 4, ids)
    output = model(inputs, masked_positions=masked.flatten().nonzero().squeeze(1))
    loss = F.cross_entropy(output.logits, ids[masked])
    loss.backward()
    expected = twin(inputs, labels=torch.where(masked, ids, -100)).loss
    expected.backward()
    torch.testing.assert_close(loss, expected)
    theirs = hf_gradients(twin, model)
    assert set(theirs) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, theirs[name], rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_edge_probabilities_and_observed_maps_equal_transformers_eager_maps():
    """And are 0 where the window hides an edge."""
    model, ids = perturbed_bert(SMALL_MODERN).eval(), random_ids(SMALL_MODERN, 3, 25)
    heads = torch.randint(-1, 25, (3, 25), generator=torch.Generator().manual_seed(3))
    seen, windows = {}, {}
    with torch.no_grad():
        output = model(
            ids,
            heads=heads,
            attention_observer=lambda layer, probs: seen.update({layer: probs}),
            query_key_observer=lambda layer, q, k, window: windows.update({layer: window}),
        )
        expected = hf_twin(model).eval()(ids, output_attentions=True).attentions
    assert windows == dict(enumerate(SMALL_MODERN.windows)) == {0: None, 1: (5, 5), 2: (5, 5), 3: None}
    has_head, other = heads >= 0, heads.clamp(min=0)[:, None, :, None].expand(-1, 4, -1, 1)
    for layer, maps in enumerate(expected):
        torch.testing.assert_close(seen[layer], maps, rtol=1e-4, atol=1e-5)
        for found, transposed in ((output.to_head[layer], maps), (output.to_dependent[layer], maps.mT)):
            true = transposed.gather(-1, other)[..., 0] * has_head[:, None]
            torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-5)
            assert torch.equal(found == 0, true == 0)
    hidden = has_head & ((torch.arange(25) - heads).abs() > 5)
    assert hidden.any() and (output.to_head[1].transpose(0, 1)[:, hidden] == 0).all()


def test_initialisation_equals_transformers():
    """Every kind of parameter has the same mean, spread and bounds."""
    config = replace(SMALL_MODERN, hidden_size=256, intermediate_size=512, vocab_size=1000)
    torch.manual_seed(0)
    model = ModernBert(config)
    theirs = from_hf_state(ModernBertForMaskedLM(HFConfig(**to_hf_config(config))).state_dict(), config)
    assert set(theirs) == set(model.state_dict())
    for name, ours in model.state_dict().items():
        other = theirs[name]
        assert ours.shape == other.shape
        if float(other.std()) == 0:
            assert torch.equal(ours, other), name
        else:
            count = ours.numel()
            assert float(ours.mean()) == pytest.approx(0, abs=5 * 0.02 / count**0.5), name
            assert float(ours.std()) == pytest.approx(float(other.std()), rel=10 / count**0.5), name
            assert float(ours.abs().max()) == pytest.approx(float(other.abs().max()), rel=0.02), name
    assert (model.embeddings.word.weight[1000:] == 0).all()


def test_rotations_turn_back_and_keep_products_by_distance():
    cos, sin = rotations(9, 8, 100.0, torch.device("cpu"))
    x = torch.randn(2, 9, 8, dtype=torch.float32, requires_grad=True)
    turned = rotate(x, cos, sin)
    torch.testing.assert_close(rotate(turned, cos, -sin), x)
    q, k = rotate(torch.ones(9, 8), cos, sin), rotate(torch.arange(8.0).expand(9, 8), cos, sin)
    products = q @ k.T
    torch.testing.assert_close(products[1:, 1:], products[:-1, :-1])
    turned.square().sum().backward()  # a rotation keeps lengths
    torch.testing.assert_close(x.grad, 2 * x.detach())
    half = rotate(x.bfloat16(), cos, sin)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), turned, rtol=0, atol=0.05)


def test_round_trip_is_exact():
    model = perturbed_bert(SMALL_MODERN)
    state = model.state_dict()
    there = to_hf_state(state, SMALL_MODERN)
    assert there["model.embeddings.tok_embeddings.weight"].shape == (101, 48)
    for given in (there, hf_twin(model).state_dict()):  # the second has the tied decoder
        back = from_hf_state(given, SMALL_MODERN)
        assert set(back) == set(state)
        assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("every", [1, 3, 50])
def test_config_round_trip_and_parameter_count(size, every):
    config = ModernBertConfig(
        **SIZES[size], mlp_dropout=0.2, local_rope_theta=300.0, global_attn_every_n_layers=every, pad_token_id=3
    )
    written = json.loads(json.dumps(to_hf_config(config)))
    assert from_hf_config(written, "config.json") == config
    with torch.device("meta"):
        ours, theirs = ModernBert(config), ModernBertForMaskedLM(HFConfig(**written))
    padding = (config.padded_vocab_size - config.vocab_size) * (config.hidden_size + 1)
    assert sum(p.numel() for p in ours.parameters()) - padding == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize(
    "left_out", ["layer_types", "global_attn_every_n_layers", "rope_parameters", "global_rope_theta"]
)
def test_configurations_of_both_versions_of_transformers_are_read(left_out, tmp_path):
    """transformers 5 writes layer_types and rope_parameters, 4 the numbers that they follow from."""
    config = replace(SMALL_MODERN, global_attn_every_n_layers=2, global_rope_theta=500.0)
    written = to_hf_config(config)
    del written[left_out]
    assert from_hf_config(written, "config.json") == config
    AutoConfig.for_model(**written).save_pretrained(tmp_path)
    assert from_hf_config(json.loads((tmp_path / "config.json").read_text()), "config.json") == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_activation": "silu"}, "hidden_activation is 'silu'; only 'gelu'"),
        ({"norm_bias": True}, "norm_bias is True; only False"),
        ({"decoder_bias": False}, "decoder_bias"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types is not one full_attention in every n layers"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rope_type is 'yarn'"),
        ({"rope_scaling": {"factor": 2}}, "only plain rotations"),
        ({"rope_parameters": None, "local_rope_theta": -1}, "local_rope_theta is -1, not a number above 0"),
        ({"num_attention_heads": 16}, "heads have 3 numbers, and rotations need pairs"),
        ({"num_attention_heads": 5}, "num_attention_heads is 5, no divisor of hidden_size 48"),
        ({"local_attention": 0}, "local_attention is 0, not a whole number above 0"),
    ],
)
def test_what_our_model_does_not_have_is_refused(change, message):
    with pytest.raises(InputError, match=message) as error:
        from_hf_config(to_hf_config(SMALL_MODERN) | change, "dir/config.json")
    assert str(error.value).startswith("dir/config.json: ")
    assert "\n" not in str(error.value)


def test_other_weights_are_refused():
    state = to_hf_state(perturbed_bert(SMALL_MODERN).state_dict(), SMALL_MODERN)
    with pytest.raises(InputError, match=r"ModernBertForMaskedLM with 5 layers: missing \['model.layers.4"):
        from_hf_state(state, replace(SMALL_MODERN, num_layers=5))
    with pytest.raises(InputError, match=r"unexpected \['model.layers.0.attn.Wo.bias'\]"):
        from_hf_state(state | {"model.layers.0.attn.Wo.bias": torch.zeros(48)}, SMALL_MODERN)
    with pytest.raises(InputError, match=r"decoder\.weight differs from model.*models tie them"):
        from_hf_state(state | {"decoder.weight": torch.zeros(101, 48)}, SMALL_MODERN)
    name = "model.layers.2.mlp.Wi.weight"
    with pytest.raises(InputError, match=f"{name} has 79 rows, not two halves of intermediate_size 40"):
        from_hf_state(state | {name: state[name][:79]}, SMALL_MODERN)


@pytest.mark.parametrize("field", ["embedding_dropout", "attention_dropout", "mlp_dropout"])
def test_dropout_only_in_training(field):
    model = perturbed_bert(replace(SMALL_MODERN, **{field: 0.3}))
    ids = random_ids(SMALL_MODERN, 2, 12)
    assert torch.equal(model.eval()(ids).hidden, model(ids).hidden)
    assert not torch.equal(model.train()(ids).hidden, model(ids).hidden)


def test_load_model_from_a_directory_saved_by_transformers(tmp_path):
    model = perturbed_bert(SMALL_MODERN).eval()
    hf_twin(model).save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    loaded, tokenizer = load_model(tmp_path)
    assert loaded.config == SMALL_MODERN
    assert len(tokenizer) == 101
    ids = random_ids(SMALL_MODERN, 2, 12)
    assert torch.equal(loaded(ids).hidden, model(ids).hidden)


def test_every_architecture_has_what_the_others_have():
    """The names that the program asks for, and fields of the configuration that make a model."""
    for name, module in ARCHITECTURES.items():
        section = module.SECTION(architecture=name, size="tiny", max_position_embeddings=32)
        config = section.shape(70, 0)
        assert type(config) is module.CONFIG and config.architecture == name
        assert set(section.SIZES) == set(ARCHITECTURES["bert"].SECTION.SIZES)
        assert len(config.windows) == config.num_layers
        model = module.MODEL(config)
        assert {parameter.split(".")[0] for parameter in model.state_dict()} >= {"embeddings", "layers", "head"}
        assert to_hf_config(config)["model_type"] == name
