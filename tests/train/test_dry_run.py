"""The dry run: what it finds, that it makes a real step, and that it leaves nothing."""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import sys
import types
from pathlib import Path

import pytest
import torch
from engine_runs import ROOT, launch, records, train
from processes import wait_until

from megatron_sas.config import load_config, read_config
from megatron_sas.core.cli import InputError
from megatron_sas.launch.environment import check_gpu
from megatron_sas.run.memory import MemoryEstimate
from megatron_sas.train import checks
from megatron_sas.train import dry_run as preflight
from megatron_sas.train.dry_run_report import of_others

SCRIPT = ROOT / "pretrain_mlm.py"
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def tree(path: Path) -> list[tuple]:
    """Everything below `path`, with sizes and times of change."""
    return sorted((str(p), p.lstat().st_size, p.lstat().st_mtime_ns) for p in path.rglob("*"))


def bytes_of(output: str, label: str) -> float:
    number, unit = re.search(rf"memory per device \({label}\): ([\d.]+) (\w+)", output).groups()
    return float(number) * {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[unit]


@pytest.mark.slow
def test_a_good_configuration(fork_server, config, tmp_path):
    """Two processes; nothing is written, and the estimate is near what was measured."""
    run, local = tmp_path / "run", tmp_path / "local"
    local.mkdir()
    before = tree(config.parent)
    buckets = ROOT / "examples" / "deepspeed" / "zero2.json"
    overrides = {"model.hidden_size": 128, "train.zero_stage": 2, "train.precision": "bf16"}
    overrides["train.deepspeed_config"] = str(buckets)
    environment = {"environment": {"TMPDIR": str(local)}}
    job = fork_server.start(config, run, overrides, ranks=2, fault=environment, main="dry_runs:as_configured")
    assert job.wait() == [0, 0], job.output()
    output = job.output()
    assert "problem" not in output
    assert "batch and DeepSpeed: 2 × 2 × 2 sequences, ZeRO-2" in output
    assert re.search(r"one step: a new run, masked-LM loss 4\.\d+", output)
    assert output.count("ready: nothing was written") == 1
    assert bytes_of(output, "estimate") == pytest.approx(bytes_of(output, "measured"), rel=0.2)
    assert not run.exists()
    assert tree(config.parent) == before
    names = {p.name for p in local.iterdir() if not p.name.startswith("torch")}  # torch makes some of its own
    assert names == {f"megatron_sas-{os.getuid()}"}


@pytest.mark.slow
def test_a_run_that_exists_is_continued_and_stays_as_it_is(fork_server, config, tmp_path):
    run = tmp_path / "run"
    train(config, run, {"train.steps": 3})
    before = tree(run)
    files = list((run / "checkpoints" / "step_00000003").glob("*.safetensors"))
    parameters = 23_584
    assert sum(f.stat().st_size for f in files) == pytest.approx(parameters * preflight.CHECKPOINT_BYTES, rel=0.1)
    allocation = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}  # from a shell that Slurm gave
    job = fork_server.start(config, run, fault={"environment": allocation}, main="dry_runs:as_configured")
    assert job.wait() == [0], job.output()
    output = job.output()
    assert "ok       processes: 1\n" in output
    assert f"one step: continuing from {run}/checkpoints/step_00000003" in output
    assert "disk space: 1 checkpoints of" in output
    assert tree(run) == before
    loss = float(re.search(r"masked-LM loss ([\d.]+)", output).group(1))
    train(config, run)  # the step that it made is the step that the run makes
    assert loss == pytest.approx(records(run)[4]["mlm_loss"], abs=1e-4)


