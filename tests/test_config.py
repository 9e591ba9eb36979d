"""The configuration: read whole, checked whole, written back equal."""

from __future__ import annotations

import typing
from pathlib import Path

import pytest
import yaml

from megatron_sas.config import Config, help_text, load_config, read_config
from megatron_sas.core.cli import InputError
from megatron_sas.core.settings import When
from megatron_sas.kernels import BACKENDS
from megatron_sas.launch.arguments import parse_arguments
from megatron_sas.model.bert import BertSection as ModelSection
from megatron_sas.optim.schedules import Cosine, Linear, Stage, Stages, Wsd
from megatron_sas.optim.section import TrainSection

MINIMAL = """
run: {output_dir: runs/a}
data: {train: data/train}
train: {steps: 100, micro_batch_size: 4}
"""


def load(tmp_path: Path, text: str = MINIMAL, *overrides: str) -> Config:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


def fault(tmp_path: Path, text: str, *overrides: str) -> str:
    """The error message, without the path of the file that it begins with."""
    with pytest.raises(InputError) as error:
        load(tmp_path, text, *overrides)
    message = str(error.value)
    assert message.startswith(str(tmp_path / "config.yaml"))
    return message.removeprefix(str(tmp_path / "config.yaml"))


def test_defaults_are_the_papers(tmp_path):
    config = load(tmp_path)
    train = config.train
    assert (train.global_batch_size, train.learning_rate, train.warmup_steps, train.decay_horizon) == (
        256,
        1e-4,
        10_000,
        1_000_000,
    )
    assert (train.adam_betas, train.adam_eps, train.weight_decay, train.grad_clip) == ((0.9, 0.999), 1e-8, 0.0, 1.0)
    assert (config.data.mask_prob, config.sas.mode, config.sas.schedule) == (0.15, "max", Stages([]))
    bert = config.shape(vocab_size=30522, pad_token_id=0)
    assert (bert.num_layers, bert.hidden_size, bert.hidden_dropout, bert.attention_dropout) == (12, 768, 0.1, 0.1)


