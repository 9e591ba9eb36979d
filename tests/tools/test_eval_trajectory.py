"""tools/eval_trajectory.py: on a run and on a folder of models, restarted, killed, and with models that are broken."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from engine_runs import train, write_inputs
from tool_calls import call_tool
from transformers import BertForMaskedLM

from megatron_sas.core.cli import InputError
from megatron_sas.core.files import sha256_file
from megatron_sas.data.packed import PackedData
from megatron_sas.evaluation.complexity import weight_norm
from megatron_sas.evaluation.minimal_pairs import BlimpTask, load_blimp
from megatron_sas.evaluation.treebank import load_treebank
from megatron_sas.evaluation.uas import TreebankTask
from megatron_sas.export.hf import to_hf
from megatron_sas.run.reading import load_model
from megatron_sas.run.records import read_records
from megatron_sas.trajectory.measure import Inputs
from megatron_sas.trajectory.models import list_models
from megatron_sas.trajectory.points import is_whole, point_directory, read_items, read_point, read_points, read_settings
from megatron_sas.trajectory.summary import heads_over_time
from megatron_sas.trajectory.workers import measure_models

ROOT = Path(__file__).resolve().parents[2]
STEPS = [0, 2, 3, 4, 6]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """The last bits of a sum depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of 6 updates with its data, a treebank and minimal pairs over its vocabulary."""
    path = tmp_path_factory.mktemp("trajectory")
    rng = np.random.default_rng(0)
    sentences = []
    for _ in range(40):
        size = int(rng.integers(3, 9))
        heads = [0] + [int(rng.integers(1, word)) for word in range(2, size + 1)]
        relations = ["root"] + rng.choice(["det", "nsubj", "punct"], size - 1).tolist()
        words = [f"w{word}" for word in rng.integers(0, 60, size)]
        sentences.append({"words": words, "heads": heads, "relns": relations})
    sentences.insert(3, {"words": ["w1"] * 40, "heads": [0] + [1] * 39, "relns": ["det"] * 40})  # too long
    sentences.append({"words": ["_", "_"], "heads": [2, 0], "relns": ["det", "root"]})  # blanked
    (path / "treebank.jsonl").write_text("".join(json.dumps(sentence) + "\n" for sentence in sentences))
    overrides = {"snapshots.every": 2, "snapshots.dtype": "fp32", "evaluation.treebank": str(path / "treebank.jsonl")}
    train(write_inputs(path), path / "run", overrides)
    (path / "blimp").mkdir()
    for name, pairs in (("b_set", 50), ("a_set", 80)):
        labels = {"UID": name, "field": f"field of {name}", "linguistics_term": "term"}
        lines = []
        for _ in range(pairs):
            good, bad = (" ".join(f"w{word}" for word in rng.integers(0, 60, 4)) for _ in range(2))
            lines.append(json.dumps({**labels, "sentence_good": good, "sentence_bad": bad}) + "\n")
        (path / "blimp" / f"{name}.jsonl").write_text("".join(lines))
    return path


def inputs_of(folder, **more):
    treebank, blimp = (str(folder / name) for name in ("treebank.jsonl", "blimp"))
    return Inputs.of(treebank=treebank, blimp=blimp, text=str(folder / "data1"), batch_tokens=200, **more)


@pytest.fixture(scope="module")
def inputs(folder):
    return inputs_of(folder)


def measure(source, inputs, output, **options):
    """`measure_models` on this machine's CPU."""
    return measure_models(source, list_models(source), inputs, output, device="cpu", **options)


@pytest.fixture(scope="module")
def measured(folder, inputs):
    """The run measured as a whole."""
    assert measure(folder / "run", inputs, folder / "measured") == 0
    return folder / "measured"


