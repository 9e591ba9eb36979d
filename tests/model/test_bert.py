"""BERT equals transformers' BertForMaskedLM: outputs, gradients, initialisation, and the exchange of weights."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from bert_pairs import SMALL, hf_gradients, hf_twin, perturbed_bert, random_ids
from transformers import BertConfig as HFConfig
from transformers import BertForMaskedLM

from megatron_sas.core.cli import InputError
from megatron_sas.model.bert import Bert
from megatron_sas.model.config import SIZES, BertConfig
from megatron_sas.model.huggingface import from_hf_config, from_hf_state, to_hf_config, to_hf_state
from megatron_sas.run.reading import load_model

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(SMALL.vocab_size - 5))]


@pytest.mark.parametrize("backend", ["auto", "reference", "chunked"])
def test_logits_and_hidden_states_equal_transformers_layer_by_layer(backend):
    config = replace(SMALL, attention_backend=backend)
    model = perturbed_bert(config).eval()
    ids = random_ids(config, 3, 50)
    layers = []
    for layer in model.layers:
        layer.register_forward_hook(lambda _m, _i, output: layers.append(output[0]))
    with torch.no_grad():
        hidden = model(ids).hidden
        assert hidden is layers[-1]
        output = model(ids, masked_positions=torch.arange(ids.numel()))
        del layers[config.num_layers :]
        expected = hf_twin(model).eval()(ids, output_hidden_states=True)
    assert len(layers) == len(expected.hidden_states) - 1 == config.num_layers
    for ours, theirs in zip(layers, expected.hidden_states[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    logits = output.logits[:, : config.vocab_size]
    torch.testing.assert_close(logits, expected.logits.flatten(0, 1), rtol=0, atol=1e-4)
    assert (output.logits[:, config.vocab_size :] == float("-inf")).all()
    torch.testing.assert_close(output.hidden, hidden.flatten(0, 1))


def test_bert_base_equals_transformers():
    """The real size once: 12 layers of width 768, BERT's own vocabulary."""
    config = replace(BertConfig(), hidden_dropout=0.0, attention_dropout=0.0)
    torch.manual_seed(1)
    model = Bert(config).eval()
    ids = random_ids(config, 1, 40)
    with torch.no_grad():
        ours = model(ids, masked_positions=torch.arange(40)).logits[:, : config.vocab_size]
        theirs = hf_twin(model).eval()(ids).logits[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_valid_lengths_equal_transformers_attention_mask():
    model = perturbed_bert(SMALL).eval()
    ids, seqlens = random_ids(SMALL, 3, 20), torch.tensor([20, 7, 1])
    mask = torch.arange(20) < seqlens[:, None]
    with torch.no_grad():
        ours = model(ids, seqlens=seqlens).hidden
        theirs = hf_twin(model).eval().bert(ids, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(ours[mask], theirs[mask], rtol=1e-4, atol=1e-4)
    assert torch.isfinite(ours).all()


def test_loss_and_parameter_gradients_equal_transformers():
    model = perturbed_bert(SMALL)
    twin = hf_twin(model)
    ids = random_ids(SMALL, 4, 30)
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


def test_head_at_masked_positions_equals_the_full_head():
    model = perturbed_bert(SMALL).eval()
    ids = random_ids(SMALL, 2, 16)
    everything = model(ids, masked_positions=torch.arange(32)).logits
    some = torch.tensor([0, 5, 17, 31])
    torch.testing.assert_close(model(ids, masked_positions=some).logits, everything[some])
    assert model(ids, masked_positions=torch.zeros(0, dtype=torch.int64)).logits.shape == (0, SMALL.padded_vocab_size)
    assert model(ids).logits is None


def test_edge_probabilities_and_observed_maps_equal_transformers_eager_maps():
    model = perturbed_bert(SMALL).eval()
    ids = random_ids(SMALL, 3, 25)
    heads = torch.randint(-1, 25, (3, 25), generator=torch.Generator().manual_seed(3))
    seen = {}
    with torch.no_grad():
        output = model(ids, heads=heads, attention_observer=lambda layer, probs: seen.update({layer: probs}))
        expected = hf_twin(model).eval()(ids, output_attentions=True).attentions
    assert list(seen) == list(range(SMALL.num_layers))
    assert len(output.to_head) == len(output.to_dependent) == SMALL.num_layers
    for layer, maps in enumerate(expected):
        torch.testing.assert_close(seen[layer], maps, rtol=1e-4, atol=1e-5)
        for b in range(3):
            for i in range(25):
                j = int(heads[b, i])
                to_head, to_dependent = output.to_head[layer][b, :, i], output.to_dependent[layer][b, :, i]
                torch.testing.assert_close(to_head, maps[b, :, i, j] * (j >= 0), rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(to_dependent, maps[b, :, j, i] * (j >= 0), rtol=1e-4, atol=1e-5)
    assert model(ids).to_head == ()


def test_initialisation_equals_transformers():
    """Every kind of parameter has the same mean and spread; what transformers sets to 0 or 1 is 0 or 1 here."""
    config = replace(SMALL, hidden_size=256, intermediate_size=512, vocab_size=1000)
    torch.manual_seed(0)
    model = Bert(config)
    theirs = from_hf_state(BertForMaskedLM(HFConfig(**to_hf_config(config))).state_dict(), config)
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
    assert (model.embeddings.word.weight[config.pad_token_id] == 0).all()
    assert (model.embeddings.word.weight[1000:] == 0).all()
    assert model.embeddings.word.weight.shape[0] == config.padded_vocab_size == 1024


def test_round_trip_is_exact():
    model = perturbed_bert(SMALL)
    state = model.state_dict()
    there = to_hf_state(state, SMALL)
    assert there["bert.embeddings.word_embeddings.weight"].shape == (101, 48)
    back = from_hf_state(there, SMALL)
    assert set(back) == set(state)
    assert all(torch.equal(back[name], state[name]) for name in state)
    twin_state = hf_twin(model).state_dict()  # with the tied decoder
    again = to_hf_state(from_hf_state(twin_state, SMALL), SMALL)
    assert all(torch.equal(again[name], twin_state[name]) for name in again)
    old_names = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in there.items()
    }
    assert all(torch.equal(from_hf_state(old_names, SMALL)[name], state[name]) for name in state)


@pytest.mark.parametrize("size", SIZES)
def test_config_round_trip_and_parameter_count(size):
    config = BertConfig(**SIZES[size], hidden_dropout=0.2, attention_dropout=0.05, max_position_embeddings=128)
    assert from_hf_config(json.loads(json.dumps(to_hf_config(config))), "config.json") == config
    with torch.device("meta"):
        ours, theirs = Bert(config), BertForMaskedLM(HFConfig(**to_hf_config(config)))
    padding = (config.padded_vocab_size - config.vocab_size) * (config.hidden_size + 1)
    assert sum(p.numel() for p in ours.parameters()) - padding == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "roberta"}, "model_type is 'roberta'"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; only 'gelu'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"is_decoder": True}, "is_decoder"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
    ],
)
def test_other_architectures_are_refused(change, message):
    with pytest.raises(InputError, match=message) as error:
        from_hf_config(to_hf_config(SMALL) | change, "dir/config.json")
    assert str(error.value).startswith("dir/config.json: ")


