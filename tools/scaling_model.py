"""What training costs on more GPUs than are at hand, by formula: communication, time, memory, checkpoints, disk.

    python tools/scaling_model.py                             # prints the tables
    python tools/scaling_model.py --write docs/scaling.md     # renews the tables in the page
    python tools/scaling_model.py --mfu 0.3 --nics-per-node 1 # another cluster

Every assumption is an option, and the first table lists them. What is counted rather than assumed (bytes communicated,
memory, checkpoint sizes) is compared with real runs by the tests.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import _checkout
from megatron_sas.core.cli import InputError, run_main
from megatron_sas.core.files import write_text_atomic
from megatron_sas.model.config import SIZES, BertConfig

GPUS = (1, 2, 8, 16, 64, 256, 1024)
COLUMNS = tuple(f"{gpus:,} GPU{'s' if gpus > 1 else ''}" for gpus in GPUS)
STAGES = (0, 1, 2, 3)
INTERCONNECTS = (  # per node: adapters, GB/s each
    ("8 × InfiniBand NDR, 400 Gb/s", 8, 50),
    ("4 × InfiniBand HDR, 200 Gb/s", 4, 25),
    ("1 × InfiniBand NDR, 400 Gb/s", 1, 50),
    ("1 × InfiniBand HDR, 200 Gb/s", 1, 25),
    ("1 × Ethernet, 100 Gb/s", 1, 12.5),
    ("1 × Ethernet, 10 Gb/s", 1, 1.25),
)
SEQ_LENGTH, MASK_PROB = 512, 0.15
PAPER_BATCH = 256  # sequences
BUCKET = 50_000_000  # elements, as in examples/deepspeed
ADAM_BYTES = 28  # per parameter: gradient, weight and two moments read (16), three written (12), float32


def _input(default: float, help_: str) -> float:
    return field(default=default, metadata={"help": help_})


@dataclass(frozen=True)
class Cluster:
    """The assumptions."""

    gpu: str = field(default="NVIDIA H100 80GB HBM3", metadata={"help": "peak from run/throughput.py (data sheet)"})
    gpu_memory_gb: float = _input(80, "GB of memory per GPU (data sheet)")
    mfu: float = _input(0.4, "share of the bf16 peak that one GPU alone reaches: a target, measure your own")
    memory_tb_s: float = _input(3.35, "TB/s of GPU memory (data sheet); bounds the optimizer's time")
    gpus_per_node: int = _input(8, "GPUs joined by NVLink")
    nvlink_gb_s: float = _input(450, "GB/s per GPU and direction (H100 data sheet: 900 both ways)")
    nics_per_node: int = _input(8, "network adapters per node (DGX H100: 8 × ConnectX-7)")
    nic_gb_s: float = _input(50, "GB/s per adapter and direction (InfiniBand NDR, 400 Gb/s)")
    utilisation: float = _input(0.8, "share of these bandwidths that large collectives reach: an estimate")
    latency_us: float = _input(20, "µs to start one collective: an estimate")
    hop_us: float = _input(5, "µs more per doubling of the number of GPUs: an estimate")
    mtbf_gpu_hours: float = _input(50_676, "hours between failures, per GPU: 419 in 54 days of 16,384 (Llama 3, 2024)")
    storage_gb_s: float = _input(2, "GB/s to the shared file system: an estimate")
    restart_minutes: float = _input(5, "minutes from a failure to the next step: an estimate")


@dataclass(frozen=True)
class Model:
    """A model and the micro-batch that the tables use for it."""

    name: str
    shape: BertConfig
    micro_batch: int

    @property
    def parameters(self) -> int:
        """Their number, with the padded vocabulary."""
        from megatron_sas.run.memory import count_parameters

        return count_parameters(self.shape)

    @property
    def checkpoint_bytes(self) -> int:
        """Of a complete state."""
        from megatron_sas.train.dry_run import CHECKPOINT_BYTES

        return self.parameters * CHECKPOINT_BYTES

    @property
    def flops(self) -> float:
        """Per token, forward and backward."""
        from megatron_sas.run.throughput import flops_per_token

        return flops_per_token(self.shape, SEQ_LENGTH, MASK_PROB)


MODELS = (
    Model("BERT-base", BertConfig(**SIZES["base"]), 32),
    Model("BERT-large", BertConfig(**SIZES["large"]), 32),
    Model("1B encoder", BertConfig(num_layers=24, hidden_size=1920, num_heads=30, intermediate_size=7680), 16),
)


@dataclass(frozen=True)
class Collective:
    """A kind of message that an update sends: `elements` in total over `calls` calls."""

    kind: str  # all_reduce, all_gather or reduce_scatter
    elements: float
    element_bytes: int
    calls: float

    def bytes_sent(self, gpus: int) -> float:
        """By each GPU, with a ring: an all-reduce is a reduce-scatter and an all-gather."""
        return (2 if self.kind == "all_reduce" else 1) * (gpus - 1) / gpus * self.elements * self.element_bytes


def collectives(
    stage: int, precision: str, parameters: int, accumulation: int, modules: int = 0, kept: int = 0
) -> list[Collective]:
    """What one update communicates, as DeepSpeed 0.19.8 does it (single numbers are left out).

    ZeRO-1 and -2 reduce gradients by all-reduce, not by reduce-scatter (`use_multi_rank_bucket_allreduce`); ZeRO-2
    and -3 do it for every micro-batch. ZeRO-3 gathers the weights of each of `modules` modules for every forward and
    again for every backward, except `kept` parameters, which are gathered once an update: those smaller than
    `stage3_param_persistence_threshold`.
    """
    size = 2 if precision == "bf16" and stage > 0 else 4
    buckets = math.ceil(parameters / BUCKET)
    if stage == 0:
        return [Collective("all_reduce", parameters, size, 1)]
    if stage < 3:
        rounds = 1 if stage == 1 else accumulation
        return [
            Collective("all_reduce", rounds * parameters, size, rounds * buckets),
            Collective("all_gather", parameters, size, buckets),
        ]
    passes = 2 * accumulation
    return [
        Collective("reduce_scatter", accumulation * parameters, size, accumulation * buckets),
        Collective("all_gather", passes * (parameters - kept) + kept, size, passes * modules),
    ]


def modules(shape: BertConfig) -> int:
    """Modules with weights of their own: 6 a layer, 4 of the embeddings, 3 of the head."""
    return 6 * shape.num_layers + 7


@dataclass(frozen=True)
class Step:
    """Seconds of one update on one GPU; nothing is assumed to overlap."""

    compute: float
    optimizer: float
    communication: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.compute + self.optimizer + self.communication


def bandwidth(cluster: Cluster, gpus: int) -> float:
    """Bytes per second that each GPU can send in a ring: NVLink, or all adapters of a node together between nodes."""
    slowest = cluster.nvlink_gb_s
    if gpus > cluster.gpus_per_node:
        slowest = min(slowest, cluster.nics_per_node * cluster.nic_gb_s)
    return slowest * 1e9 * cluster.utilisation


def step_time(cluster: Cluster, model: Model, stage: int, gpus: int, micro_batch: int, accumulation: int) -> Step:
    """Seconds of an update of `gpus` × `micro_batch` × `accumulation` sequences."""
    import torch

    from megatron_sas.run.throughput import peak_flops

    tokens = micro_batch * accumulation * SEQ_LENGTH
    peak = peak_flops(cluster.gpu, torch.bfloat16)
    if peak is None:
        raise InputError(f"--gpu {cluster.gpu}: unknown; name it as torch.cuda.get_device_name() does")
    share = gpus if stage else 1
    latency = (cluster.latency_us + cluster.hop_us * math.log2(gpus)) * 1e-6
    messages = collectives(stage, "bf16", model.parameters, accumulation, modules(model.shape)) if gpus > 1 else []
    return Step(
        compute=tokens * model.flops / (peak * cluster.mfu),
        optimizer=ADAM_BYTES * model.parameters / share / (cluster.memory_tb_s * 1e12 * cluster.utilisation),
        communication=sum(m.bytes_sent(gpus) / bandwidth(cluster, gpus) + m.calls * latency for m in messages),
    )


def checkpoint_interval(cost: float, mtbf: float) -> float:
    """Seconds of work between checkpoints that lose least, after Daly (2006, eq. 37); `cost` and `mtbf` in seconds."""
    if cost >= 2 * mtbf:
        return mtbf
    ratio = cost / (2 * mtbf)
    return math.sqrt(2 * cost * mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def assumptions(cluster: Cluster) -> str:
    """The options with their values and sources."""
    rows = [
        (f"`--{f.name.replace('_', '-')}`", value if isinstance(value, str) else f"{value:,g}", f.metadata["help"])
        for f in dataclasses.fields(cluster)
        for value in [getattr(cluster, f.name)]
    ]
    return table(("Option", "Value", "Meaning and source"), rows).replace("--: | --:", "--: | ---")


def models(_: Cluster) -> str:
    """Sizes of the three models."""
    rows = [
        (m.name, f"{m.parameters / 1e6:,.0f} M", f"{m.flops / 1e9:.2f}", f"{m.checkpoint_bytes / 1e9:.2f}")
        for m in MODELS
    ]
    return table(("Model", "Parameters", "GFLOP per token", "Checkpoint, GB"), rows)


def volume(cluster: Cluster) -> str:
    """Bytes and seconds of communication for BERT-base."""
    model, rows = MODELS[0], []
    for accumulation in (1, 8):
        for stage in STAGES:
            messages = collectives(stage, "bf16", model.parameters, accumulation, modules(model.shape))
            sent = [sum(m.bytes_sent(gpus) for m in messages) for gpus in GPUS]
            rows.append((f"ZeRO-{stage}, accumulation {accumulation}", *[f"{b / 1e9:.2f}" for b in sent]))
    return table(("GB sent per GPU and update", *COLUMNS), rows)


def interconnects(cluster: Cluster) -> str:
    """ZeRO-1's communication between nodes against bandwidth, and what it leaves of the speed."""
    gpus, rows = 64, []
    for label, adapters, speed in INTERCONNECTS:
        other = dataclasses.replace(cluster, nics_per_node=adapters, nic_gb_s=speed)
        cells = []
        for model in MODELS:
            for accumulation in (1, 8):
                step = step_time(other, model, 1, gpus, model.micro_batch, accumulation)
                cells.append(f"{step.communication * 1e3:.0f} ({(step.total - step.communication) / step.total:.0%})")
        rows.append((label, f"{bandwidth(other, gpus) / 1e9:.0f}", *cells))
    header = [f"{model.name}, accumulation {a}" for model in MODELS for a in (1, 8)]
    return table(("ms of ZeRO-1 at 64 GPUs (efficiency)", "GB/s", *header), rows)