def without_clock(directory):
    """Content of every file of a trajectory but for durations."""
    files = {}
    for path in sorted(directory.rglob("*")):
        if path.name == "point.json":
            point = json.loads(path.read_text())
            del point["seconds"]
            for name in ("seconds", "sentences_per_second"):
                del point["blimp"][name]
            files[str(path.relative_to(directory))] = json.dumps(point)
        elif path.is_file():
            files[str(path.relative_to(directory))] = path.read_bytes()
    return files


def test_points_hold_what_the_single_evaluations_say(folder, measured):
    points = read_points(measured)
    assert [point["step"] for point in points] == STEPS
    live = {
        line["step"]: line for line in read_records(folder / "run" / "metrics.jsonl") if line["kind"] == "evaluation"
    }
    for point, (step, path) in zip(points, list_models(folder / "run"), strict=True):
        model, tokenizer = load_model(path)
        task = TreebankTask(load_treebank(folder / "treebank.jsonl"), tokenizer, 32)
        expected = json.loads(json.dumps(task.evaluate(model, batch_tokens=200)))
        assert (point["model"], point["uas"]) == (str(path), expected)
        assert (point["uas"]["num_skipped"], point["uas"]["num_blanked"]) == (1, 1)
        blimp = BlimpTask(load_blimp(folder / "blimp"), tokenizer, max_length=32).evaluate(model, batch_tokens=200)
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


def test_sas_of_the_text_is_that_of_the_regularizer(folder, measured):
    packed = PackedData(folder / "data1")
    model, _ = load_model(dict(list_models(folder / "run"))[4])
    heads = torch.from_numpy(np.asarray(packed.heads[:10]).astype(np.int64))
    with torch.no_grad():
        output = model(torch.from_numpy(np.asarray(packed.tokens[:10]).astype(np.int64)), heads=heads)
    along = torch.cat(output.to_head, dim=1).amax(dim=1)[heads >= 0]
    point = read_point(measured, 4)["text_sas"]
    assert point["num_edges"] == len(along) > 0
    assert point["to_head"] == pytest.approx(float(along.double().mean()), rel=1e-5)


def test_items_add_up_to_the_numbers_and_are_alike_in_all_points(measured):
    first = read_items(measured, 0)
    for step in STEPS:
        point, items = read_point(measured, step), read_items(measured, step)
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


def test_a_second_call_measures_what_is_missing_or_damaged_to_the_same_bytes(folder, inputs, measured, tmp_path):
    again = folder / "again"  # beside `measured`: the settings hold the way to the run
    shutil.copytree(measured, again)
    shutil.rmtree(point_directory(again, 2))
    (point_directory(again, 4) / "items.npz").write_bytes(b"PK")
    (again / "summary.csv").unlink()
    kept = (point_directory(again, 3) / "point.json").stat()
    calls = []
    measure(folder / "run", inputs, again, after_model=lambda: calls.append(1))
    assert len(calls) == len(STEPS)
    found = (point_directory(again, 3) / "point.json").stat()
    assert (found.st_ino, found.st_mtime_ns) == (kept.st_ino, kept.st_mtime_ns)
    assert without_clock(again) == without_clock(measured)
    with pytest.raises(InputError, match=r"settings.json: was measured with another treebank .* another --output"):
        measure(folder / "run", inputs_of(folder, treebank_sentences=9), again)


def test_a_point_of_other_weights_is_measured_again(models, inputs, tmp_path):
    """Two models change places: same names, steps and shape."""
    output = tmp_path / "out"
    shutil.rmtree(models / "seed_3-step_1k")
    measure(models, inputs, output)
    before = {step: read_point(output, step) for step in (0, 20_000)}
    for step, point in before.items():
        weights = models / f"seed_3-step_{step // 1000}k" / "model.safetensors"
        assert point["model_sha256"] == sha256_file(weights)
    (models / "seed_3-step_0k").rename(models / "other")
    (models / "seed_3-step_20k").rename(models / "seed_3-step_0k")
    (models / "other").rename(models / "seed_3-step_20k")
    measure(models, inputs, output)
    for step, other in ((0, 20_000), (20_000, 0)):
        point = read_point(output, step)
        assert point["model_sha256"] == before[other]["model_sha256"] != before[step]["model_sha256"]
        assert (point["weight_norm"], point["mlm_loss"]) == (before[other]["weight_norm"], before[other]["mlm_loss"])