def test_all_faults_at_once(tmp_path):
    text = """
run: {outputdir: runs/a, seed: -1}
data: {train: data/train, mask_prob: 2}
train: {steps: 100, micro_batch_size: 3, global_batch_size: 8, warmup_steps: 10, decay_horizon: 5}
model: {size: huge}
trian: {}
sas: {mode: min, schedule: [{start: 0, end: 5, value: 1}, {start: 3, value: 2}]}
checkpoint: {dense_every: 5}
"""
    message = fault(tmp_path, text, "--model.num_layer", "3", "steps=5")
    for part in (
        "steps=5: not an override",
        "run.output_dir: is required",
        "run.outputdir: unknown field; did you mean output_dir?",
        "run.seed: input should be greater than or equal to 0, not -1",
        "data.mask_prob: input should be less than 1, not 2",
        "train.global_batch_size: 8 is not a multiple of micro_batch_size 3",
        "train.warmup_steps: 10 is not before decay_horizon 5",
        "train.steps: 100 is beyond decay_horizon 5",
        "model.size: input should be 'tiny', ",
        "model.num_layer: unknown field; did you mean num_layers?",
        "trian: unknown field; did you mean train?",
        "sas.mode: input should be 'max' or 'uniform', not 'min'",
        "checkpoint.dense_every: needs dense_until",
    ):
        assert f"\n  {part}" in message
    assert message.startswith(": 13 faults:\n")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("model: {hidden_size: 100, num_heads: 3}", "model.hidden_size: 100 is not a multiple of num_heads 3"),
        ("model: {num_layers: yes}", "model.num_layers: input should not be true or false, not True"),
        ("model: {attention_backend: flash}", "model.attention_backend: input should be 'auto', "),
        ("sas: {schedule: yes}", "sas.schedule: input should not be true or false, not True"),
        ("sas: {schedule: none}", "sas.schedule: should be a list, not 'none'"),
        ("sas: {schedule: .nan}", "sas.schedule.0.value: input should be a finite number, not nan"),
        ("sas: {p: 0.5}", "sas.p: input should be greater than or equal to 1, not 0.5"),
        ("sas: 3", "sas: should be a mapping of fields, not 3"),
        ("evaluation: {at: 3}", "evaluation.at: should be a list, not 3"),
        (
            "sas: {schedule: [{start: 0, value: 1, ned: 3}]}",
            "sas.schedule.0.ned: unknown field; did you mean end?",
        ),
        (
            "sas: {schedule: [{start: 0, value: 1, end: 5}, {start: 3, value: 2}]}",
            "sas.schedule: stages 0 and 1 overlap: stage 0 lasts until 5, stage 1 starts at 3",
        ),
        (
            "sas: {schedule: {kind: cosin, value: 1}}",
            "sas.schedule: should be a list of stages or a kind: linear, cosine, wsd, not {'kind': 'cosin', ",
        ),
        (
            "sas: {schedule: {kind: wsd, value: 1, decay_horizon: 9, decay_step: 3}}",
            "sas.schedule.decay_step: unknown field; did you mean decay_steps?",
        ),
        (
            "sas: {schedule: {kind: cosine, value: 1, decay_horizon: 0}}",
            "sas.schedule.decay_horizon: input should be greater than or equal to 1, not 0",
        ),
        (
            "sas: {schedule: {kind: cosine, value: 1, decay_horizon: 9, warmup_steps: 9}}",
            "sas.schedule.warmup_steps: 9 is not before decay_horizon 9",
        ),
        ("evaluation: {complexity_sequences: 50}", "evaluation.complexity_sequences: needs data.validation"),
        ("watch: {metrics: [loss]}", "watch.delta: is required when metrics are watched"),
        (
            "watch: {metrics: [loss], delta: 100, every: 10}",
            "watch.keep: 12 snapshots, one every 10 steps, reach back less than twice delta 100",
        ),
        (
            "watch: {metrics: [uas], delta: 10}\nevaluation: {treebank: x, every: 11}",
            "watch.metrics: uas needs evaluation.treebank, and evaluation.every of at most watch.delta",
        ),
        ("watch: {metrics: [uas], delta: 10}", "watch.metrics: uas needs evaluation.treebank, and"),
        ("model: {architecture: gpt}", "model.architecture: should be one of bert, modernbert, not 'gpt'"),
        ("model: {architecture: [bert]}", "model.architecture: should be one of bert, modernbert, not ['bert']"),
        ("model: {local_attention: 64}", "model.local_attention: only modernbert has this field; remove it"),
        (
            "model: {architecture: modernbert, hidden_dropout: 0.1}",
            "model.hidden_dropout: only bert has this field; remove it",
        ),
        (
            "model: {architecture: modernbert, local_atention: 9}",
            "model.local_atention: unknown field; did you",
        ),
        (
            "model: {architecture: modernbert, local_attention: 1}",
            "model.local_attention: input should be greater than or equal to 2, not 1",
        ),
        (
            "model: {architecture: modernbert, hidden_size: 60, num_heads: 4}",
            "model.hidden_size: 60 makes heads of 15 numbers, and rotations need pairs",
        ),
        ("model: {norm_placement: pre}", "model.norm_placement: 'pre' is no longer possible: LayerNorm comes after"),
    ],
)
def test_one_fault_is_one_line(tmp_path, section, message):
    assert fault(tmp_path, MINIMAL + section).startswith(f": {message}")


def test_an_architecture_has_its_own_fields_and_defaults(tmp_path):
    config = load(tmp_path, MINIMAL + "model: {architecture: modernbert, size: mini}", "--model.local_attention", "64")
    shape = config.shape(70, 3)
    assert (shape.architecture, shape.windows) == ("modernbert", (None, (32, 32), (32, 32), None))
    assert (shape.attention_dropout, shape.hidden_size, shape.pad_token_id) == (0.0, 256, 3)
    written = config.to_yaml()
    assert load(tmp_path, written) == config
    assert "architecture: modernbert" in written and "hidden_dropout" not in written
    bert = load(tmp_path)
    assert "architecture" not in bert.to_yaml()  # so that earlier versions read it
    assert bert == load(tmp_path, MINIMAL + "model: {architecture: bert}")
    assert "model.architecture" in bert.differences(config)


