"""The learning rate as a function of completed updates."""

from __future__ import annotations


def learning_rate(step: int, *, peak: float, warmup_steps: int, decay_horizon: int) -> float:
    """Linear warm-up, then linear decay to 0 at `decay_horizon`, for the update that follows `step` completed ones.

    The horizon is independent of the length of the run, so that stages and continued runs share one schedule. Equal to
    `transformers.get_linear_schedule_with_warmup(…, warmup_steps, decay_horizon)`.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    return peak * max(0.0, (decay_horizon - step) / (decay_horizon - warmup_steps))
