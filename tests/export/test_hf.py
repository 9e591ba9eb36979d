"""Export to Hugging Face and back, on a checkpoint that was really trained."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from engine_runs import checkpoint, largest_difference, train, weights, write_inputs
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertForMaskedLM,
    BertTokenizer,
    ModernBertForMaskedLM,
    PreTrainedTokenizerFast,
)

from megatron_sas.core.cli import InputError
from megatron_sas.core.manifest import write_manifest
from megatron_sas.data.tokenizer import load_tokenizer, tokenizer_hash, tokenizer_identity
from megatron_sas.export.hf import from_hf, to_hf
from megatron_sas.model.bert import Bert
from megatron_sas.model.config import BertConfig
from megatron_sas.run.reading import FORMAT, VERSION, load_model, read_model, write_model_config, write_weights


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 3 updates with checkpoints 0 and 3."""
    path = tmp_path_factory.mktemp("trained")
    train(write_inputs(path), path / "toy-run", {"train.steps": 3})
    return path / "toy-run"


@pytest.fixture
def exported(run, tmp_path):
    assert to_hf(run, tmp_path / "hf") == checkpoint(run, 3)
    return tmp_path / "hf"


def write_checkpoint(path, tokenizer, **fields):
    """A checkpoint of a random model with large weights, as from_hf would write it."""
    config = BertConfig(2, 32, 4, 64, len(tokenizer), 24, pad_token_id=tokenizer.pad_token_id, initializer_range=0.3)
    torch.manual_seed(0)
    config = replace(config, **fields)
    path.mkdir(parents=True)
    write_model_config(path / "model.json", config)
    write_weights(path / "model.safetensors", Bert(config).state_dict())
    tokenizer.save_pretrained(path / "tokenizer")
    (path / "state.json").write_text('{"step": 0, "tokens": 0, "seconds": 0.0}')
    write_manifest(path, format=FORMAT, version=VERSION, step=0)
    return path


def our_logits(path, ids):
    model, tokenizer = load_model(path)
    with torch.no_grad():
        return model(ids, masked_positions=torch.arange(ids.numel())).logits[:, : len(tokenizer)]


def test_transformers_loads_an_export_completely_and_computes_the_same(run, exported):
    ids = torch.randint(65, (3, 20), generator=torch.Generator().manual_seed(0))
    expected = our_logits(run, ids)
    for loader in (AutoModelForMaskedLM, BertForMaskedLM):
        model, information = loader.from_pretrained(exported, output_loading_info=True)
        assert type(model) is BertForMaskedLM
        assert not any(information.values())
        assert model.dtype == torch.float32
        with torch.no_grad():
            assert torch.allclose(model.eval()(ids).logits.flatten(0, 1), expected, atol=1e-5)
    assert torch.equal(our_logits(exported, ids), expected)


def test_the_tokenizer_comes_along(run, exported):
    text = "w3 w59 nonsense w1"
    original = load_tokenizer(checkpoint(run, 3) / "tokenizer")
    for tokenizer in (AutoTokenizer.from_pretrained(exported), BertTokenizer.from_pretrained(exported)):
        assert tokenizer_hash(tokenizer) == tokenizer_hash(original)
        assert tokenizer(text)["input_ids"] == original(text)["input_ids"]
        assert tokenizer.model_max_length == 32
    assert (exported / "vocab.txt").read_text().split()[:6] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "w0"]
    assert json.loads((exported / "tokenizer_config.json").read_text())["tokenizer_class"] == "BertTokenizer"


def test_a_checkpoint_whose_tokenizer_does_something_else_now_is_refused(exported, tmp_path):
    """As another version of transformers may read it; a checkpoint that says nothing of it is taken as it is."""
    from_hf(exported, tmp_path / "checkpoint")
    state = json.loads((tmp_path / "checkpoint" / "state.json").read_text())
    assert state["tokenizer"] == asdict(tokenizer_identity(load_tokenizer(exported)))
    for digest, allowed in ((state["tokenizer"]["digest"], True), ("0" * 64, False), (None, True)):
        tokenizer = {} if digest is None else {"tokenizer": {**state["tokenizer"], "digest": digest}}
        (tmp_path / "checkpoint" / "state.json").write_text(json.dumps({"step": 0} | tokenizer))
        write_manifest(tmp_path / "checkpoint", format=FORMAT, version=VERSION, step=0)
        if allowed:
            load_model(tmp_path / "checkpoint")
            continue
        message = "tokenizer: does not cut texts as when the checkpoint was written; use the versions"
        for read in (load_model, lambda path: to_hf(path, tmp_path / "again")):
            with pytest.raises(InputError, match=message):
                read(tmp_path / "checkpoint")