@pytest.mark.slow
def test_all_problems_at_once(config, tmp_path):
    """Data, treebank, DeepSpeed's JSON, the output directory, TMPDIR, a package that only has the name of apex; and
    the configuration's own faults."""
    (tmp_path / "site" / "apex").mkdir(parents=True)
    (tmp_path / "site" / "apex" / "__init__.py").touch()
    (tmp_path / "file").touch()
    (tmp_path / "ds.json").write_text("{")
    fields = {
        "run.output_dir": tmp_path / "file" / "run",
        "data.train": tmp_path / "nothing",
        "evaluation.treebank": tmp_path / "no.conllu",
        "evaluation.blimp": tmp_path / "no",
        "train.deepspeed_config": tmp_path / "ds.json",
        "sas.schedule": "[{start: 5, end: 2, value: 1}]",
        "logging.evry": 3,
    }
    overrides = [f"--{name}={value}" for name, value in fields.items()]
    environment = {"TMPDIR": str(tmp_path / "gone"), "PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}"}
    output = launch(SCRIPT, "--config", config, *overrides, "--dry-run", expect=2, **environment)
    problems = {line.split(": ")[0].removeprefix("problem  ") for line in output.splitlines() if "problem " in line}
    found = {"apex", "temporary files", "batch and DeepSpeed", "training data", "treebank", "minimal pairs"}
    assert problems == found | {"output directory", "configuration"}
    assert "configuration: " + f"{config}: sas.schedule: stage 0: end 2 is not after start 5\n" in output
    assert "configuration: " + f"{config}: logging.evry: unknown field; did you mean every?\n" in output
    assert f"problem  temporary files: TMPDIR {tmp_path / 'gone'}: cannot be written; create it or set TMPDIR" in output
    assert "9 problems; a run would fail" in output
    assert "pip uninstall apex" in output
    assert "one step" not in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_a_problem_of_one_process_stops_all(config, tmp_path):
    """The other process does not wait for it in the step, and rank 0 prints whose problem it is before torchrun stops
    it."""
    (tmp_path / "dry_run.py").write_text(
        "import os, sys\n"
        "if os.environ['RANK'] == '1':\n    os.environ['TMPDIR'] = '/gone'\n"
        "from megatron_sas.train.dry_run import preflight\n"
        "code = preflight(sys.argv[1], sys.argv[2:])\nsys.stdout.flush()\nos._exit(code)\n"
    )
    arguments = [config, f"--run.output_dir={tmp_path / 'run'}"]
    output = launch(*TWO, tmp_path / "dry_run.py", *arguments, expect=1, timeout=180)
    host = socket.gethostname()
    problems = [line for line in output.splitlines() if line.startswith("problem ")]
    assert len(problems) == 1
    assert problems[0].startswith(f"problem  {host} (rank 1): temporary files: TMPDIR /gone: cannot be written")
    assert "1 problem; a run would fail" in output
    assert "one step" not in output


@pytest.mark.slow
def test_a_failure_of_one_process_in_the_step_ends_all(fork_server, config, tmp_path):
    """While the other waits for it in a collective."""
    job = fork_server.start(config, tmp_path / "run", ranks=2, main="dry_runs:out_of_memory_on_rank_1")
    assert job.wait() == [2, 2]
    assert "(rank 1): one step: Out of memory; lower train.micro_batch_size" in job.output()
    assert job.output().count("1 problem; a run would fail") == 1


@pytest.mark.slow
def test_a_process_that_dies_in_the_step_does_not_keep_the_other(fork_server, config, tmp_path):
    """Killed, as by the kernel when the host has no memory left: nobody reports it, but the collective breaks."""
    hold = {"before": "megatron_sas.train.step:Engine.update", "until": str(tmp_path / "go")}
    fault = {"hold": hold, "rank": 1}
    job = fork_server.start(config, tmp_path / "run", ranks=2, fault=fault, main="dry_runs:as_configured")
    wait_until((tmp_path / "go-reached").exists, "the step")
    job.send(signal.SIGKILL, [1])
    assert job.wait(60) == [3, -9]
    assert "lost contact with another process" in job.output()


