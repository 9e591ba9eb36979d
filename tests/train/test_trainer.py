"""The loop around the updates: what is recorded and when, continuing, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from engine_runs import checkpoint, largest_difference, moments, override_arguments, records, train, weights
from synthetic_data import write_packed
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_sas.config import load_config
from megatron_sas.core.cli import InputError
from megatron_sas.core.directory_lock import DirectoryLock
from megatron_sas.core.manifest import write_manifest
from megatron_sas.data.packed import PackedData
from megatron_sas.evaluation.complexity import cls_vectors, intrinsic_dimension, weight_norm
from megatron_sas.evaluation.live import EvaluationSection
from megatron_sas.evaluation.text import packed_text
from megatron_sas.export.hf import to_hf
from megatron_sas.kernels.cpu_linear import library_in_use, use_library
from megatron_sas.run.reading import FORMAT, VERSION, load_model
from megatron_sas.run.records import read_records
from megatron_sas.run.signals import StopRequest
from megatron_sas.train import build
from megatron_sas.train.build import build_state
from megatron_sas.train.resume import begin_run, check_same_data, data_facts, find_start


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """A run of 6 updates."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(config, run)
    return run


def refusal(config, run, overrides=None) -> str:
    """The message with which a run is refused before anything is trained."""
    arguments = override_arguments({**(overrides or {}), "run.output_dir": str(run)})
    existed = run.exists()
    with pytest.raises(InputError) as error:
        build_state(load_config(config, arguments), print)
    message = str(error.value)
    assert "\n" not in message
    assert existed == (run.is_file() or (run.is_dir() and any(run.iterdir())))
    return message


def test_a_resumed_run_is_the_whole_run(config, whole, tmp_path):
    run = tmp_path / "run"
    train(config, run, {"train.steps": 3})
    train(config, run)
    for step in (3, 6):
        assert largest_difference(weights(run, step), weights(whole, step)) == 0.0
        assert largest_difference(moments(run, step), moments(whole, step)) == 0.0
    assert records(run) == records(whole)
    assert sorted(records(run)) == [1, 2, 3, 4, 5, 6]
    assert records(run, "evaluation") == records(whole, "evaluation")
    tokens = [line["tokens"] for line in read_records(run / "metrics.jsonl") if "tokens" in line]
    assert tokens == sorted(tokens)
    assert tokens[-1] == 6 * 8 * 32


def test_a_killed_run_loses_what_came_after_its_checkpoint(config, whole, tmp_path):
    """As a kill leaves it: records up to update 5, a torn line, a half-written checkpoint."""
    run = tmp_path / "run"
    train(config, run)
    shutil.rmtree(checkpoint(run, 6))
    (run / "checkpoints" / "latest").write_text("step_00000003\n")
    partial = run / "checkpoints" / ".step_00000006.tmp"
    partial.mkdir()
    (partial / "model.json").write_text("{")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')
    train(config, run)
    assert records(run) == records(whole)
    assert records(run, "evaluation") == records(whole, "evaluation")
    assert largest_difference(weights(run, 6), weights(whole, 6)) == 0.0
    assert not partial.exists()


def test_other_threads_than_the_checkpoints_are_named(config, tmp_path, capsys):
    run = tmp_path / "run"
    line = "threads per process: 3, where the checkpoint was made with 1; from here the run equals an uninterrupted one"
    for steps, threads in ((1, 1), (2, 1), (3, 3), (4, 3)):
        train(config, run, {"train.steps": steps}, threads=threads)
        assert capsys.readouterr().out.count(line) == (steps == 3)
    starts = [line for line in read_records(run / "metrics.jsonl") if line.get("event") == "start"]
    assert [line["threads"] for line in starts] == [[1], [1], [3], [3]]


