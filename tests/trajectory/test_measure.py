"""What is measured on a model of a trajectory: what the single evaluations say, in one pass over each input."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from measured_run import STEPS, measure
from transformers import BertForMaskedLM

from megatron_sas.core.cli import InputError
from megatron_sas.data.packed import PackedData
from megatron_sas.evaluation.complexity import weight_norm
from megatron_sas.evaluation.minimal_pairs import BlimpTask, load_blimp
from megatron_sas.evaluation.treebank import load_treebank
from megatron_sas.evaluation.uas import TreebankTask
from megatron_sas.run.reading import load_model
from megatron_sas.run.records import read_records
from megatron_sas.trajectory.measure import Inputs, TrajectoryTask
from megatron_sas.trajectory.models import list_models
from megatron_sas.trajectory.points import read_items, read_point, read_points

pytestmark = pytest.mark.usefixtures("one_thread")


def test_points_hold_what_the_single_evaluations_say(small_run, measured_run):
    points = read_points(measured_run)
    assert [point["step"] for point in points] == STEPS
    live = {
        line["step"]: line for line in read_records(small_run / "run" / "metrics.jsonl") if line["kind"] == "evaluation"
    }
    for point, (step, path) in zip(points, list_models(small_run / "run"), strict=True):
        model, tokenizer = load_model(path)
        task = TreebankTask(load_treebank(small_run / "treebank.jsonl"), tokenizer, 32)
        expected = json.loads(json.dumps(task.evaluate(model, batch_tokens=200)))
        assert (point["model"], point["uas"]) == (str(path), expected)
        assert (point["uas"]["num_skipped"], point["uas"]["num_blanked"]) == (1, 1)
        blimp = BlimpTask(load_blimp(small_run / "blimp"), tokenizer, max_length=32).evaluate(model, batch_tokens=200)
        assert {name: point["blimp"][name] for name in ("blimp", "fields", "sets")} == {
            name: blimp[name] for name in ("blimp", "fields", "sets")
        }
        assert point["weight_norm"] == weight_norm(model)
        assert point["intrinsic_dimension"]["num_points"] == 10
        assert np.shape(point["attention_entropy"]["per_head"]) == (2, 2)
        if step in live:
            assert live[step]["uas"] == point["uas"]["uas"]
            for name, value in live[step]["treebank_attention"].items():
                measured_value = point[f"attention_{name}"]
                if isinstance(value, dict):
                    assert measured_value["mean"] == pytest.approx(value["mean"], rel=1e-5)
                    assert np.allclose(measured_value["per_head"], value["per_head"], rtol=1e-5)
                else:
                    assert measured_value == pytest.approx(value, rel=1e-12)
            assert point["mlm_loss"] == pytest.approx(live[step]["validation_mlm_loss"], rel=1e-5)
            assert point["weight_norm"] == pytest.approx(live[step]["weight_norm"], rel=1e-7)


def test_sas_of_the_text_is_that_of_the_regularizer(small_run, measured_run):
    packed = PackedData(small_run / "data1")
    model, _ = load_model(dict(list_models(small_run / "run"))[4])
    heads = torch.from_numpy(np.asarray(packed.heads[:10]).astype(np.int64))
    with torch.no_grad():
        output = model(torch.from_numpy(np.asarray(packed.tokens[:10]).astype(np.int64)), heads=heads)
    along = torch.cat(output.to_head, dim=1).amax(dim=1)[heads >= 0]
    point = read_point(measured_run, 4)["text_sas"]
    assert point["num_edges"] == len(along) > 0
    assert point["to_head"] == pytest.approx(float(along.double().mean()), rel=1e-5)


def test_items_add_up_to_the_numbers_and_are_alike_in_all_points(measured_run):
    first = read_items(measured_run, 0)
    for step in STEPS:
        point, items = read_point(measured_run, step), read_items(measured_run, step)
        relations, edges = point["uas"]["counts"]["relations"], items["uas"].edges
        correct = np.stack([items["uas"].correct[edges[:, 1] == r].sum(axis=0) for r in range(len(relations))])
        assert correct.tolist() == point["uas"]["counts"]["correct"]
        assert correct.reshape(len(relations), -1).max(axis=1).sum() / len(edges) == point["uas"]["uas"]
        accuracy = {
            name: items["blimp"].correct[items["blimp"].sets == n].mean() for n, name in enumerate(items["blimp"].names)
        }
        assert accuracy == {name: row["accuracy"] for name, row in point["blimp"]["sets"].items()}
        assert np.mean(list(accuracy.values())) == pytest.approx(point["blimp"]["blimp"], rel=1e-12)
        assert np.array_equal(edges, first["uas"].edges)
        assert np.array_equal(items["blimp"].sets, first["blimp"].sets)
    assert 3 not in first["uas"].edges[:, 0]  # the sentence that is too long
    assert first["uas"].edges[:, 0].max() == 40


def test_text_alone_gives_entropy_and_no_heads(small_run, tmp_path):
    measure(small_run / "run", Inputs.of(text=str(small_run / "data1")), tmp_path / "out")
    point = read_point(tmp_path / "out", 6)
    assert point.keys() == {
        "step", "model", "model_sha256", "seconds", "weight_norm", "attention_entropy", "attention_to_cls",
        "attention_to_sep", "attention_uniform_entropy", "attention_collapsed_heads", "text_sas",
        "text_unknown", "intrinsic_dimension", "mlm_loss",
    }  # fmt: skip
    assert not (tmp_path / "out" / "heads.json").exists()
    assert "uas" not in read_items(tmp_path / "out", 6)
    eager = BertForMaskedLM.from_pretrained(
        small_run / "run" / "snapshots" / "step_00000006", attn_implementation="eager"
    )
    tokens = torch.from_numpy(np.asarray(PackedData(small_run / "data1").tokens[:10]).astype(np.int64))
    with torch.no_grad():
        maps = torch.stack(eager(tokens, output_attentions=True).attentions).double()
    expected = -(maps * maps.log()).sum(dim=-1).mean(dim=(1, 3))
    assert np.allclose(point["attention_entropy"]["per_head"], expected, rtol=1e-6)
    assert np.allclose(point["attention_to_cls"]["per_head"], maps[..., 0].mean(dim=(1, 3)), rtol=1e-6)


def test_settings_identify_inputs_by_their_content(small_run, run_inputs):
    model, tokenizer = load_model(small_run / "run")
    settings = TrajectoryTask(run_inputs, model.config, tokenizer).settings()
    assert settings["treebank"]["sentences"] == 41 and len(settings["treebank"]["sha256"]) == 64
    assert settings["text"]["fingerprint"] == PackedData(small_run / "data1").fingerprint
    assert settings["text"]["sequences"] == 10 and settings["model"]["num_layers"] == 2
    alone = TrajectoryTask(Inputs.of(text=str(small_run / "data1")), model.config, tokenizer).settings()
    assert (alone["treebank"], alone["blimp"]) == (None, None)
    assert alone == {**settings, "treebank": None, "blimp": None}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blimp_metric": "nll"}, r"blimp_metric: input should be 'pll' or 'within_word_l2r', not 'nll'"),
        ({"treebank_sentences": 0}, r"treebank_sentences: input should be greater than or equal to 1, not 0"),
        ({"no_such_setting": 1}, r"no_such_setting: extra inputs are not permitted"),
    ],
)
def test_wrong_settings_are_one_line(settings, message):
    with pytest.raises(InputError, match=message) as error:
        Inputs.of(**settings)
    assert "\n" not in str(error.value)
