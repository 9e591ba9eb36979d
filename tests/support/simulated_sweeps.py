"""Sweeps whose answers are known, as runs in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_sas.report.trajectories import Run

STEPS = np.arange(0, 1201, 100)  # few enough that no change point is fitted: simulations stay fast
SUPPRESS = [{"start": 0, "value": 0.02}]
PROMOTE = [{"start": 0, "value": -0.02}]


def release(step):
    """λ until `step`."""
    return [{"start": 0, "end": step, "value": 0.02}]


CONDITIONS = {  # name -> schedule, heads
    "base": ([], None),
    "minus": (SUPPRESS, None),
    "plus": (PROMOTE, None),
    "early": (release(200), None),
    "late": (release(800), None),
    "permuted": (SUPPRESS, "permuted"),
    "offset": (SUPPRESS, "offset"),
}


def simulate(
    rng, effects=None, *, seeds=(1, 2, 3), onset=560.0, lag=160.0, twonn=0.0, spread=0.03, noise=0.004, rise=True
):
    """Runs of `CONDITIONS` (all, or those in `effects`), final loss, uas and blimp moved by `effects[name]`.

    UAS and the loss break at `onset`, BLiMP `lag` steps later, the intrinsic dimension (where not 0, its rise) at
    `onset`; `rise=False` is flat noise. `spread` is between seeds, `noise` between evaluations.
    """
    effects = {name: {} for name in CONDITIONS} if effects is None else effects
    runs = []
    for name in effects:
        for seed in seeds:
            schedule, heads = CONDITIONS[name]
            config = {"run": {"seed": seed}, "sas": {"schedule": schedule}, "data": {"heads": heads}}
            start = onset + rng.normal(0, 20)
            late = start + lag + rng.normal(0, 20)
            offsets = {key: effects[name].get(key, 0) + rng.normal(0, spread) for key in ("loss", "uas", "blimp")}
            evaluations = [_evaluation(int(s), start, late, offsets, twonn, rise, noise, rng) for s in STEPS]
            runs.append(Run(Path(f"/{name}/{seed}"), name, config, [], evaluations, []))
    return runs


def _evaluation(step, start, late, offsets, twonn, rise, noise, rng):
    up, later = (float(np.clip((step - when) / 160, 0, 1)) if rise else 0.0 for when in (start, late))
    value = {
        "kind": "evaluation",
        "step": step,
        "validation_mlm_loss": 6.0 - 2.0 * up + offsets["loss"] * step / 1200 + rng.normal(0, noise),
        "uas": 0.2 + 0.4 * up + offsets["uas"] * step / 1200 + rng.normal(0, noise),
        "blimp": 0.5 + 0.3 * later + offsets["blimp"] * step / 1200 + rng.normal(0, noise),
    }
    return value | ({"twonn": 10 + twonn * up + rng.normal(0, noise)} if twonn else {})