@pytest.mark.slow
@pytest.mark.parametrize("exists", [False, True])
def test_a_directory_of_its_own_on_each_host(fork_server, config, tmp_path, exists):
    """Played by two working directories; nothing is left in them."""
    places = [tmp_path / "0", tmp_path / "1"]
    for place in places:
        (place / "run" if exists else place).mkdir(parents=True)
    before = tree(places[1])
    fault = {"directories": str(tmp_path)}
    job = fork_server.start(
        config, Path("run"), ranks=2, fault=fault, log=tmp_path / "log", main="dry_runs:as_configured"
    )
    assert job.wait() == [2, 2]
    output = job.output()
    assert "problem  one step: run.output_dir: run is not one directory for all processes: " in output
    assert "(rank 1) cannot see what rank 0 writes there; choose a directory on a file system" in output
    assert [path.name for path in places[0].rglob("*")] == (["run"] if exists else [])
    assert len(before) == len(tree(places[1]))


def test_problems_of_others_are_named_once():
    """Equal ones together; what the first process's own host has was printed when it was found."""

    def process(where, *problems, device="no GPU"):
        return [where, device, list(problems)]

    every = [process("a (rank 0)", "p"), process("a (rank 1)", "p"), process("b (rank 2)", "p", "q"), None]
    lines = of_others(every)
    assert lines == ["b (rank 2): p", "b (rank 2): q", "rank 3: processes: did not come in time"]
    every = [process("a (rank 0)", device="a GPU"), process("b (rank 1)", "q"), process("b (rank 2)", "q")]
    assert of_others(every) == [
        "b (rank 1), b (rank 2): q",
        "processes: a GPU on a (rank 0) but no GPU on b (rank 1), b (rank 2); all must train on the same",
    ]