def test_summary_and_heads_are_written_from_all_points(measured):
    lines = [line.split(",") for line in (measured / "summary.csv").read_text().splitlines()]
    points = {point["step"]: point for point in read_points(measured)}
    assert [int(line[0]) for line in lines[1:]] == STEPS
    row = dict(zip(lines[0], lines[-1], strict=True))
    assert float(row["uas"]) == points[6]["uas"]["uas"]
    assert float(row["sas_to_dependent"]) == points[6]["sas"]["to_dependent"]
    assert float(row["blimp_field of a_set"]) == points[6]["blimp"]["fields"]["field of a_set"]
    heads = json.loads((measured / "heads.json").read_text())
    assert heads["steps"] == STEPS
    for name, relation in heads["relations"].items():
        last = points[6]["uas"]["relations"][name]
        assert relation["accuracy"][-1] == last["accuracy"]
        assert [b[3] for b in relation["best"]] == [points[s]["uas"]["relations"][name]["accuracy"] for s in STEPS]


def test_a_head_serves_its_relation_since_it_stays_above_the_baseline():
    hits = {0: [[3, 1], [1, 0]], 10: [[1, 7], [1, 0]], 20: [[9, 3], [2, 0]], 30: [[2, 8], [1, 0]], 40: [[2, 9], [2, 0]]}
    points = []
    for step, (first, second) in hits.items():  # relation obj: heads 0 and 1 of one layer; relation det never above
        correct = [[[second], [[0, 0]]], [[first], [[0, 0]]]]
        rows = {
            name: {"count": 10, "baseline": 0.5, "baseline_offset": -1, "layer": 0, "direction": "dep->head"}
            | {"head": int(np.argmax(values)), "accuracy": max(values) / 10}
            for name, values in (("obj", first), ("det", second))
        }
        counts = {"relations": ["det", "obj"], "directions": ["dep->head", "head->dep"], "correct": correct}
        points.append({"step": step, "uas": {"relations": rows, "counts": counts}})
    relations = heads_over_time(points)["relations"]
    assert list(relations) == ["obj", "det"]
    assert (relations["obj"]["head"], relations["obj"]["since"]) == (1, 30)  # above at 10, but not at 20
    assert relations["obj"]["accuracy"] == [0.1, 0.7, 0.3, 0.8, 0.9]
    assert [entry[1] for entry in relations["obj"]["best"]] == [0, 1, 0, 1, 1]
    assert relations["det"]["since"] is None


@pytest.fixture
def models(folder, tmp_path):
    """A folder of Hugging Face models, one of them broken."""
    path = tmp_path / "models"
    path.mkdir()
    for name, step in (("seed_3-step_0k", 0), ("seed_3-step_1k", 4), ("seed_3-step_20k", 6)):
        shutil.copytree(folder / "run" / "snapshots" / f"step_{step:08d}", path / name)
        config = json.loads((path / name / "config.json").read_text())
        assert config.pop("megatron_sas_step") == step
        (path / name / "config.json").write_text(json.dumps(config))
    weights = path / "seed_3-step_1k" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return path


def test_a_model_that_cannot_be_read_is_refused_or_skipped(models, inputs, tmp_path):
    output, lines = tmp_path / "out", []
    with pytest.raises(InputError, match=r"seed_3-step_1k/model.safetensors: is damaged .*--on-error skip"):
        measure(models, inputs, output)
    assert [is_whole(output, step) for step in (0, 1000, 20_000)] == [True, False, False]
    assert measure(models, inputs, output, on_error="skip", report=lines.append) == 1
    about_the_treebank, skipped = lines
    assert about_the_treebank.endswith("1 sentences left out, whose words are blanked (_)")
    assert skipped.startswith("skipped step 1000: ")
    assert [point["step"] for point in read_points(output)] == [0, 20_000]
    assert not point_directory(output, 1000).exists()
    assert read_settings(output)["source"] == "../models"