def test_a_dry_run_goes_on_without_the_architecture(tmp_path):
    """With the default one, and without the fields of another."""
    path = tmp_path / "config.yaml"
    path.write_text(MINIMAL + "model: {architecture: gpt, local_attention: 3}")
    config, faults, faulty = read_config(path)
    assert [fault.partition(":")[0] for fault in faults] == ["model.architecture"]
    assert faulty == {"model.architecture"} and config.shape(70, 0).architecture == "bert"


def test_backends_are_the_kernels():
    annotation = ModelSection.model_fields["attention_backend"].annotation
    assert typing.get_args(annotation) == ("auto", *BACKENDS)


def test_zero_3_is_not_compiled(tmp_path):
    text = MINIMAL.replace("train: {", "train: {compile: true, zero_stage: 3, ")
    assert "train.compile: ZeRO stage 3 gathers weights inside the layers" in fault(tmp_path, text)
    sections = {stage: TrainSection(steps=1, micro_batch_size=1, zero_stage=stage) for stage in (0, 3)}
    assert [sections[0].compiles(kind) for kind in ("cuda", "cpu")] == [True, False]
    assert not sections[3].compiles("cuda")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["--train.learning_rate", ".inf"], "train.learning_rate: input should be a finite number, not inf"),
        (["--train.learning_rate", "-1e-4"], "train.learning_rate: input should be greater than 0, not -0.0001"),
        (["--train.steps", "1.5"], "train.steps: input should be a valid integer"),
        (["--train.adam_betas", "[0.9, 1]"], "train.adam_betas: [0.9, 1.0] must be at least 0 and less than 1"),
        (
            ["--train.schedule", "cosin"],
            "train.schedule: should be a list of stages or a kind: linear, cosine, wsd",
        ),
        (
            ["--train.schedule", "{kind: cosine, warmup_steps: 3}"],
            "train.schedule: should leave warmup_steps to train.warmup_steps",
        ),
        (
            ["--train.schedule", "{kind: wsd, decay_steps: 0}"],
            "train.schedule.decay_steps: input should be greater than",
        ),
        (
            ["--train.schedule", "{kind: wsd, steps: 1}"],
            "train.schedule.steps: unknown field; did you mean decay_steps?",
        ),
        (
            ["--train.schedule", "{kind: wsd, decay_steps: 999000}"],
            "train.warmup_steps: 10000 is after the decay begins, at step 1000",
        ),
        (
            ["--train.schedule", "[{start: 0, end: 50, value: 1e-4}]"],
            "train.steps: 100 is beyond the end of schedule's stages 50, where lr reaches 0",
        ),
        (["--train.schedule", "-1e-4"], "train.schedule: a learning rate must not be negative"),
        (["--train.steps"], "--train.steps: has no value"),
        (["--train.steps", "--run.seed", "3"], "--train.steps: has no value"),
        (["--steps", "3"], "2 faults:\n  --steps: not an override; write --section.field value"),
        (["--train.steps", "[3"], "--train.steps: '[3' is not a YAML value"),
    ],
)
def test_faulty_overrides(tmp_path, override, message):
    assert fault(tmp_path, MINIMAL, *override).startswith(f": {message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {output_dir: a}\nrun: {seed: 3}\n", ", line 2: is not valid YAML ('run' is given twice)"),
        ("run:\n  seed: 1\n  seed: 2\n", ", line 3: is not valid YAML ('seed' is given twice)"),
        ("a: [1,\nb: 2", ", line 2: is not valid YAML ("),
        ("run:\n\tseed: 1", ", line 2: is not valid YAML ("),
        ("? [a, b]\n: 3", ", line 1: is not valid YAML (a field name must be plain text)"),
        ("run: \x00", ": is not valid YAML ("),
        ("- 1", ": must be a mapping of sections"),
        ("", ": must be a mapping of sections"),
        ("run: !!python/object:os.system x", ", line 1: is not valid YAML ("),
    ],
)
def test_broken_yaml_names_the_line(tmp_path, text, message):
    found = fault(tmp_path, text)
    assert found.startswith(message)
    assert "\n" not in found


