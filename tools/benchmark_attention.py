"""Time, memory and error of dependency attention, backend by backend, beside torch's own attention.

    python tools/benchmark_attention.py --seq-lengths 128 512 --head-dims 32 64 --output attention.json
    python tools/benchmark_attention.py --tokens 16384 --num-heads 12 --maps 144 --precision bf16 --dropout 0.1

q, k and v are views of one tensor, and gradients come token by token, as in the model. Forward and backward are timed
apart, all variants taking turns. On a GPU a turn is one call that is not timed and then 1 to 20, as many as take 20 ms,
between two of the GPU's time stamps; `host ms` is how long Python took to queue a forward and a backward: where it is
not the smaller number, Python was measured. The regularizer's gradient on the two probabilities of each token is

    none      no edges are asked for
    max       non-zero in one of --maps (layer, head) pairs only, as the `max` regularizer's
    uniform   non-zero everywhere, as the `uniform` regularizer's

Peers are torch's scaled_dot_product_attention without edges (on GPUs, each of its kernels) and `reference`, which forms
whole maps as the paper's code does. An error is ‖x - exact‖ / ‖exact‖, exact in float64 from the same inputs, the
largest of dq, dk, dv; with dropout, whose masks differ, it is not measured.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import _checkout
from megatron_sas.core.cli import InputError, first_line, run_main
from megatron_sas.core.device import DEVICE_HELP, DTYPES, choose_device
from megatron_sas.core.files import check_absent, write_json_atomic

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from megatron_sas.core.benchmark import Times

PEERS = {
    "cpu": {"torch sdpa": "FLASH_ATTENTION"},
    "cuda": {
        "torch flash (FA2)": "FLASH_ATTENTION",
        "torch cudnn": "CUDNN_ATTENTION",
        "torch efficient": "EFFICIENT_ATTENTION",
    },
}
"""torch's own kernels by kind of device, by their names in `SDPBackend`."""
EXACT_SEQUENCES = 2  # whole maps in float64 are large; sequences do not depend on each other
QUEUE_SECONDS = 0.02  # on a GPU
GRADIENTS = ("none", "max", "uniform")
PRECISIONS = {**DTYPES, "fp16": "float16"}


class Variant:
    """One way to compute attention on fixed inputs; keeps its graph between forward and backward."""

    def __init__(self, name: str, attend: Callable[..., tuple], qkv: list[Tensor], gradients: list[Tensor]) -> None:
        self.name, self.attend, self.gradients = name, attend, gradients
        self.qkv = [x.detach().requires_grad_() for x in qkv]  # of the same memory: a copy would lose the layout
        self.forward()
        self.backward()

    def forward(self) -> None:
        """Compute the outputs."""
        self.outputs = [x for x in self.attend(*self.qkv) if x is not None]

    def backward(self) -> tuple[Tensor, ...]:
        """Gradients of q, k and v; can be repeated."""
        import torch

        return torch.autograd.grad(self.outputs, self.qkv, self.gradients, retain_graph=True)


def short_heads(batch: int, seq: int, device: torch.device) -> Tensor:
    """int64 `(B, S)`: three tokens in four have a head, most of them one to three tokens away."""
    import torch

    distance = torch.empty(batch, seq, device=device).geometric_(0.35).long()
    heads = (
        torch.arange(seq, device=device) + torch.where(torch.rand(batch, seq, device=device) < 0.5, -1, 1) * distance
    )
    without = (torch.rand(batch, seq, device=device) < 0.25) | (heads < 0) | (heads >= seq)
    return torch.where(without, -1, heads)


