"""GFLOP/s of the linear layers of one training step on a CPU: this project's product beside torch's own.

    python tools/benchmark_linear.py --model mini --batch 4 --threads 1 --output linear.json

Every matrix of a model, float32, forward and backward (gradients of input, weight and bias) in turns with
`torch.nn.functional.linear`. The ratio is the median of the ratios within a round. Ours is oneDNN's, also where a
training run would choose torch's own because that is as fast.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import _checkout
from megatron_sas.core.cli import InputError, run_main
from megatron_sas.core.files import check_absent, write_json_atomic
from megatron_sas.model.config import SIZES, BertConfig

if TYPE_CHECKING:
    from torch import Tensor

MASK_PROB = 0.15


def matrices(config: BertConfig, tokens: int) -> dict[str, tuple[int, int, int]]:
    """Rows, inputs and outputs of the products of a layer and of the LM head."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    masked = max(1, round(MASK_PROB * tokens))
    return {
        "queries, keys, values": (tokens, hidden, 3 * hidden),
        "attention output": (tokens, hidden, hidden),
        "up": (tokens, hidden, intermediate),
        "down": (tokens, intermediate, hidden),
        "LM head, dense": (masked, hidden, hidden),
        "LM head, decoder": (masked, hidden, config.padded_vocab_size),
    }


def product(function: Callable[..., Tensor], rows: int, inputs: int, outputs: int) -> dict[str, Callable[[], Any]]:
    """Closures that take a product forward, and backward after it."""
    import torch

    x, weight, bias = (torch.randn(s, requires_grad=True) for s in ((rows, inputs), (outputs, inputs), (outputs,)))
    grad = torch.randn(rows, outputs)
    output = function(x, weight, bias)

    def forward() -> None:
        with torch.no_grad():
            function(x, weight, bias)

    def backward() -> None:
        torch.autograd.grad(output, (x, weight, bias), grad, retain_graph=True)

    return {"forward": forward, "backward": backward}


def measure(config: BertConfig, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each matrix."""
    import torch

    from megatron_sas.core.benchmark import median_ratio, time_interleaved
    from megatron_sas.kernels.cpu_linear import linear, use_library

    use_library("onednn")
    functions = {"ours": linear, "torch": torch.nn.functional.linear}
    rows = []
    for name, shape in matrices(config, arguments.batch * arguments.seq_length).items():
        flops = 2.0 * shape[0] * shape[1] * shape[2]
        row: dict[str, Any] = {"matrix": name, "rows": shape[0], "inputs": shape[1], "outputs": shape[2]}
        actions = {who: product(function, *shape) for who, function in functions.items()}
        for direction, factor in (("forward", 1.0), ("backward", 2.0)):
            variants = {who: actions[who][direction] for who in functions}
            times = time_interleaved(variants, arguments.rounds, torch.device("cpu"))
            row[direction] = {who: factor * flops / statistics.median(times[who].wall) / 1e9 for who in functions}
            row[direction]["ratio"] = median_ratio(times["torch"].wall, times["ours"].wall)
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The result as Markdown."""
    lines = [
        "| GFLOP/s | rows × inputs × outputs | forward, ours | torch | ratio | backward, ours | torch | ratio |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = [f"{row['rows']} × {row['inputs']} × {row['outputs']}"]
        for direction in ("forward", "backward"):
            speeds = row[direction]
            cells += [f"{speeds['ours']:.0f}", f"{speeds['torch']:.0f}", f"{speeds['ratio']:.2f}"]
        lines.append(f"| {row['matrix']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    """The command line, checked.

    Raises:
        InputError: a number that makes no sense, or an output that exists.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(SIZES), default="mini", help="named size (mini)")
    parser.add_argument("--batch", type=int, default=4, help="sequences (4)")
    parser.add_argument("--seq-length", type=int, default=512, help="tokens of a sequence (512)")
    parser.add_argument("--rounds", type=int, default=20, help="both once a round (20)")
    parser.add_argument("--threads", type=int, help="CPU threads (torch's default)")
    parser.add_argument("--output", metavar="FILE.json", help="also write the figures")
    parser.add_argument("--overwrite", action="store_true", help="replace the output")
    arguments = parser.parse_args()
    for name in ("batch", "seq_length", "rounds"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name.replace('_', '-')}: must be at least 1")
    if arguments.output:
        check_absent(arguments.output, arguments.overwrite)
    return arguments


def main() -> None:
    """Measure, print a table, write the JSON."""
    arguments = parse_arguments()
    import torch

    from megatron_sas.core.benchmark import describe_device

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    config = BertConfig(**SIZES[arguments.model])
    settings = {name: getattr(arguments, name) for name in ("model", "batch", "seq_length", "rounds")}
    result = {"device": describe_device(torch.device("cpu")), **settings, "matrices": measure(config, arguments)}
    print(", ".join(f"{name} {value}" for name, value in result["device"].items()), "\n")
    print(table(result["matrices"]))
    if arguments.output:
        write_json_atomic(arguments.output, result)


if __name__ == "__main__":
    run_main(main)