def test_a_broken_first_model_or_another_architecture_is_skipped_too(models, inputs, folder, tmp_path):
    shutil.move(models / "seed_3-step_1k", models / "seed_3-step_0")
    shutil.rmtree(models / "seed_3-step_0k")
    config = json.loads((models / "seed_3-step_20k" / "config.json").read_text())
    other = models / "seed_3-step_30k"
    shutil.copytree(models / "seed_3-step_20k", other)
    (other / "config.json").write_text(json.dumps({**config, "num_attention_heads": 4}))
    impossible = models / "seed_3-step_40k"
    shutil.copytree(models / "seed_3-step_20k", impossible)
    (impossible / "config.json").write_text(json.dumps({**config, "hidden_size": "64"}))
    lines = []
    assert measure(models, inputs, tmp_path / "out", on_error="skip", report=lines.append) == 3
    skipped = [line for line in lines if line.startswith("skipped")]
    assert [line.partition(":")[0] for line in skipped] == [f"skipped step {step}" for step in (0, 30_000, 40_000)]
    assert "differs from the other models in num_heads" in skipped[1] and len(lines) == 4  # with one on the treebank
    assert [point["step"] for point in read_points(tmp_path / "out")] == [20_000]


def command(folder, source, output, *options):
    arguments = ["--treebank", folder / "treebank.jsonl", "--blimp", folder / "blimp", "--text", folder / "data1"]
    arguments += ["--output", output, "--batch-tokens", 200, "--device", "cpu", *options]
    return [sys.executable, *map(str, [ROOT / "tools" / "eval_trajectory.py", source, *arguments])]


ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tools'}", "OMP_NUM_THREADS": "1"}


HELD = """
import runpy, sys, time
from megatron_sas.trajectory import workers

def held(task, step, *arguments):
    if step == 6:
        time.sleep(600)
    return measure(task, step, *arguments)

measure, workers._measure = workers._measure, held  # in the workers, which import this file, too
if __name__ == "__main__":
    sys.argv.pop(0)
    runpy.run_path(sys.argv[0])["main"]()
"""


@pytest.mark.slow
def test_killed_with_two_workers_it_leaves_whole_points_and_continues(folder, measured, inputs):
    output, script = folder / "killed", folder / "held.py"
    script.write_text(HELD)  # the command, which does not come to the end of the last model
    python, *rest = command(folder, folder / "run", output, "--workers", 2)
    first = psutil.Popen([python, script, *rest], env=ENVIRONMENT)
    try:
        deadline = time.monotonic() + 180
        while not list(output.glob("points/step_*")):
            assert time.monotonic() < deadline and first.poll() is None
            time.sleep(0.002)
        workers = first.children()  # two, and the tracker of their resources
    finally:
        first.kill()
        first.wait()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert len(workers) == 3 and not alive, "a worker outlives its parent"
    assert all(is_whole(output, int(path.name[5:])) for path in output.glob("points/step_*"))
    assert not (output / "summary.csv").exists()

    measure(folder / "run", inputs, output, workers=2)
    assert without_clock(output) == without_clock(measured)


def test_the_command_measures_the_chosen_steps(folder, measured, capsys):
    output = folder / "chosen"
    call_tool("eval_trajectory", *command(folder, folder / "run", output, "--steps", 0, "3-5")[2:])
    *unknown, last = capsys.readouterr().out.splitlines()
    assert last == f"{output}: 3 models measured, 0 skipped"
    assert [line.split(" pieces of ")[1] for line in unknown] == [
        f"{name} are [UNK] (0.00%)" for name in ("--treebank", "--blimp", "--text")
    ]
    points = {name: content for name, content in without_clock(output).items() if name.startswith("points")}
    assert sorted({name.split("/")[1] for name in points}) == [f"step_{step:08d}" for step in (0, 3, 4)]
    assert points.items() <= without_clock(measured).items()