def test_missing_file_and_wrong_encoding(tmp_path):
    with pytest.raises(InputError, match=r"absent\.yaml: no such file; see examples/"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"run: \xff\xfe")
    with pytest.raises(InputError, match="is not UTF-8 text"):
        load_config(tmp_path / "binary.yaml")


def test_overrides(tmp_path):
    config = load(
        tmp_path,
        MINIMAL + "sas:\nlogging:\n",  # empty sections are as good as absent ones
        *("--train.learning_rate", "3e-4", "--train.grad-clip=0", "--sas.schedule", "-0.01", "--logging.every=3"),
        *("--evaluation.at", "[3, 5]", "--data.train=other/a.b", "--model.size", "tiny", "--train.learning_rate=1e-3"),
    )
    assert config.train.learning_rate == 1e-3  # the last one counts
    assert config.train.grad_clip == 0
    assert config.sas.schedule == Stages([Stage(0, -0.01)])
    assert config.logging.every == 3
    assert config.evaluation.at == (3, 5)
    assert config.data.train == "other/a.b"
    assert config.model.dimensions()["hidden_size"] == 128


@pytest.mark.parametrize("name", ["2024", "1e-4", "a: b", "[x", "true", "~user/x"])
def test_text_needs_no_quotes_on_the_command_line(tmp_path, name):
    config = load(tmp_path, MINIMAL, "--run.output_dir", name, f"--data.validation={name}")
    assert (config.run.output_dir, config.data.validation) == (name, name)
    assert load(tmp_path, config.to_yaml()) == config
    assert load(tmp_path, MINIMAL, f'--run.output_dir="{name}"').run.output_dir == name
    assert load(tmp_path, config.to_yaml(), "--data.validation", "null").data.validation is None


@pytest.mark.parametrize("number", ["1e-4", "1E-4", "1.0e-4", "0.0001", ".0001", "1.e-4", "+1e-4"])
def test_numbers_as_people_write_them(tmp_path, number):
    assert load(tmp_path, MINIMAL, "--train.learning_rate", number).train.learning_rate == 1e-4
    text = MINIMAL.replace("steps: 100", f"steps: 100, learning_rate: {number}")
    assert load(tmp_path, text).train.learning_rate == 1e-4


@pytest.mark.parametrize(
    "schedule",
    [
        "0",
        "0.01",
        "-0.001",
        "[{start: 0, end: 3000, value: 1e-3}]",
        "[{start: 5, value: 0.1}, {start: 0, end: 5, value: 0, end_value: 0.1}]",
        "{kind: cosine, value: -0.1, decay_horizon: 9, warmup_steps: 2}",
        "{kind: wsd, value: 0.1, decay_horizon: 9, decay_steps: 3}",
    ],
)
def test_yaml_round_trip(tmp_path, schedule):
    config = load(
        tmp_path,
        MINIMAL,
        *("--sas.schedule", schedule, "--model.hidden_size", "96", "--checkpoint.dense_every", "5"),
        *("--checkpoint.dense_until", "20", "--run.output_dir", "Läufe/ein Lauf: 1", "--data.validation", "~"),
    )
    again = load(tmp_path, config.to_yaml())
    assert again == config
    assert [again.sas.schedule(s) for s in range(10)] == [config.sas.schedule(s) for s in range(10)]


@pytest.mark.parametrize(
    ("written", "schedule"),
    [
        ("linear", Linear(1e-4, 1_000_000, 10_000)),
        ("cosine", Cosine(1e-4, 1_000_000, 10_000)),
        ("{kind: wsd, decay_steps: 200000}", Wsd(1e-4, 1_000_000, 10_000, 200_000)),
        ("[{start: 0, end: 400, value: 1e-3}]", Stages([Stage(0, 1e-3, 400)])),
    ],
)
def test_schedules_of_the_learning_rate(tmp_path, written, schedule):
    """They take peak, warm-up and horizon from fields of their own, also where those are overridden later."""
    config = load(tmp_path, MINIMAL, "--train.schedule", written)
    assert config.train.schedule == schedule
    again = load(tmp_path, config.to_yaml(), "--train.learning_rate", "2e-4")
    assert again.train.schedule(10_000) == (2e-4 if written[0] != "[" else 0.0)
    assert load(tmp_path, config.to_yaml()) == config