def test_a_resumed_run_and_a_branch_multiply_with_what_the_run_began_with(config, tmp_path, monkeypatch):
    """Not with what is faster where they run: results differ in rounding. Where a checkpoint does not say, the
    processor decides, as it did when such were made."""
    run, branch = tmp_path / "run", tmp_path / "branch"
    for measured, start in (
        ("onednn", (run, {"train.steps": 1})),
        ("torch", (run, {"train.steps": 3})),
        ("torch", (branch, {"train.steps": 4, "run.branch_from": str(run)})),
    ):
        monkeypatch.setattr(build, "measure_library", lambda measured=measured: measured)
        train(config, *start)
        assert library_in_use() == "onednn"
    for directory in (run, branch):
        starts = [line for line in read_records(directory / "metrics.jsonl") if line.get("event") == "start"]
        assert {line["linear_library"] for line in starts} == {"onednn"}
    use_library(None)
    by_processor, state = library_in_use(), checkpoint(run, 3) / "state.json"
    state.write_text(json.dumps({k: v for k, v in json.loads(state.read_text()).items() if k != "linear_library"}))
    write_manifest(checkpoint(run, 3), format=FORMAT, version=VERSION, step=3)
    train(config, run, {"train.steps": 4})
    assert library_in_use() == by_processor


def test_a_finished_run_stays_as_it_is(config, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    train(config, run)
    assert records(run) == records(whole)
    assert largest_difference(weights(run, 6), weights(whole, 6)) == 0.0


def test_evaluations_and_checkpoints_come_when_they_are_due(config, tmp_path):
    run = tmp_path / "run"
    when = {"every": 4, "dense_every": 1, "dense_until": 2, "at": [7]}
    overrides = {f"evaluation.{name}": value for name, value in when.items()}
    overrides |= {f"checkpoint.{name}": value for name, value in when.items()}
    train(
        config,
        run,
        {
            **overrides,
            "train.steps": 10,
            "logging.every": 4,
            "logging.tensorboard": True,
            "evaluation.complexity_sequences": 10,
        },
    )
    due = [0, 1, 2, 4, 7, 8, 10]
    evaluations = records(run, "evaluation")
    assert sorted(evaluations) == due
    assert all({"validation_mlm_loss", "validation_sas", "weight_norm"} <= line.keys() for line in evaluations.values())
    assert sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step_*")) == due
    assert (run / "checkpoints" / "latest").read_text().strip() == "step_00000010"
    assert sorted(records(run)) == list(range(1, 11))
    lines = [line for line in read_records(run / "metrics.jsonl") if line["kind"] == "train"]
    assert [line["step"] for line in lines if "tokens_per_second" in line] == [1, 2, 4, 7, 8, 10]
    assert [line["step"] for line in lines if "sas" not in line] == [5, 6, 7, 9]  # λ = 0 and no line printed
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    points = board.Scalars("train/mlm_loss")
    assert [point.step for point in points] == list(range(1, 11))
    assert [point.value for point in points] == pytest.approx([line["mlm_loss"] for line in lines])
    for name in ("validation_mlm_loss", "twonn", "weight_norm"):
        assert [point.step for point in board.Scalars(f"evaluation/{name}")] == due
    live = {line["step"]: line for line in read_records(run / "metrics.jsonl") if line["kind"] == "evaluation"}[8]
    model, _ = load_model(checkpoint(run, 8))
    batches = packed_text(PackedData(load_config(config).data.validation), num_sequences=10, batch_tokens=320)
    assert live["twonn"] == pytest.approx(intrinsic_dimension(cls_vectors(model, batches, 10))["twonn"], rel=1e-3)
    assert live["weight_norm"] == pytest.approx(weight_norm(model), rel=1e-9)


def test_a_run_that_is_stopped_in_its_last_evaluation_is_not_finished(config, whole, tmp_path):
    run, stop = tmp_path / "run", StopRequest()

    def ask_at_the_end(step, values):
        stop.reason = "SIGTERM" if step == 6 else None

    train(config, run, stop=stop, observer=ask_at_the_end)
    assert (run / "requeue").read_text() == "SIGTERM\n"
    assert sorted(records(run, "evaluation")) == [0, 3]
    assert [line["event"] for line in read_records(run / "metrics.jsonl") if "event" in line] == ["start", "stopped"]
    train(config, run)
    assert records(run, "evaluation") == records(whole, "evaluation")
    assert largest_difference(weights(run, 6), weights(whole, 6)) == 0.0
    assert not (run / "requeue").exists()


def test_default_evaluation_points_are_the_first_and_the_last_step():
    assert [step for step in range(11) if EvaluationSection().due(step, 10)] == [0, 10]


def test_weights_can_come_from_elsewhere(config, whole, tmp_path):
    """From a checkpoint, a run, or a Hugging Face directory; and the run's own checkpoint wins when it continues."""
    to_hf(whole, tmp_path / "hf")
    for source in (checkpoint(whole, 3), whole, tmp_path / "hf"):
        run = tmp_path / f"from-{source.name}"
        train(config, run, {"model.init_from": str(source), "train.steps": 1})
        start = weights(whole, 3 if source == checkpoint(whole, 3) else 6)
        assert largest_difference(weights(run, 0), start) == 0.0
        assert json.loads((checkpoint(run, 0) / "state.json").read_text())["step"] == 0
    shutil.rmtree(tmp_path / "hf")
    train(config, run, {"model.init_from": str(tmp_path / "hf"), "train.steps": 2})
    assert sorted(records(run)) == [1, 2]


def test_other_architectures_and_vocabularies_are_refused_as_initial_weights(config, whole, tmp_path):
    source = {"model.init_from": str(whole)}
    message = refusal(config, tmp_path / "a", {**source, "model.num_layers": 3, "model.max_position_embeddings": 64})
    assert message.startswith(f"model.init_from: {whole} has num_layers 2 instead of 3, max_position_embeddings ")
    assert "no such directory" in refusal(config, tmp_path / "b", {"model.init_from": str(tmp_path / "none")})
    other = other_vocabulary(tmp_path / "other")
    assert "a tokenizer with other entries" in refusal(config, tmp_path / "c", {**source, **other})


def other_vocabulary(directory: Path) -> dict[str, object]:
    """Data made with another tokenizer of the same size."""
    directory.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] + [f"v{i}" for i in range(60)]
    (directory / "vocab.txt").write_text("\n".join(words) + "\n")
    return {"data.train": write_packed(directory), "data.validation": None}