def test_a_pattern_reads_names_and_another_one_needs_another_output(folder, models, tmp_path, capsys):
    shutil.rmtree(models / "seed_3-step_1k")
    (models / "seed_3-step_20k").rename(models / "seed_4-step_20k")
    output = tmp_path / "out"
    with pytest.raises(InputError, match=r"seed_3-step_0k and seed_4-step_20k.*--step-pattern"):
        call_tool("eval_trajectory", *command(folder, models, output)[2:])
    call_tool("eval_trajectory", *command(folder, models, output, "--step-pattern", r"step_(\d+k)")[2:])
    assert [point["step"] for point in read_points(output)] == [0, 20_000]
    with pytest.raises(InputError, match=r"seed_3-step_0k as step 0, which is step 3 now; choose another --output"):
        call_tool("eval_trajectory", *command(folder, models, output, "--step-pattern", r"seed_(\d)")[2:])


def test_exports_count_as_the_steps_that_they_record(folder, tmp_path, capsys):
    for name, step in (("second", 3), ("first", 6)):
        to_hf(folder / "run" / "checkpoints" / f"step_{step:08d}", tmp_path / "models" / name)
    call_tool("eval_trajectory", *command(folder, tmp_path / "models", tmp_path / "out")[2:])
    found = {point["step"]: Path(point["model"]).name for point in read_points(tmp_path / "out")}
    assert found == {3: "second", 6: "first"}


def test_wrong_input_is_refused_and_leaves_nothing(folder):
    output = folder / "none"
    for source, options, message in [
        (folder / "run", ["--steps", "7-9"], "--steps: none of the models"),
        (folder / "blimp", [], "blimp: no models in it"),
        (folder / "run", ["--workers", 0], "--workers: 0 is below 1"),
        (folder / "run", ["--text", folder / "absent"], "absent.json: no such file"),
        (folder / "run", ["--treebank", folder / "absent.conllu"], "absent.conllu: no such file"),
    ]:
        with pytest.raises(InputError, match=message):
            call_tool("eval_trajectory", *command(folder, source, output, *options)[2:])
        assert not output.exists()


def test_text_alone_gives_entropy_and_no_heads(folder, tmp_path):
    measure(folder / "run", Inputs.of(text=str(folder / "data1")), tmp_path / "out")
    point = read_point(tmp_path / "out", 6)
    assert point.keys() == {
        "step", "model", "model_sha256", "seconds", "weight_norm", "attention_entropy", "attention_to_cls",
        "attention_to_sep", "attention_uniform_entropy", "attention_collapsed_heads", "text_sas",
        "text_unknown", "intrinsic_dimension", "mlm_loss",
    }  # fmt: skip
    assert not (tmp_path / "out" / "heads.json").exists()
    assert "uas" not in read_items(tmp_path / "out", 6)
    eager = BertForMaskedLM.from_pretrained(folder / "run" / "snapshots" / "step_00000006", attn_implementation="eager")
    tokens = torch.from_numpy(np.asarray(PackedData(folder / "data1").tokens[:10]).astype(np.int64))
    with torch.no_grad():
        maps = torch.stack(eager(tokens, output_attentions=True).attentions).double()
    expected = -(maps * maps.log()).sum(dim=-1).mean(dim=(1, 3))
    assert np.allclose(point["attention_entropy"]["per_head"], expected, rtol=1e-6)
    assert np.allclose(point["attention_to_cls"]["per_head"], maps[..., 0].mean(dim=(1, 3)), rtol=1e-6)
