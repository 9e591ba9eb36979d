"""A process that has imported everything and forks training processes on request: starting one takes milliseconds.

The forked processes are those that `python pretrain_mlm.py …` or a launcher would start: their own process, their own
process group of ranks, the real command line and exit code. Requests are JSON lines on stdin, answers JSON lines on
stdout: {"start": {"argv": [...], "ranks": n, "fault": {...}, "log": PATH, "main": "module:f"}} → {"pids": [...]}, and
{"poll": true} → {"exits": {pid: code}}, a negative code being the signal that ended the process.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
from pathlib import Path

IMPORTED_LATER = (
    *("pretrain_mlm", "megatron_sas.train.trainer", "deepspeed", "deepspeed.module_inject", "deepspeed.ops.adam"),
    *("torch._dynamo", "torch._inductor.utils", "torch.distributed.tensor", "torch.utils.tensorboard", "torch.onnx"),
    *("transformers.models.auto.tokenization_auto", "transformers.models.bert.tokenization_bert"),
    *("transformers.dynamic_module_utils", "sympy", "setuptools", "torch.testing"),
)
"""What a training process imports in its first seconds."""

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the launcher's environment has it; pretrain_mlm.py lies there


def main() -> None:
    """Answer requests until stdin closes; then end what is still running."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests may run under nohup
    import fault_injection

    for name in IMPORTED_LATER:
        importlib.import_module(name)
    gc.freeze()  # DeepSpeed collects garbage at every start: in forked processes that would copy all of this

    exits: dict[int, int] = {}
    running: set[int] = set()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            pids = [_fork(request["start"], rank, fault_injection) for rank in range(request["start"]["ranks"])]
            running.update(pids)
            for pid in pids:  # the system gives out the numbers of ended processes again
                exits.pop(pid, None)
            print(json.dumps({"pids": pids}), flush=True)
        else:
            for pid in list(running):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    running.discard(pid)
                    exits[pid] = os.waitstatus_to_exitcode(status)
            print(json.dumps({"exits": exits}), flush=True)
    for pid in running:
        os.kill(pid, 9)


def _fork(job: dict, rank: int, fault_injection: object) -> int:
    pid = os.fork()
    if pid:
        return pid
    log = os.open(f"{job['log']}-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, nothing), (1, log), (2, log)):
        os.dup2(source, target)
    if job["ranks"] > 1:
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["ranks"], "LOCAL_WORLD_SIZE": job["ranks"]}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": job["port"]}
        os.environ.update({name: str(value) for name, value in variables.items()})
    sys.argv = ["pretrain_mlm.py", *job["argv"]]
    fault_injection.inject(job.get("fault") or {}, rank)
    module, _, function = job["main"].partition(":")
    code = getattr(importlib.import_module(module), function)()
    sys.stdout.flush()
    if job["ranks"] > 1:
        os._exit(code or 0)  # as pretrain_mlm.py: threads of the process group may outlive what they use
    sys.exit(code)


if __name__ == "__main__":
    main()