def test_a_wrong_configuration_is_reported_beside_the_environment(tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text("run: {output_dir: x}\ndata: {train: y}\ntrain: {steps: 0, micro: 3}\n")
    assert preflight.preflight(str(tmp_path / "bad.yaml"), []) == 2
    output = capsys.readouterr().out
    assert "problem  configuration: " in output
    assert "train.steps" in output and "train.micro: unknown field" in output
    assert "ok       torch: " in output


def dry_check(settings, capsys, faulty=()):
    """The checks of a configuration (not all of a dry run, which leaves the process group that tests share)."""
    report = preflight.Report()
    preflight._check_configured(settings, report, faulty)
    return report.agree(), capsys.readouterr().out


def test_a_bad_batch_hides_neither_bad_heads_nor_bad_minimal_pairs(config, tmp_path, capsys):
    overrides = ["--train.micro_batch_size=3", "--data.heads=none_such", f"--evaluation.blimp={tmp_path / 'no'}"]
    settings, faults, faulty = read_config(config, [*overrides, f"--run.output_dir={tmp_path / 'run'}"])
    assert faults == ["train.global_batch_size: 8 is not a multiple of micro_batch_size 3"]
    agreed, output = dry_check(settings, capsys, faulty)
    assert not agreed
    assert re.findall(r"problem  (\w+ \w+): ", output) == ["training data", "minimal pairs"]
    assert "batch and DeepSpeed" not in output


def test_an_occupied_directory_hides_neither_a_missing_model_nor_a_missing_treebank(config, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    wrong = [f"--run.output_dir={run}", f"--model.init_from={tmp_path / 'model'}", "--evaluation.treebank=none.conllu"]
    agreed, output = dry_check(load_config(config, wrong), capsys)
    assert not agreed and output.count("problem ") == 3
    assert f"problem  start: run.output_dir: {run} exists but is not a run" in output
    assert "problem  model.init_from: " in output and "problem  treebank: none.conllu: no such file" in output


def test_missing_and_mistyped_fields_leave_the_rest_to_look_at(config, tmp_path):
    path = tmp_path / "partly.yaml"
    data = load_config(config).data.train
    path.write_text(f"data: {{train: {data}}}\ntrain: {{steps: x, micro_batch_size: 2, lr: 1}}\nsas: 3\n")
    settings, faults, faulty = read_config(path)
    assert settings.data.train == data and settings.train.micro_batch_size == 2
    assert faulty == {"run", "train.steps", "train.lr", "sas"}
    assert len(faults) == 4


def test_what_is_too_small_is_named(config, tmp_path, capsys):
    """Ten sequences where more are wanted; defaults are no wish."""
    run = f"--run.output_dir={tmp_path / 'run'}"
    wanted = ["--evaluation.validation_sequences=20", "--evaluation.complexity_sequences=128"]
    agreed, output = dry_check(load_config(config, [run, *wanted]), capsys)
    assert agreed
    prefix = load_config(config).data.validation
    assert f"warning  evaluation.validation_sequences: 20 are wanted, but {prefix} has 10\n" in output
    assert f"warning  evaluation.complexity_sequences: 128 are wanted, but {prefix} has 10\n" in output
    assert "warning  evaluation.complexity_sequences: TwoNN of 10 points says little; give it 100 or more\n" in output
    assert "updates of 8 read it" in output
    assert "warning" not in dry_check(load_config(config, [run, "--evaluation.validation_sequences=10"]), capsys)[1]


def test_altered_data_is_found(config, capsys):
    path = Path(load_config(config).data.train + ".bin")
    whole = path.read_bytes()
    altered = bytearray(whole)
    altered[40] ^= 1
    path.write_bytes(altered)
    try:
        assert preflight.preflight(str(config), []) == 2
    finally:
        path.write_bytes(whole)  # other tests read it too
    assert f"{path}: content does not match its checksum" in capsys.readouterr().out


def test_validation_data_that_are_trained_on(config, tmp_path, capsys):
    data = load_config(config).data.train
    settings = load_config(config, [f"--run.output_dir={tmp_path / 'run'}", f"--data.validation={data}"])

    agreed, output = dry_check(settings, capsys)
    assert f"problem  overlap: data.validation: {data} and {data} of data.train hold the same sequences; take" in output
    assert not agreed and output.count("problem ") == 1
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(settings.to_yaml())  # begun by an earlier version
    agreed, output = dry_check(settings, capsys)
    assert agreed and "overlap" not in output  # it would go on


def test_disk_space(config, tmp_path):
    settings = load_config(config, [f"--run.output_dir={tmp_path / 'a' / 'b'}"])
    assert preflight.check_disk_space(settings, 1_000).startswith("3 checkpoints of 12 KiB need 35 KiB, ")
    kept = load_config(config, ["--run.output_dir=x", "--checkpoint.keep_last=1", "--snapshots.every=2"])
    text = preflight.check_disk_space(kept, 1_000)
    assert text.startswith("2 checkpoints of 12 KiB and 4 snapshots of 2 KiB need 31 KiB, ")
    clock = load_config(config, ["--run.output_dir=x", "--checkpoint.every=null", "--train.steps=90"])
    assert preflight.check_disk_space(clock, 1_000).startswith("3 checkpoints of 12 KiB need 35 KiB, ")
    with pytest.raises(
        InputError, match=r"3 checkpoints .* need 35 KiB, but 34 KiB are free; set checkpoint\.keep_last"
    ):
        preflight.check_disk_space(settings, 1_000, free=35_000)
    assert not (tmp_path / "a").exists()


def test_checkpoints_that_are_there_have_their_room_already(config, tmp_path):
    run = tmp_path / "run"
    for step in (1, 2):
        (run / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    every = ["--checkpoint.every=1", f"--run.output_dir={run}"]
    kept = load_config(config, [*every, "--checkpoint.keep_last=2"])
    assert preflight.check_disk_space(kept, 1_000).startswith("1 checkpoints of 12 KiB need ")
    more = load_config(config, [*every, "--checkpoint.keep_last=2", "--checkpoint.keep_every=2"])  # steps 4 and 6 too
    assert preflight.check_disk_space(more, 1_000).startswith("4 checkpoints of 12 KiB need ")


def test_a_directory_that_cannot_be_written(tmp_path):
    def refuse(**_):
        raise OSError(30, "Read-only file system")

    with pytest.raises(InputError, match=r"cannot be written \(Read-only file system\); choose another directory"):
        preflight.check_output_directory(tmp_path / "run", refuse)


def test_a_model_that_does_not_fit():
    with pytest.raises(InputError, match=r"do not fit into the .* lower train\.micro_batch_size"):
        preflight.check_memory(MemoryEstimate(1e15, 0, 0, 0, 0))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU's memory counts here")
def test_a_process_has_its_share_of_the_hosts_memory(monkeypatch):
    """As the deepspeed launcher says how many there are."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setenv("LOCAL_SIZE", "4")
    assert preflight.free_memory(on_host=8 * 2**30) == (2 * 2**30, "a process's share of this host")
    assert preflight.check_memory(MemoryEstimate(1, 0, 0, 0, 0)).endswith(" free")


def yes():
    return True


def no():
    return False


class TestEnvironment:
    """Wrong environments, played by telling the checks what they would find."""

    def test_torch_without_cuda(self, tmp_path):
        with pytest.raises(InputError, match=r"built without CUDA; install the CUDA build"):
            checks.check_torch(built_for=None, has_gpu=no, gpu_device=tmp_path)

    def test_a_gpu_that_the_driver_does_not_offer(self, tmp_path):
        with pytest.raises(InputError, match=r"no usable GPU .*nvidia-smi"):
            checks.check_torch(built_for="12.8", has_gpu=no, gpu_device=tmp_path)

    def test_fewer_gpus_than_processes(self, monkeypatch):
        """`srun --gpus-per-task=1` shows each process one, as number 0."""
        monkeypatch.setenv("LOCAL_RANK", "1")
        fault = r"process 1 of this host needs a GPU of its own but sees only 1; .* --gpus-per-node"
        with pytest.raises(InputError, match=fault):
            check_gpu(gpus=1)
        with pytest.raises(InputError, match=r"process 1 of this host needs a GPU of its own"):
            checks.check_torch(has_gpu=yes)
        with pytest.raises(InputError, match=r"process 1 of this host needs a GPU of its own"):
            preflight.free_memory(has_gpu=yes)

    def test_old_torch(self):
        with pytest.raises(InputError, match=r"torch 2\.9\.1\+cu128 is too old; pip install -r requirements\.txt"):
            checks.check_torch(version="2.9.1+cu128")

    def test_no_nccl(self):
        with pytest.raises(InputError, match=r"has no NCCL, which GPUs need; install"):
            checks.check_collectives(has_gpu=yes, has_nccl=no)

    def test_no_triton(self):
        with pytest.raises(InputError, match="triton is missing"):
            checks.check_triton(has_gpu=yes, find_spec=lambda name: None)

    def test_a_compiler_only_where_one_is_needed(self, monkeypatch):
        monkeypatch.setenv("PATH", "/nowhere")
        assert checks.check_compiler(has_gpu=no).startswith("not needed")
        with pytest.raises(InputError, match=r"no compiler .* Triton"):
            checks.check_compiler(has_gpu=yes)

    def test_foreign_apex(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
        with pytest.raises(InputError, match="pip uninstall apex"):
            checks.check_apex(find_spec=lambda name: object())
        normalization = types.ModuleType("apex.normalization")
        normalization.FusedLayerNorm = object
        monkeypatch.setitem(sys.modules, "apex.normalization", normalization)
        assert checks.check_apex(find_spec=lambda name: object()) == "NVIDIA's"

    def test_few_open_files(self):
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
            with pytest.raises(InputError, match=r"only 256 open files .*ulimit -n 4096"):
                checks.check_open_files()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