def test_another_experiment_does_not_continue_a_run(config, whole):
    message = refusal(config, whole, {"train.learning_rate": 2e-3, "sas.mode": "uniform", "run.seed": 3})
    assert "was started with other values of sas.mode, train.learning_rate, run.seed" in message
    assert "choose another run.output_dir" in message
    assert "init_from" in refusal(config, whole, {"model.init_from": str(whole)})
    assert "train.steps: 5 is less than the 6 updates" in refusal(config, whole, {"train.steps": 5})


def test_what_may_change_in_a_continued_run(config, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "moved")
    changes = {"train.steps": 7, "train.zero_stage": 2, "logging.every": 2, "evaluation.every": 1}
    train(config, tmp_path / "moved", {**changes, "checkpoint.every": 1})
    assert sorted(records(tmp_path / "moved")) == [1, 2, 3, 4, 5, 6, 7]


def test_the_micro_batch_may_change_in_a_continued_run(config, tmp_path):
    """After running out of memory, or for another number of GPUs: the same curve within rounding, without dropout."""
    settings = {"model.hidden_dropout": 0.0}
    train(config, tmp_path / "whole", settings)
    train(config, tmp_path / "run", {**settings, "train.steps": 3})
    train(config, tmp_path / "run", {**settings, "train.micro_batch_size": 4})
    assert largest_difference(weights(tmp_path / "run", 6), weights(tmp_path / "whole", 6)) < 1e-5
    lines = records(tmp_path / "whole")
    assert sorted(records(tmp_path / "run")) == sorted(lines)
    for step, line in records(tmp_path / "run").items():
        assert line == pytest.approx(lines[step], rel=1e-5)


def test_the_micro_batch_of_the_sum_over_it_may_not_change(config, tmp_path):
    settings = {"sas.reduction": "sum", "train.steps": 1}
    train(config, tmp_path / "run", settings)
    message = refusal(config, tmp_path / "run", {**settings, "train.micro_batch_size": 4})
    assert "was started with other values of train.micro_batch_size; restore them" in message