def build_variants(
    arguments: argparse.Namespace,
    batch: int,
    seq: int,
    dim: int,
    device: torch.device,
    left_out: dict[str, str],
) -> list[tuple]:
    """(backend, gradient, variant, the same in float64) for every backend that takes such inputs, and the peers.

    `left_out` gets the others, with the reason.
    """
    import torch
    from torch._functorch import config as functorch_config

    from megatron_sas.kernels import BACKENDS

    torch._dynamo.reset()  # or FlexAttention would not be compiled for more than eight sizes
    functorch_config.donated_buffer = False  # or what is compiled refuses to repeat a backward
    torch.manual_seed(arguments.seed)
    num_heads, dtype = arguments.num_heads, getattr(torch, PRECISIONS[arguments.precision])
    q, k, v = torch.randn(batch, seq, 3, num_heads, dim, device=device).to(dtype).permute(2, 0, 3, 1, 4)
    grad_out = torch.randn(batch, seq, num_heads, dim, device=device).to(dtype).transpose(1, 2)
    heads = short_heads(batch, seq, device)
    rows = []
    for gradient in GRADIENTS:
        used, gradients = None, [grad_out]
        if gradient != "none":
            used = heads
            shape = (2, batch, num_heads, seq)
            chosen = torch.rand(shape, device=device) < (1 / arguments.maps if gradient == "max" else 1.0)
            gradients += torch.randn(shape, device=device) * chosen
        exact = None
        if arguments.dropout == 0.0:
            exact = Variant(
                "exact",
                _ours("reference", used, 0.0),
                [x[:EXACT_SEQUENCES].double() for x in (q, k, v)],
                [g[:EXACT_SEQUENCES].double() for g in gradients],
            )
        candidates = {name: _ours(name, used, arguments.dropout) for name in BACKENDS}
        if gradient == "none":
            candidates |= {name: _peer(kind, arguments.dropout) for name, kind in PEERS[device.type].items()}
        for name, attend in candidates.items():
            try:
                rows.append((name, gradient, Variant(f"{name}, {gradient}", attend, [q, k, v], gradients), exact))
            except ValueError as error:  # a backend's refusal
                left_out[name] = first_line(error)
            except RuntimeError as error:
                left_out[f"{name}, {gradient}, S {seq}, D {dim}"] = first_line(error)
    return rows


def _ours(backend: str, heads: Tensor | None, dropout_p: float) -> Callable[..., tuple]:
    from megatron_sas.kernels import dependency_attention

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple:
        used = None if heads is None else heads[: len(q)]
        return dependency_attention(q, k, v, used, dropout_p=dropout_p, backend=backend)

    return attend


def _peer(kind: str, dropout_p: float) -> Callable[..., tuple]:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple:
        with sdpa_kernel(getattr(SDPBackend, kind)):
            return (scaled_dot_product_attention(q, k, v, dropout_p=dropout_p),)

    return attend


def relative_error(found: Tensor, exact: Tensor) -> float:
    """‖found - exact‖ / ‖exact‖."""
    found, exact = found.detach()[: len(exact)].double(), exact.detach()
    return float((found - exact).norm() / exact.norm())


