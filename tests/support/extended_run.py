"""Use all worked examples of docs/extending.md at once: preprocess, train, resume, measure, report.

`python extended_run.py DIRECTORY`, in a copy of the program that has them. DIRECTORY holds config.yaml and vocab.txt.
"""

from __future__ import annotations

import random
import runpy
import sqlite3
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tests" / "support")]

from engine_runs import train  # noqa: E402
from tool_calls import call_tool  # noqa: E402


def main(directory: Path) -> None:
    """Every step in this process."""
    rng = random.Random(0)
    texts = [" ".join(f"w{rng.randrange(60)}" for _ in range(60)) for _ in range(40)]
    (directory / "a.tsv").write_text("".join(f"{text}\tno text\n" for text in texts[:20]))
    with sqlite3.connect(directory / "b.db") as database:
        database.execute("create table documents (text)")
        database.executemany("insert into documents values (?)", [(text,) for text in texts[20:]])
    common = ("--tokenizer", directory / "vocab.txt", "--parser", "chain", "--seq-length", 16, "--workers", 1)
    inputs = (directory / "a.tsv", f"sqlite:{directory / 'b.db'}")
    for split in ("train", "validation"):
        options = ("--output", directory / split, "--split", split, "--validation-share", 0.4)
        call_tool("preprocess_data", "--input", *inputs, *options, *common)
    config = directory / "config.yaml"
    for steps in (4, 6):
        train(config, directory / "resumed", {"train.steps": steps})
    sys.argv = list(map(str, ("pretrain_mlm.py", "--config", config, "--run.output_dir", directory / "whole")))
    assert runpy.run_path(str(ROOT / "pretrain_mlm.py"))["main"]() == 0  # without the exit, which ends the process
    text = ("--text", directory / "validation", "--text-sequences", 10, "--rank-sequences", 8)
    call_tool("eval_trajectory", directory / "whole", *text)
    call_tool("analyze_trajectory", directory / "whole", "--output", directory / "report")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
