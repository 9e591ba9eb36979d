"""Compile the attention kernels for GPUs that need not be there; prints one JSON line for each.

Run as a program, because Triton decides when a kernel is defined whether it will be interpreted.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource

from megatron_sas.kernels import dropout
from megatron_sas.kernels.triton import entries as triton_entries
from megatron_sas.kernels.triton.attention import HALF_CONFIGS, SINGLE_CONFIGS, TOKEN_BLOCK
from megatron_sas.kernels.triton.backward import RANGE_BLOCK, row_terms_kernel
from megatron_sas.kernels.triton.entries import entries_kernel
from megatron_sas.kernels.triton.forward import dropout_keys_kernel, finish_kernel

INTEGER_POINTERS = {"HEADS": "*i64", "SEQLENS": "*i64", "SEED": "*i64", "KEYS": "*i32", "RANGES": "*i32"}
FLOAT32_POINTERS = (
    "LSE", "DELTA", "TO_HEAD", "TO_DEPENDENT", "GRAD_TO_HEAD", "GRAD_TO_DEPENDENT", "G_HEAD", "G_DEPENDENT",
)  # fmt: skip

# A launch with one map of one token: Triton makes integers that are 1 part of the program.
ONES = {"num_maps": 1, "num_heads": 1, "seq": 1, "EVEN": False}
UNEVEN = {"EVEN": False, "HAS_SEQLENS": True}
DROPOUT = {"HAS_HEADS": False, "HAS_TO_HEAD": False, "HAS_TO_DEPENDENT": False}
PLAIN = {**DROPOUT, "THRESHOLD": 0}
CASES = {"step": {}, "window": {"HAS_WINDOW": True}, "ones": ONES, "uneven": UNEVEN, "dropout": DROPOUT, "plain": PLAIN}


def kernels_without_search(dim: int) -> dict[triton.JITFunction, list[triton.Config]]:
    """The kernels whose blocks have one size."""
    sizes = {
        dropout_keys_kernel: {"BLOCK": TOKEN_BLOCK},
        finish_kernel: {"BLOCK": TOKEN_BLOCK},
        row_terms_kernel: {"BLOCK": RANGE_BLOCK.value},
        entries_kernel: {"BLOCK": triton_entries.block_size(dim), "SCAN": triton_entries.SCAN},
    }
    return {kernel: [triton.Config(size)] for kernel, size in sizes.items()}


def compile_kernel(
    kernel: triton.JITFunction, dtype: str, dim: int, capability: int, config: triton.Config, changes: dict
) -> dict:
    """Compile one kernel as a training step with dropout and both probabilities would, but for `changes`."""
    constants = {
        "D": dim, "BLOCK_D": dim, "THRESHOLD": dropout.drop_threshold(0.1),
        "PRECISION": "ieee" if dtype == "fp32" else "tf32", "EVEN": True, "HAS_SEQLENS": False, "HAS_WINDOW": False,
        "HAS_HEADS": True, "HAS_TO_HEAD": True, "HAS_TO_DEPENDENT": True, "HAS_HEAD": True, "HAS_DEPENDENT": True,
        **config.kwargs, **changes,
    }  # fmt: skip
    # Entries are added to float32 gradients.
    float32 = FLOAT32_POINTERS + (("GRAD_Q", "GRAD_K") if kernel is entries_kernel else ())
    signature, attributes, values = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(index,)] = "constexpr", constants[name]
            continue
        if name.isupper():
            signature[name] = INTEGER_POINTERS.get(name, "*fp32" if name in float32 else f"*{dtype}")
        else:
            signature[name] = "fp32" if "scale" in name else "i32"
        if name.isupper() or name.startswith("stride") or name == "seq":
            attributes[(index,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )
    return {
        "kernel": kernel.__name__, "config": str(config), "dtype": dtype, "dim": dim, "capability": capability,
        "shared_bytes": compiled.metadata.shared, **machine_code_facts(compiled.asm["cubin"]),
    }  # fmt: skip


def machine_code_facts(cubin: bytes) -> dict:
    """Registers, bytes spilled by a thread, instructions of the longest loop (all its branches), and of all of the
    kernel's, matrix instructions and waits for them (Hopper)."""
    tools = Path(nvidia.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
        run = [str(tools / "cuobjdump"), "-res-usage", "-sass", file.name]
        text = subprocess.run(run, capture_output=True, text=True, check=True, env=environment).stdout
    return {
        "registers": int(re.search(r"REG:(\d+)", text)[1]),
        "spilled_bytes": int(re.search(r"STACK:(\d+)", text)[1]),
        "loop_instructions": longest_loop(text),
        "matrix_instructions": len(re.findall(r"\bHGMMA", text)),
        "matrix_waits": len(re.findall(r"\bWARPGROUP", text)),
    }


def longest_loop(sass: str) -> int:
    """Instructions between the target of a backward branch and the branch."""
    places, lengths = {}, [0]
    for line in sass.splitlines():
        match = re.match(r"\s+/\*([0-9a-f]+)\*/\s+(.*?);", line)
        if match is None:
            continue
        place = int(match[1], 16)
        places[place] = len(places)
        branch = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", match[2])
        if branch and (target := int(branch[1], 16)) < place and target in places:
            lengths.append(len(places) - places[target])
    return max(lengths)


if __name__ == "__main__":
    for argument in sys.argv[1:]:  # dtype:dim:capability[:one of CASES[:all or others]]
        dtype, dim, capability, *more = argument.split(":")
        case, which = (*more, *("step", "")[len(more) :])
        searched = SINGLE_CONFIGS if dtype == "fp32" else HALF_CONFIGS
        kernels = {kernel: configs if which == "all" else configs[:1] for kernel, configs in searched.items()}
        if which == "others":
            kernels = kernels_without_search(int(dim))
        for kernel, configs in kernels.items():
            for config in configs:
                facts = compile_kernel(kernel, dtype, int(dim), int(capability), config, CASES[case])
                print(json.dumps({"case": argument, **facts}), flush=True)