def measure(
    arguments: argparse.Namespace, seq: int, dim: int, device: torch.device, left_out: dict[str, str]
) -> list[dict[str, Any]]:
    """One record for each backend and gradient at this size; `left_out` gets what has none, with the reason."""
    from megatron_sas.core.benchmark import time_interleaved

    batch = arguments.batch if arguments.tokens is None else max(1, arguments.tokens // seq)
    rows = build_variants(arguments, batch, seq, dim, device, left_out)
    actions = {f"{row[2].name} {part}": getattr(row[2], part) for row in rows for part in ("forward", "backward")}
    without_memory: dict[str, str] = {}
    times = time_interleaved(actions, arguments.rounds, device, queue_seconds=QUEUE_SECONDS, left_out=without_memory)
    left_out |= {f"{name}, S {seq}, D {dim}": reason for name, reason in without_memory.items()}
    records = []
    for backend, gradient, variant, exact in rows:
        if any(f"{variant.name} {part}" in without_memory for part in ("forward", "backward")):
            continue
        parts: dict[str, Times] = {part: times[f"{variant.name} {part}"] for part in ("forward", "backward")}
        record = {
            "batch": batch,
            "seq_length": seq,
            "head_dim": dim,
            "backend": backend,
            "gradient": gradient,
            **{f"{part}_seconds": statistics.median(t.wall) for part, t in parts.items()},
            **{f"{part}_cpu_seconds": statistics.median(t.cpu) for part, t in parts.items()},
            **{f"{part}_host_seconds": statistics.median(t.host) if t.host else None for part, t in parts.items()},
            "peak_bytes": peak_memory(variant, device),
        }
        if exact is not None:
            pairs = zip(variant.backward(), exact.backward(), strict=True)
            record["output_error"] = relative_error(variant.outputs[0], exact.outputs[0])
            record["gradient_error"] = max(relative_error(ours, true) for ours, true in pairs)
        records.append(record)
    return records


def peak_memory(variant: Variant, device: torch.device) -> int | None:
    """Bytes that a forward and backward hold at most, inputs aside; None where torch does not count them."""
    import torch

    if device.type != "cuda":
        return None
    variant.outputs = []
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    variant.forward()
    variant.backward()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def table(records: list[dict[str, Any]]) -> str:
    """The records as Markdown."""
    lines = [
        "| B | S | D | backend | gradient | forward ms | backward ms | host ms | CPU ms | peak MiB | error of out "
        "| of gradients |",
        "|---:|---:|---:|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in records:
        cpu = r["forward_cpu_seconds"] + r["backward_cpu_seconds"]
        host = [r["forward_host_seconds"], r["backward_host_seconds"]]
        queued = "-" if None in host else f"{1000 * sum(host):.3f}"
        peak = "-" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 2**20:,.0f}"
        errors = " | ".join(f"{r[n]:.1e}" if n in r else "-" for n in ("output_error", "gradient_error"))
        lines.append(
            f"| {r['batch']} | {r['seq_length']} | {r['head_dim']} | {r['backend']} | {r['gradient']} "
            f"| {1000 * r['forward_seconds']:.3f} | {1000 * r['backward_seconds']:.3f} | {queued} | {1000 * cpu:.2f} "
            f"| {peak} | {errors} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-lengths", type=int, nargs="+", default=[128, 512], help="tokens (128 512)")
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64], help="dimensions of a head (64)")
    parser.add_argument("--batch", type=int, default=4, help="sequences (4)")
    parser.add_argument("--tokens", type=int, help="instead of --batch: as many sequences as have so many")
    parser.add_argument("--num-heads", type=int, default=4, help="attention heads (4)")
    parser.add_argument("--maps", type=int, default=16, help="layers × heads among which `max` chooses one (16)")
    parser.add_argument("--dropout", type=float, default=0.0, help="of attention probabilities (0)")
    parser.add_argument("--rounds", type=int, default=10, help="rounds in which every variant runs once (10)")
    parser.add_argument("--device", help=DEVICE_HELP)
    parser.add_argument("--precision", choices=tuple(PRECISIONS), default="fp32", help="of q, k and v (fp32)")
    parser.add_argument("--threads", type=int, help="CPU threads (torch's default)")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (0)")
    parser.add_argument("--output", metavar="FILE.json", help="write the records here")
    parser.add_argument("--overwrite", action="store_true", help="replace the output")
    arguments = parser.parse_args()
    for name in ("seq_lengths", "head_dims", "batch", "tokens", "num_heads", "maps", "rounds"):
        value = getattr(arguments, name)
        if value is not None and min(value if isinstance(value, list) else [value]) < 1:
            raise InputError(f"--{name.replace('_', '-')}: must be at least 1")
    if not 0.0 <= arguments.dropout < 1.0:
        raise InputError("--dropout: must be at least 0 and less than 1")
    if arguments.output:
        check_absent(arguments.output, arguments.overwrite)
    import torch

    from megatron_sas.core.benchmark import describe_device

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = choose_device(arguments.device)
    left_out: dict[str, str] = {}
    records = [
        record
        for seq in arguments.seq_lengths
        for dim in arguments.head_dims
        for record in measure(arguments, seq, dim, device, left_out)
    ]
    described = describe_device(device)
    names = ("num_heads", "maps", "precision", "dropout", "rounds")
    shape = {name: getattr(arguments, name) for name in names}
    print(", ".join(f"{name} {value}" for name, value in (described | shape).items()))
    print(f"\n{table(records)}")
    for name, reason in left_out.items():
        print(f"\n{name} is left out: {reason}")
    if arguments.output:
        write_json_atomic(arguments.output, {"device": described, **shape, "records": records, "left_out": left_out})


if __name__ == "__main__":
    run_main(main)
