"""The directory of a run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_sas.core.settings import Section


class RunSection(Section):
    """Where a run lives and how it is repeated."""

    output_dir: str = Field(description="directory of the run: configuration, metrics, checkpoints")
    seed: int = Field(
        1234, description="initial weights, sample order, masks and dropout are functions of it", ge=0, lt=2**63
    )
    resume: Literal["auto", "never"] = Field(
        "auto", description="auto: continue from the newest checkpoint in output_dir; never: output_dir must be new"
    )
    branch_from: str | None = Field(
        None, description="checkpoint of another run, or a run (its newest): begin there and share its past exactly"
    )
    timeout_minutes: float = Field(
        30.0, description="a run that makes no progress for so long ends, naming the process it waits for", gt=0, le=1e6
    )
