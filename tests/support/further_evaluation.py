"""An evaluation that the package does not have, and a script that uses it everywhere: train, measure, report.

It stands for one that somebody adds as a file: registered before anything else is imported, as a line in the registry
would do. `python further_evaluation.py CONFIG.yaml DIRECTORY TEXT`.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

from pydantic import Field
from tool_calls import call_tool

from megatron_sas.core.settings import Section
from megatron_sas.evaluation.base import Evaluation, Metric
from megatron_sas.evaluation.batching import evaluating
from megatron_sas.evaluation.text import packed_text


class NormSettings(Section):
    """Of the norm of hidden vectors."""

    norm_sequences: int | None = Field(None, description="sequences of data.validation for the hidden norm", ge=1)


class NormEvaluation(Evaluation):
    """Mean norm of the last hidden layer."""

    settings = NormSettings
    metrics = (Metric("hidden_norm", "norm of hidden vectors", direction=1, title="Hidden norm", printed="norm"),)

    def run(self, model) -> dict[str, Any]:
        sizes = {"num_sequences": self.section.norm_sequences, "batch_tokens": self.section.batch_tokens}
        norms = []
        with evaluating(model) as device:
            for batch in packed_text(self.resources.text, **sizes):
                norms.append(float(model(batch.to(device).input_ids).hidden.norm(dim=-1).mean()))
        return {"hidden_norm": sum(norms) / len(norms)}


def main(config: Path, directory: Path, text: str) -> None:
    from megatron_sas.evaluation.registry import EVALUATIONS

    assert "megatron_sas.evaluation.live" not in sys.modules  # so that this is what a line there would be
    EVALUATIONS["norm"] = NormEvaluation
    run, report = directory / "run", directory / "report"
    overrides = ("--evaluation.norm_sequences", "5", "--logging.tensorboard", "true", "--snapshots.every", "2")
    sys.argv = ["pretrain_mlm.py", "--config", str(config), "--run.output_dir", str(run), *overrides]
    assert runpy.run_path(str(ROOT / "pretrain_mlm.py"))["main"]() == 0  # without the exit, which ends the process
    sys.path.insert(0, str(ROOT / "tools"))  # as where a tool is started
    call_tool("eval_trajectory", run, "--text", text, "--text-sequences", "10", "--norm-sequences", "5")
    call_tool("analyze_trajectory", run, "--output", report)


ROOT = Path(__file__).resolve().parents[2]

if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