def test_a_continued_run_may_find_its_data_elsewhere(config, whole, tmp_path):
    """Staged by each job into a directory of its own: the contents are compared, not the paths."""
    run, node = tmp_path / "run", tmp_path / "node-42"
    train(config, run, {"train.steps": 3})
    shutil.copytree(config.parent, node, ignore=shutil.ignore_patterns("run"))
    staged = {
        "data.train": [str(node / "data0")],
        "data.validation": str(node / "data1"),
        "data.tokenizer": str(node / "vocab.txt"),
    }
    train(config, run, staged)
    assert largest_difference(weights(run, 6), weights(whole, 6)) == 0.0
    assert records(run, "evaluation") == records(whole, "evaluation")
    other = write_packed(node, seed=2, sequences=10)
    assert "data2 is not the data that the run was started with" in refusal(config, run, {"data.train": other})
    for name in (other, None):
        message = refusal(config, run, {"data.validation": name})
        assert message.startswith(f"data.validation: {name or 'none'} is not what the run was started with (SHA-256")


def test_a_run_that_another_process_has_begun_meanwhile_is_not_begun_again(config, tmp_path):
    """It was new when this process looked, and the other has come and gone before this one claims the directory."""
    run = tmp_path / "run"
    settings = load_config(config, [f"--run.output_dir={run}"])
    start = find_start(settings, print)
    train(config, run, {"train.steps": 3})
    with pytest.raises(InputError, match="another process has begun this run meanwhile; start the same command again"):
        begin_run(settings, *start, DirectoryLock(run, "wait for it"), 0)
    assert sorted(records(run)) == [1, 2, 3]
    train(config, run)
    assert sorted(records(run)) == [1, 2, 3, 4, 5, 6]