@pytest.mark.parametrize(
    "example", sorted((Path(__file__).parents[1] / "examples").glob("*.yaml")), ids=lambda p: p.name
)
def test_examples_are_sound(example):
    config = load_config(example)
    assert config == load_config(example, ["--train.steps", str(config.train.steps)])


def test_what_earlier_versions_lack_is_written_only_where_it_is_used(tmp_path):
    """They refuse fields that they do not know, and can continue a run without them."""
    plain = yaml.safe_load(load(tmp_path, MINIMAL).to_yaml())
    assert not {"schedule", "optimizer"} & set(plain["train"])
    assert list(plain) == [
        *("run", "model", "data", "sas", "train", "checkpoint", "snapshots", "watch", "evaluation", "logging")
    ]
    assert yaml.safe_load(load(tmp_path, MINIMAL, "--train.schedule", "wsd").to_yaml())["train"]["schedule"] == "wsd"


def test_when():
    when = When(every=10, dense_every=2, dense_until=6, at=(13,))
    assert [s for s in range(32) if when.due(s, 31)] == [0, 2, 4, 6, 10, 13, 20, 30, 31]
    assert [s for s in range(8) if When().due(s, 7)] == [0, 7]


def test_training_data_in_parts(tmp_path):
    assert load(tmp_path, MINIMAL).data.parts() == [("data/train", None)]
    for text, parts in (
        ("[a, b]", [("a", None), ("b", None)]),
        ("[{prefix: a, weight: 2}, {prefix: b, weight: 0.5}]", [("a", 2.0), ("b", 0.5)]),
    ):
        config = load(tmp_path, MINIMAL, "--data.train", text)
        assert config.data.parts() == parts
        assert load(tmp_path, config.to_yaml()) == config
    shape = "data.train: should be a prefix, a list of prefixes, or a list of {prefix, weight}, weight > 0, not "
    for text, message in (
        ("[]", "data.train: is an empty list"),
        ("[{prefix: a, weight: 0}]", shape),
        ("[{prefx: a}]", shape),
        ("[3]", shape),
        ("[a, {prefix: b, weight: 1}]", "data.train: some parts have a weight and some have none"),
    ):
        assert message in fault(tmp_path, MINIMAL, "--data.train", text)
    assert shape in fault(tmp_path, MINIMAL.replace("train: data/train", "train: {prefix: a}"))


def test_help_names_every_field():
    text = help_text()
    for section, info in Config.model_fields.items():
        for name, field in info.annotation.model_fields.items():
            assert f"{section}.{name} (" in text
            assert field.description in text


def test_retired_fields_are_ignored_with_one_line_each(tmp_path):
    lines: list[str] = []
    expected = load(tmp_path, MINIMAL + "model: {size: tiny}")
    path = tmp_path / "old.yaml"
    path.write_text(MINIMAL + "model: {norm_placement: post, size: tiny}\nevaluation: {max_time_share: 0.1}")
    assert load_config(path, [], lines.append) == expected
    assert [line.split(": ")[1] for line in lines] == [
        "evaluation.max_time_share is ignored",
        "model.norm_placement is ignored",
    ]
    with pytest.raises(InputError, match=r"norm_placement: 'pre' is no longer possible: .*no Hugging Face form"):
        load_config(path, ["--model.norm_placement=pre"])


def test_command_line():
    arguments, overrides = parse_arguments(
        ["--local_rank=1", "--sas.schedule", "-0.01", "--config", "a.yaml", "--run.seed=3", "--train.steps", "5"]
    )
    assert arguments.config == "a.yaml"
    assert overrides == ["--sas.schedule", "-0.01", "--run.seed=3", "--train.steps", "5"]