def test_tokenizers_that_are_not_wordpiece_get_the_class_that_all_versions_know(tmp_path):
    """transformers 5 would write TokenizersBackend, which 4 does not have."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"▁abcd"]
    backend = Tokenizer(models.Unigram([(piece, -1.0) for piece in vocabulary], unk_id=1, byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    names = {f"{name.strip('[]').lower()}_token": name for name in vocabulary[:5]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    to_hf(write_checkpoint(tmp_path / "checkpoint", tokenizer), tmp_path / "hf")
    assert (
        json.loads((tmp_path / "hf/tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    )
    assert not (tmp_path / "hf" / "vocab.txt").exists()
    loaded = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert loaded("abc da")["input_ids"] == tokenizer("abc da")["input_ids"]
    assert load_model(tmp_path / "hf")[0].config.vocab_size == 10


def test_there_and_back_is_exact(run, exported, tmp_path):
    assert from_hf(exported, tmp_path / "back") == sum(tensor.numel() for tensor in weights(run, 3).values())
    assert largest_difference(load_file(tmp_path / "back/model.safetensors"), weights(run, 3)) == 0.0
    assert read_model(tmp_path / "back")[0] == read_model(run)[0]
    to_hf(tmp_path / "back", tmp_path / "again")
    for name in ("model.safetensors", "config.json", "tokenizer.json", "vocab.txt", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (exported / name).read_bytes()
    model, tokenizer = load_model(tmp_path / "back")
    assert len(tokenizer) == model.config.vocab_size == 65


def test_bf16_is_the_rounded_export(run, exported, tmp_path):
    to_hf(run, tmp_path / "bf16", "bf16")
    whole, rounded = load_file(exported / "model.safetensors"), load_file(tmp_path / "bf16/model.safetensors")
    assert all(torch.equal(rounded[name], tensor.bfloat16()) for name, tensor in whole.items())
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "bf16", dtype="auto").dtype == torch.bfloat16


def test_the_model_card_says_how_the_model_came_about(run, exported, tmp_path):
    card = (exported / "README.md").read_text()
    for fact in (
        "# toy-run, step 3",
        "| updates | 3 |",
        f"| tokens | {3 * 8 * 32} |",
        "| λ | 0.1 in steps 0 to 4, then 0 |",
        "| R | mode max, directions both, reduction sequence |",
        "| seed | 1234 |",
        "| sequences | 24 of 32 tokens |",
        f"torch {torch.__version__}",
        "masked-LM loss on held-out text",
        "global_batch_size: 8",
    ):
        assert fact in card
    loss = float(card.split("masked-LM loss on held-out text | ")[1].split(" ")[0])
    assert loss == pytest.approx(4.2, abs=0.3)
    to_hf(checkpoint(run, 0), tmp_path / "start")
    assert "# toy-run, step 0" in (tmp_path / "start" / "README.md").read_text()
    shutil.copytree(checkpoint(run, 3), tmp_path / "moved")  # a checkpoint without its run has no evaluation
    to_hf(tmp_path / "moved", tmp_path / "moved-hf")
    assert "Evaluation" not in (tmp_path / "moved-hf" / "README.md").read_text()


def refused(function, *arguments, **options) -> str:
    with pytest.raises(InputError) as error:
        function(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_wrong_sources_are_refused_and_leave_nothing(run, exported, tmp_path):
    output = tmp_path / "output"
    (tmp_path / "empty").mkdir()
    assert "no such directory" in refused(to_hf, tmp_path / "none", output)
    assert "neither a training checkpoint nor a run" in refused(to_hf, tmp_path / "empty", output)
    assert "neither a training checkpoint nor a run" in refused(to_hf, exported, output)
    assert "is a training checkpoint or a run already" in refused(from_hf, run, output)
    assert "is a training checkpoint or a run already" in refused(from_hf, checkpoint(run, 3), output)
    assert "neither a Hugging Face model" in refused(from_hf, tmp_path / "empty", output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "hf"]


@pytest.mark.parametrize("name", ["model.safetensors", "model.json", "state.json", "tokenizer/tokenizer.json"])
def test_damaged_checkpoints_are_refused(run, tmp_path, name):
    source = tmp_path / "source"
    for damage, reason in (
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes, not"),
        (lambda path: path.write_bytes(b"?" + path.read_bytes()[1:]), "SHA-256"),
        (lambda path: path.unlink(), "is missing"),
    ):
        shutil.copytree(checkpoint(run, 3), source)
        damage(source / name)
        message = refused(to_hf, source, tmp_path / "hf")
        assert str(source / name) in message
        assert reason in message
        shutil.rmtree(source)
    assert not (tmp_path / "hf").exists()


def test_damaged_hugging_face_directories_are_refused(exported, tmp_path):
    model, config = exported / "model.safetensors", exported / "config.json"
    # Copies: load_file maps the file, which is written over below.
    tensors = {name: tensor.clone() for name, tensor in load_file(model).items()}
    values = json.loads(config.read_text())

    def message(**changes) -> str:
        config.write_text(json.dumps(values | changes))
        return refused(from_hf, exported, tmp_path / "back")

    assert "model_type is 'gpt2'" in message(model_type="gpt2")
    assert "hidden_act is 'relu'" in message(hidden_act="relu")
    assert "missing ['bert.encoder.layer.2" in message(num_hidden_layers=3)
    assert "weights do not fit" in message(hidden_size=64)
    assert f"{config}: hidden_size is '64', not a whole number above 0" in message(hidden_size="64")
    assert "vocab_size is None, not a whole number" in message(vocab_size=None)
    assert "num_hidden_layers is True, not a whole number" in message(num_hidden_layers=True)
    assert "hidden_dropout_prob is 2, not a number from 0 to 1" in message(hidden_dropout_prob=2)
    assert "num_attention_heads is 5, no divisor of hidden_size" in message(num_attention_heads=5)
    assert "pad_token_id is 65, not an id from 0 to 64" in message(pad_token_id=65)
    config.write_text("[]")
    assert "does not hold a JSON object" in refused(from_hf, exported, tmp_path / "back")
    content = model.read_bytes()
    model.write_bytes(content[: len(content) // 2])
    assert f"{model}: is damaged" in message()
    save_file(tensors | {"bert.surprise": torch.zeros(1)}, model)
    assert "unexpected ['bert.surprise']" in message()
    model.unlink()
    (exported / "pytorch_model.bin").write_bytes(b"no pickle")
    assert "pytorch_model.bin: cannot be read" in message()
    (exported / "pytorch_model.bin").unlink()
    (exported / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}')
    assert "model.safetensors.index.json: weight_map does not name the files" in message()
    (exported / "model.safetensors.index.json").unlink()
    assert "neither model.safetensors nor pytorch_model.bin" in message()
    model.write_bytes(content)
    with open(exported / "vocab.txt", "a") as file:
        file.write("more\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (exported / name).unlink()
    assert "its tokenizer has 66 entries but its model only 65" in message()
    assert not (tmp_path / "back").exists()


WORDS, BIAS = "bert.embeddings.word_embeddings.weight", "cls.predictions.bias"
NORM = "bert.embeddings.LayerNorm"


@pytest.mark.parametrize("form", ["model.safetensors", "shards", "pytorch_model.bin"])
def test_no_tensor_that_differs_from_what_is_used_is_dropped(exported, tmp_path, form):
    tensors = {name: tensor.clone() for name, tensor in load_file(exported / "model.safetensors").items()}

    def write(more):
        (exported / "model.safetensors").unlink(missing_ok=True)
        if form == "model.safetensors":
            save_file(tensors | more, exported / form)
        elif form == "pytorch_model.bin":
            torch.save(tensors | more, exported / form)
        else:
            parts = {"a.safetensors": tensors, "b.safetensors": more}
            for name, part in parts.items():
                save_file(part, exported / name)
            files = {name: file for file, part in parts.items() for name in part}
            (exported / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))

    positions = torch.arange(32)[None]
    for more, message in [
        ({"cls.predictions.decoder.bias": tensors[BIAS] + 1}, f"cls.predictions.decoder.bias differs from {BIAS}"),
        (
            {"cls.predictions.decoder.weight": tensors[WORDS] + 1},
            f"cls.predictions.decoder.weight differs from {WORDS}",
        ),
        ({f"{NORM}.gamma": tensors[f"{NORM}.weight"] + 1}, f"{NORM}.weight is there under two names"),
        ({"bert.embeddings.position_ids": positions.flip(1)}, "position_ids is not 0, 1, 2"),
        ({"bert.surprise": positions}, r"unexpected ['bert.surprise']"),
    ]:
        write(more)
        found = refused(from_hf, exported, tmp_path / "back")
        assert str(exported) in found and message in found
    equal = {"cls.predictions.decoder.bias": tensors[BIAS], "cls.predictions.decoder.weight": tensors[WORDS]}
    unused = {"bert.pooler.dense.weight": torch.ones(64, 64), "cls.seq_relationship.bias": torch.ones(2)}
    write(
        {name: tensor.clone() for name, tensor in (equal | unused).items()}
        | {"bert.embeddings.position_ids": positions}
    )
    expected = read_model(exported)[1]
    if form == "model.safetensors":  # under the decoder's name alone it is the bias of both, as for transformers
        tensors["cls.predictions.decoder.bias"] = tensors.pop(BIAS)
        write({})
        assert largest_difference(read_model(exported)[1], expected) == 0.0


def test_shards_that_disagree_and_pickles_of_something_else_are_refused(exported, tmp_path):
    tensors = {name: tensor.clone() for name, tensor in load_file(exported / "model.safetensors").items()}
    (exported / "model.safetensors").unlink()
    save_file(tensors, exported / "a.safetensors")
    save_file({BIAS: tensors[BIAS] + 1, "bert.pooler.dense.bias": torch.ones(64)}, exported / "b.safetensors")
    files = {**dict.fromkeys(tensors, "a.safetensors"), "bert.pooler.dense.bias": "b.safetensors"}
    (exported / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert f"b.safetensors: has another {BIAS} than the files before it" in refused(
        from_hf, exported, tmp_path / "back"
    )
    (exported / "model.safetensors.index.json").unlink()
    torch.save({"state_dict": tensors}, exported / "pytorch_model.bin")
    assert "pytorch_model.bin: does not hold tensors by name" in refused(from_hf, exported, tmp_path / "back")


def test_existing_outputs_are_overwritten_only_on_request_and_if_they_are_models(run, exported, tmp_path):
    assert "exists already" in refused(to_hf, run, exported)
    (exported / "README.md").write_text("old")
    to_hf(run, exported, overwrite=True)
    assert "toy-run" in (exported / "README.md").read_text()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("…")
    for output in (tmp_path / "home", checkpoint(run, 3), tmp_path / "home" / "thesis.tex"):
        assert "is not what this command writes" in refused(to_hf, run, output, overwrite=True)
        assert "is not what this command writes" in refused(from_hf, exported, output, overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "…"
    from_hf(exported, tmp_path / "back")
    assert "exists already" in refused(from_hf, exported, tmp_path / "back")
    from_hf(exported, tmp_path / "back", overwrite=True)


def test_a_modernbert_goes_to_transformers_and_back(tmp_path):
    """Trained, exported, loaded without remote code, and read again tensor for tensor; nothing unknown is dropped."""
    train(write_inputs(tmp_path, "modernbert"), tmp_path / "run", {"train.steps": 2})
    to_hf(tmp_path / "run", tmp_path / "hf")
    model, information = AutoModelForMaskedLM.from_pretrained(
        tmp_path / "hf", output_loading_info=True, trust_remote_code=False
    )
    assert type(model) is ModernBertForMaskedLM
    assert not any(information.values())
    ids = torch.randint(65, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model.eval()(ids).logits.flatten(0, 1)
    torch.testing.assert_close(logits, our_logits(tmp_path / "run", ids), rtol=0, atol=1e-5)
    encoded = AutoTokenizer.from_pretrained(tmp_path / "hf")("w3 w59", return_tensors="pt")
    assert set(encoded) == {"input_ids", "attention_mask"}
    assert torch.isfinite(model(**encoded).logits).all()
    from_hf(tmp_path / "hf", tmp_path / "back")
    before, after = weights(tmp_path / "run", 2), read_model(tmp_path / "back")[1]
    assert largest_difference(before, after) == 0.0
    assert read_model(tmp_path / "back")[0] == read_model(tmp_path / "hf")[0]
    card = (tmp_path / "hf/README.md").read_text()
    assert "A ModernBERT masked language model: 2 layers" in card
    assert "local attention (± 4 tokens) in 1 layers" in card and "embedding 0, attention 0, mlp 0.1" in card
    file = tmp_path / "hf/model.safetensors"
    save_file(load_file(file) | {"model.layers.0.attn.Wqkv.bias": torch.zeros(96)}, file)
    with pytest.raises(InputError, match=r"unexpected \['model.layers.0.attn.Wqkv.bias'\]"):
        from_hf(tmp_path / "hf", tmp_path / "again")