def test_other_weights_are_refused():
    state = to_hf_state(perturbed_bert(SMALL).state_dict(), SMALL)
    with pytest.raises(InputError, match=r"missing \['bert.encoder.layer.3"):
        from_hf_state(state, replace(SMALL, num_layers=4))
    with pytest.raises(InputError, match=r"unexpected \['classifier.weight'\]"):
        from_hf_state(state | {"classifier.weight": torch.zeros(2)}, SMALL)
    with pytest.raises(InputError, match=r"decoder\.weight differs from bert.*models tie them"):
        from_hf_state(state | {"cls.predictions.decoder.weight": torch.zeros(101, 48)}, SMALL)


def test_dropout_only_in_training():
    config = replace(SMALL, hidden_dropout=0.2, attention_dropout=0.3)
    model = perturbed_bert(config)
    ids = random_ids(config, 2, 12)
    assert torch.equal(model.eval()(ids).hidden, model(ids).hidden)
    assert not torch.equal(model.train()(ids).hidden, model(ids).hidden)


@pytest.mark.parametrize("safe", [True, False])
def test_load_model_from_a_directory_saved_by_transformers(tmp_path, safe):
    config = replace(SMALL, hidden_dropout=0.1)
    model = perturbed_bert(config).eval()
    twin = hf_twin(model)
    if safe:
        twin.save_pretrained(tmp_path)
    else:
        twin.config.save_pretrained(tmp_path)
        torch.save(twin.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    loaded, tokenizer = load_model(tmp_path)
    assert not loaded.training
    assert loaded.config == config
    assert len(tokenizer) == 101
    ids = random_ids(config, 2, 12)
    assert torch.equal(loaded(ids).hidden, model(ids).hidden)
    assert load_model(tmp_path, dtype=torch.bfloat16)[0].head.bias.dtype == torch.bfloat16


def test_load_model_refuses_what_does_not_fit(tmp_path):
    with pytest.raises(InputError, match="no such directory"):
        load_model(tmp_path / "absent")
    with pytest.raises(InputError, match=r"neither a Hugging Face model \(config.json\) nor a checkpoint"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(SMALL)))
    with pytest.raises(InputError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(InputError, match=r"model\.safetensors"):
        load_model(tmp_path)
    hf_twin(perturbed_bert(SMALL)).save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join([*WORDS, "one", "two"]) + "\n")
    with pytest.raises(InputError, match="tokenizer has 103 entries but the model only 101"):
        load_model(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"intermediate_size": 95}))
    with pytest.raises(InputError, match="weights do not fit the configured model"):
        load_model(tmp_path)


def test_a_backend_that_was_chosen_for_training_elsewhere_does_not_bind_evaluations():
    """As of a checkpoint from a GPU, or with padding that the chosen kernel lacks."""
    torch.manual_seed(0)
    ours, ids = Bert(SMALL), random_ids(SMALL, 2, 9)
    elsewhere = Bert(replace(SMALL, attention_backend="cudnn"))
    elsewhere.load_state_dict(ours.state_dict())
    seqlens = torch.tensor([9, 4])
    with torch.no_grad():
        assert elsewhere.eval()(ids, seqlens=seqlens).hidden.equal(ours.eval()(ids, seqlens=seqlens).hidden)
    with pytest.raises(ValueError, match="cuDNN's flash kernel needs a GPU"):
        elsewhere.train()(ids)