def weak_scaling(cluster: Cluster) -> str:
    """Step time and efficiency with a fixed micro-batch per GPU."""
    rows = []
    for model in MODELS:
        for stage in STAGES:
            alone = step_time(cluster, model, stage, 1, model.micro_batch, 1)
            cells = []
            for gpus in GPUS:
                step = step_time(cluster, model, stage, gpus, model.micro_batch, 1)
                cells.append(f"{step.total * 1e3:.0f} ({alone.total / step.total:.0%})")
            rows.append((f"{model.name}, {model.micro_batch} sequences, ZeRO-{stage}", *cells))
    return table(("ms per update (efficiency)", *COLUMNS), rows)


def strong_scaling(cluster: Cluster) -> str:
    """The paper's batch, divided among ever more GPUs; ZeRO-1."""
    rows = []
    for model in MODELS:
        alone = step_time(cluster, model, 1, 1, model.micro_batch, PAPER_BATCH // model.micro_batch).total
        cells = []
        for gpus in GPUS:
            if gpus > PAPER_BATCH:
                cells.append("no: fewer sequences than GPUs")
                continue
            micro = min(model.micro_batch, PAPER_BATCH // gpus)
            step = step_time(cluster, model, 1, gpus, micro, PAPER_BATCH // (gpus * micro)).total
            cells.append(f"{step * 1e3:.1f} ms, {step * 1e5 / 3600:.1f} h ({alone / step / gpus:.0%})")
        rows.append((model.name, *cells))
    return table(("256 sequences an update", *COLUMNS), rows)


def memory(cluster: Cluster) -> str:
    """Peak memory per GPU by stage."""
    from megatron_sas.run.memory import estimate_memory

    zero = {"reduce_bucket_size": BUCKET, "stage3_max_live_parameters": 1e8, "stage3_prefetch_bucket_size": 2e7}
    offload = {**zero, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    rows = []
    for model in MODELS:
        for stage, label, settings in [(s, f"ZeRO-{s}", zero) for s in STAGES] + [(3, "ZeRO-3, offload", offload)]:
            cells = []
            for gpus in GPUS:
                estimate = estimate_memory(
                    model.shape,
                    world_size=gpus,
                    zero_stage=stage,
                    precision="bf16",
                    accumulation=2,
                    micro_batch_size=model.micro_batch,
                    seq_length=SEQ_LENGTH,
                    mask_prob=MASK_PROB,
                    zero_optimization=settings,
                )
                over = " (too much)" if estimate.total > cluster.gpu_memory_gb * 1e9 else ""
                cells.append(f"{estimate.total / 1e9:.1f}{over}")
            rows.append((f"{model.name}, {label}", *cells))
    return table(("GB per GPU", *COLUMNS), rows)


def failures(cluster: Cluster) -> str:
    """Checkpoint intervals by number of GPUs."""
    rows = []
    for model in MODELS:
        for gpus in (8, 64, 256, 1024):
            mtbf = cluster.mtbf_gpu_hours * 3600 / gpus
            cost = model.checkpoint_bytes / (cluster.storage_gb_s * 1e9)
            young, daly = math.sqrt(2 * cost * mtbf), checkpoint_interval(cost, mtbf)
            lost = cost / (daly + cost) + (daly / 2 + cluster.restart_minutes * 60) / mtbf
            step = step_time(cluster, model, 1, gpus, model.micro_batch, 1).total
            rows.append(
                (
                    f"{model.name}, {gpus:,} GPUs",
                    f"{mtbf / 3600:,.0f}",
                    f"{cost:.1f}",
                    f"{young / 60:.0f}",
                    f"{daly / 60:.0f}",
                    f"{daly / step:,.0f}",
                    f"{lost:.2%}",
                )
            )
    header = ("", "MTBF, h", "cost of a checkpoint, s", "Young, min", "Daly, min", "Daly, updates", "time lost")
    return table(header, rows)


def disk(_: Cluster) -> str:
    """Packed data, checkpoints and snapshots."""
    from megatron_sas.config import load_config

    config = load_config(Path(__file__).resolve().parents[1] / "examples" / "paper-base.yaml")
    last = config.train.steps
    checkpoints, snapshots = (
        sum(when.due(step, last) for step in range(last + 1)) for when in (config.checkpoint, config.snapshots)
    )
    rows = [
        ("Packed data, per token", "6 bytes: token 2, head 2, marks 1, relation 1"),
        ("Wikipedia and BookCorpus, 3.3 G words (Devlin et al.), about 4.4 G tokens", f"{4.4e9 * 6 / 1e9:.0f} GB"),
        ("The paper's run reads 13.1 G tokens", f"{13.1e9 * 6 / 1e9:.0f} GB over the run"),
    ]
    for model in MODELS:
        n = model.parameters
        rows.append(
            (
                f"{model.name}, on the schedules of examples/paper-base.yaml",
                f"{checkpoints * model.checkpoint_bytes / 1e9:,.0f} GB for {checkpoints} checkpoints, "
                f"{snapshots * n * 4 / 1e9:,.0f} GB for {snapshots} snapshots in float32, "
                f"{snapshots * n * 2 / 1e9:,.0f} GB in bf16",
            )
        )
    return table(("What", "How much"), rows).replace("| --: |", "| --- |")


BLOCKS = {
    function.__name__: function
    for function in (assumptions, models, volume, interconnects, weak_scaling, strong_scaling, memory, failures, disk)
}


def renew(page: str, cluster: Cluster) -> str:
    """`page` with the text between `<!-- NAME -->` and `<!-- end -->` computed anew for every name in `BLOCKS`."""
    missing = [name for name in BLOCKS if f"<!-- {name} -->" not in page]
    if missing:
        raise InputError(f"the page has no <!-- {missing[0]} --> … <!-- end --> for a table; add it")
    for name, function in BLOCKS.items():
        block = f"<!-- {name} -->\n{function(cluster)}\n<!-- end -->"
        page = re.sub(rf"<!-- {name} -->\n.*?<!-- end -->", lambda _, block=block: block, page, flags=re.DOTALL)
    return page


def main() -> None:
    """Print the tables or write them into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", metavar="FILE.md", type=Path, help="renew the tables in this page")
    for item in _fields():
        parser.add_argument(
            f"--{item.name.replace('_', '-')}",
            type=type(item.default),
            default=item.default,
            help=f"{item.metadata['help']} (default %(default)s)",
        )
    arguments = vars(parser.parse_args())
    page = arguments.pop("write")
    cluster = Cluster(**arguments)
    if page is None:
        for name, function in BLOCKS.items():
            print(f"\n## {name.replace('_', ' ')}\n\n{function(cluster)}")
    else:
        write_text_atomic(page, renew(page.read_text(encoding="utf-8"), cluster))


def _fields() -> Iterator[dataclasses.Field]:
    yield from dataclasses.fields(Cluster)


if __name__ == "__main__":
    run_main(main)
