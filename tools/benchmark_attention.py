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
    alone     as uniform, and that of the output is zero: R is the whole loss

Peers are torch's scaled_dot_product_attention without edges (on GPUs, each of its kernels) and `reference`, which forms
whole maps as the paper's code does. TFLOP/s count the two products of the forward and the five of the backward. An
error is ‖x - exact‖ / ‖exact‖, exact in float64 from the same inputs; that of gradients is the largest of dq, dk, dv,
relative to the largest of their norms and that of the gradients at the entries, whose sum may vanish. With dropout,
whose masks differ, it is not measured. --tolerance makes it a check, with exit code 1 for a larger error or a backend
that fails.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import _checkout
from megatron_sas.core.cli import InputError, first_line, kind_and_reason, run_main
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
GRADIENTS = ("none", "max", "uniform", "alone")
PRECISIONS = {**DTYPES, "fp16": "float16"}
PRODUCTS = {"forward": 2, "backward": 5}  # of matrices (S, D) and (S, S); a flash backward forms the scores again


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
    """int64 `(B, S)`: three tokens in four have a head, most of them one to three tokens away; one token is its own."""
    import torch

    if seq == 1:
        return torch.zeros(batch, 1, dtype=torch.int64, device=device)
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
    failed: dict[str, str],
) -> list[tuple]:
    """(backend, gradient, variant, the same in float64) for every backend that takes such inputs, and the peers.

    `left_out` gets the others, with the reason; `failed` those that take them and then raise an error.
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
    for gradient in arguments.gradients:
        used, gradients = None, [torch.zeros_like(grad_out) if gradient == "alone" else grad_out]
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
        candidates = {name: _ours(name, used, arguments.dropout) for name in arguments.backends or BACKENDS}
        if gradient == "none":
            candidates |= {name: _peer(kind, arguments.dropout) for name, kind in PEERS[device.type].items()}
        for name, attend in candidates.items():
            try:
                rows.append((name, gradient, Variant(f"{name}, {gradient}", attend, [q, k, v], gradients), exact))
            except ValueError as error:  # a backend's refusal
                left_out[name] = first_line(error)
            except Exception as error:  # compilers of kernels have all kinds
                expected = name not in BACKENDS or isinstance(error, torch.OutOfMemoryError)
                (left_out if expected else failed)[f"{name}, {gradient}, S {seq}, D {dim}"] = kind_and_reason(error)
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


def gradient_error(found: tuple[Tensor, ...], exact: Variant) -> float:
    """The largest ‖x - exact‖ of dq, dk and dv, relative to the largest term that they are sums of."""
    true = exact.backward()
    entries = zip(exact.outputs[1:], exact.gradients[1:], strict=True)  # with `randn` inputs ‖scale · k‖ is about 1
    size = max(float(x.detach().norm()) for x in (*true, *(p * g for p, g in entries)))
    return max(float((a[: len(b)].double() - b).norm()) for a, b in zip(found, true, strict=True)) / size


def measure(
    arguments: argparse.Namespace,
    seq: int,
    dim: int,
    device: torch.device,
    left_out: dict[str, str],
    failed: dict[str, str],
) -> list[dict[str, Any]]:
    """One record for each backend and gradient at this size; `left_out` and `failed` get what has none, and why."""
    from megatron_sas.core.benchmark import time_interleaved

    batch = arguments.batch if arguments.tokens is None else max(1, arguments.tokens // seq)
    rows = build_variants(arguments, batch, seq, dim, device, left_out, failed)
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
        products = 2 * batch * arguments.num_heads * seq**2 * dim
        record |= {f"{part}_tflops": products * n / record[f"{part}_seconds"] / 1e12 for part, n in PRODUCTS.items()}
        if exact is not None:
            record["output_error"] = relative_error(variant.outputs[0], exact.outputs[0])
            record["gradient_error"] = gradient_error(variant.backward(), exact)
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
        "| B | S | D | backend | gradient | forward ms | backward ms | forward TFLOP/s | backward TFLOP/s | host ms "
        "| CPU ms | peak MiB | error of out | of gradients |",
        "|---:|---:|---:|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in records:
        cpu = r["forward_cpu_seconds"] + r["backward_cpu_seconds"]
        host = [r["forward_host_seconds"], r["backward_host_seconds"]]
        queued = "-" if None in host else f"{1000 * sum(host):.3f}"
        peak = "-" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 2**20:,.0f}"
        errors = " | ".join(f"{r[n]:.1e}" if n in r else "-" for n in ("output_error", "gradient_error"))
        lines.append(
            f"| {r['batch']} | {r['seq_length']} | {r['head_dim']} | {r['backend']} | {r['gradient']} "
            f"| {1000 * r['forward_seconds']:.3f} | {1000 * r['backward_seconds']:.3f} "
            f"| {r['forward_tflops']:.3g} | {r['backward_tflops']:.3g} | {queued} | {1000 * cpu:.2f} "
            f"| {peak} | {errors} |"
        )
    return "\n".join(lines)


def read_arguments() -> argparse.Namespace:
    """The command line, checked. Raises `InputError` for a number that makes no sense or an output that exists."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-lengths", type=int, nargs="+", default=[128, 512], help="tokens (128 512)")
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64], help="dimensions of a head (64)")
    parser.add_argument("--batch", type=int, default=4, help="sequences (4)")
    parser.add_argument("--tokens", type=int, help="instead of --batch: as many sequences as have so many")
    parser.add_argument("--num-heads", type=int, default=4, help="attention heads (4)")
    parser.add_argument("--maps", type=int, default=16, help="layers × heads among which `max` chooses one (16)")
    parser.add_argument("--dropout", type=float, default=0.0, help="of attention probabilities (0)")
    parser.add_argument("--backends", nargs="+", metavar="NAME", help="which of ours (all)")
    text = f"which gradients of the regularizer ({' '.join(GRADIENTS[:-1])})"
    parser.add_argument("--gradients", nargs="+", choices=GRADIENTS, default=GRADIENTS[:-1], help=text)
    parser.add_argument("--tolerance", type=float, metavar="X", help="fail if a gradient's error is larger")
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
    if arguments.tolerance is not None and arguments.dropout > 0.0:
        raise InputError("--tolerance: errors are measured without --dropout only")
    if arguments.output:
        check_absent(arguments.output, arguments.overwrite)
    return arguments