def test_output_directories_that_are_refused(config, whole, tmp_path):
    assert "exists and is not empty" in refusal(config, whole, {"run.resume": "never"})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("…")
    assert "is not a run" in refusal(config, tmp_path / "full")
    assert (tmp_path / "full" / "thesis.tex").exists()
    (tmp_path / "file").write_text("…")
    assert "is not a run" in refusal(config, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    build_state(load_config(config, [f"--run.output_dir={tmp_path / 'empty'}", "--run.resume=never"]), print)


def test_data_that_does_not_fit_is_refused(config, whole, tmp_path):
    loaded = load_config(config)
    other = other_vocabulary(tmp_path / "other")
    vocabulary = str(Path(str(other["data.train"])).parent / "vocab.txt")
    assert "is not the tokenizer that made" in refusal(config, tmp_path / "a", {"data.tokenizer": vocabulary})
    assert "is not the tokenizer that made" in refusal(config, tmp_path / "b", {"data.validation": other["data.train"]})
    message = refusal(config, tmp_path / "c", {"model.max_position_embeddings": 16})
    assert message == "model.max_position_embeddings: 16 is less than the sequence length 32 of data.train"
    message = refusal(config, tmp_path / "d", {"data.train": str(tmp_path / "none")})
    assert "none.json: no such file" in message
    assert "is not a multiple of" in refusal(config, tmp_path / "e", {"train.micro_batch_size": 3})
    # Same prefix, other content: a run must not go on with it.
    for file in Path(loaded.data.train).parent.iterdir():
        if file.is_file():
            shutil.copy(file, tmp_path)
    moved = {"data.train": str(tmp_path / "data0"), "data.validation": None}
    train(config, tmp_path / "run", {**moved, "train.steps": 1})
    # The same tokens parsed anew
    header = tmp_path / "data0.json"
    parsed = header.read_text()
    header.write_text(parsed.replace(PackedData(tmp_path / "data0").heads_fingerprint, "0" * 64))
    assert "data.train: " in (message := refusal(config, tmp_path / "run", moved))
    assert "data0 has other heads than when the run was started" in message
    header.write_text(parsed)
    write_packed(tmp_path, seed=7)
    for file in tmp_path.glob("data7.*"):
        file.rename(tmp_path / file.name.replace("data7", "data0"))
    assert "is not the data that the run was started with" in refusal(config, tmp_path / "run", moved)


def test_what_a_run_may_not_begin_with(config, tmp_path):
    """Training data twice, or those of validation; a run that began with them under an earlier version goes on."""
    train_data = load_config(config).data.train
    twice = [{"prefix": train_data, "weight": weight} for weight in (1, 2)]
    message = refusal(config, tmp_path / "a", {"data.train": twice})
    assert message == f"data.train: {train_data} is given twice; leave one out"
    overrides = {"data.validation": train_data, "train.steps": 1}
    message = refusal(config, tmp_path / "run", overrides)
    assert message.startswith(f"data.validation: {train_data} and {train_data} of data.train hold the same sequences; ")
    train(config, tmp_path / "run", {"train.steps": 1})
    of_version_before = checkpoint(tmp_path / "run", 1)
    state, data = json.loads((of_version_before / "state.json").read_text()), PackedData(train_data)
    state["data"]["validation"] = [data.fingerprint, data.heads_fingerprint]
    (of_version_before / "state.json").write_text(json.dumps(state))
    write_manifest(of_version_before, format=FORMAT, version=VERSION, step=1)
    train(config, tmp_path / "run", overrides | {"train.steps": 2})
    assert sorted(records(tmp_path / "run")) == [1, 2]


def test_data_of_a_tokenizer_that_did_something_else_are_refused(config, whole, tmp_path):
    """By the digest in the header; checkpoints have it too."""
    prefix = write_packed(tmp_path, seed=0)
    header = json.loads(Path(f"{prefix}.json").read_text())
    assert json.loads((checkpoint(whole, 6) / "state.json").read_text())["tokenizer"] == {
        name: header["tokenizer"][name] for name in ("hash", "digest")
    }
    header["tokenizer"]["digest"] = "0" * 64
    Path(f"{prefix}.json").write_text(json.dumps(header))
    message = refusal(config, tmp_path / "run", {"data.train": prefix})
    assert message.startswith(f"{tmp_path}/vocab.txt: is not the tokenizer that made {prefix} (hashes differ); ")
    del header["tokenizer"]["digest"]  # of an earlier version
    Path(f"{prefix}.json").write_text(json.dumps(header))
    overrides = {"data.train": prefix, "run.output_dir": str(tmp_path / "run")}
    build_state(load_config(config, override_arguments(overrides)), print)


def test_what_is_remembered_of_the_heads(config):
    packed = PackedData(load_config(config).data.train)
    facts = data_facts(packed, None)
    check_same_data(facts, packed)
    other = facts | {"heads_fingerprint": "0" * 64}
    with pytest.raises(InputError, match="has other heads"):
        check_same_data(other, packed)
    check_same_data(other | {"heads": "permuted"}, packed)  # a branch from a run with a control
    del other["heads_fingerprint"], other["validation"]  # of earlier versions
    check_same_data(other, packed, packed)


def test_a_run_is_a_model_for_the_tools(whole):
    model, tokenizer = load_model(whole)
    assert model.config.num_layers == 2
    assert len(tokenizer) == 65


def test_a_mixture_resumes_exactly(config, tmp_path):
    """Weighted parts, one of them parsed: the run in two halves is the run in one."""
    parts = [write_packed(tmp_path, seed=seed, sequences=10) for seed in (4, 5)]
    mixture = [{"prefix": parts[0], "weight": 3}, {"prefix": parts[1], "weight": 1}]
    overrides = {"data.train": mixture}
    train(config, tmp_path / "whole", overrides)
    train(config, tmp_path / "run", {**overrides, "train.steps": 3})
    train(config, tmp_path / "run", overrides)
    assert largest_difference(weights(tmp_path / "run", 6), weights(tmp_path / "whole", 6)) == 0.0
    assert records(tmp_path / "run") == records(tmp_path / "whole")
    mixture[1]["weight"] = 2
    message = refusal(config, tmp_path / "run", {"data.train": mixture})
    assert "is not the data that the run was started with (SHA-256 or weights differ)" in message