def main() -> int:
    """Measure, print a table, write the JSON; 1 if what --tolerance asks for does not hold."""
    arguments = read_arguments()
    import torch

    from megatron_sas.core.benchmark import describe_device
    from megatron_sas.kernels import BACKENDS

    if unknown := sorted(set(arguments.backends or ()) - set(BACKENDS)):
        raise InputError(f"--backends: {', '.join(unknown)}: choose from {', '.join(BACKENDS)}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = choose_device(arguments.device)
    left_out: dict[str, str] = {}
    failed: dict[str, str] = {}
    records = [
        record
        for seq in arguments.seq_lengths
        for dim in arguments.head_dims
        for record in measure(arguments, seq, dim, device, left_out, failed)
    ]
    described = describe_device(device)
    names = ("num_heads", "maps", "precision", "dropout", "rounds", "tolerance")
    shape = {name: getattr(arguments, name) for name in names}
    if arguments.tolerance is not None:
        for r in records:
            if not r["gradient_error"] <= arguments.tolerance:  # nor if it is not a number
                name = f"{r['backend']}, {r['gradient']}, S {r['seq_length']}, D {r['head_dim']}"
                failed[name] = f"gradient error {r['gradient_error']:.1e}, more than {arguments.tolerance}"
    print(", ".join(f"{name} {value}" for name, value in (described | shape).items()))
    print(f"\n{table(records)}")
    for what, reasons in (("is left out", left_out), ("failed", failed)):
        for name, reason in reasons.items():
            print(f"\n{name} {what}: {reason}")
    if arguments.output:
        result = {"device": described, **shape, "records": records, "left_out": left_out, "failed": failed}
        write_json_atomic(arguments.output, result)
    return 1 if failed and arguments.tolerance is not None else 0


if __name__ == "__main__":
    run_main(main)
