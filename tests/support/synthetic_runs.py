"""Run directories in the shape that training leaves: a plateau, then loss, UAS and BLiMP break."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import yaml

from megatron_sas.run.records import Records

RELATIONS = {"det": 1900, "nsubj": 1500, "obj": 900, "amod": 700, "case": 1600, "acl": 150}
FIELDS = ("agreement", "determiner_noun", "relative_clauses")


def write_run(
    path: Path,
    *,
    weight: float = 0.0,
    onset: float = 400,
    uas_gain: float = 0.34,
    blimp_gain: float = 0.35,
    loss_gain: float = 1.3,
    steps: int = 900,
    every: int = 25,
    seed: int = 0,
    noise: float = 0.008,
    blimp: bool = True,
    release: int | None = None,
    heads: str | None = None,
) -> Path:
    """One run; `blimp` breaks 60 steps after `onset`, UAS and loss at it. `release`: λ is 0 from that step on;
    `heads`: the control that the SAS term is on."""
    rng = np.random.default_rng(seed)
    schedule = [{"start": 0, "value": weight} | ({"end": release} if release else {})] if weight else []
    config = {
        "run": {"output_dir": str(path), "seed": seed},
        "model": {"size": "tiny", "num_layers": 4},
        "data": {"train": "data/train", "mask_prob": 0.15, "heads": heads},
        "sas": {"schedule": schedule, "mode": "max"},
        "train": {"steps": steps, "global_batch_size": 64, "micro_batch_size": 64, "learning_rate": 5e-4},
    }
    records = Records(path, -1, tensorboard=False)
    (path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    records.write("event", 0, {"event": "start", "world_size": 2, "device": "cpu", "parameters": 1_250_000})
    for step in range(0, steps + 1, 5):
        if step:
            values = {"mlm_loss": _loss(step, onset, loss_gain) + rng.normal(0, 0.05), "sas": 3.0, "sas_weight": weight}
            records.write("train", step, values | {"tokens": step * 4096, "seconds": step * 0.12, "grad_norm": 1.0})
        if step % every == 0:
            records.write(
                "evaluation", step, _evaluation(step, onset, uas_gain, blimp_gain, loss_gain, noise, rng, blimp)
            )
    records.close()
    return path


def _loss(step, onset, gain):
    return 4.6 + 2.2 * np.exp(-step / 30) - gain * (1 - np.exp(-max(0, step - onset) / 90))


def _rise(step, onset, width):
    return float(np.clip((step - onset) / width, 0, 1) + 0.12 * np.clip((step - onset - width) / 300, 0, 1))


def _evaluation(step, onset, uas_gain, blimp_gain, loss_gain, noise, rng, blimp):
    uas = 0.08 + uas_gain * _rise(step, onset, 130) + rng.normal(0, noise)
    values = {
        "validation_mlm_loss": _loss(step, onset, loss_gain) + rng.normal(0, 0.015),
        "uas": uas,
        "uas_single_head": uas / 2,
        "uas_relations": {
            name: {
                "count": count,
                "accuracy": float(np.clip(uas * (0.7 + 0.1 * rank) + rng.normal(0, noise), 0, 1)),
                "layer": rank % 4,
                "head": rank % 2,
                "direction": "dep->head",
                "baseline": 0.5 - 0.08 * rank,
                "baseline_offset": 1 if rank % 2 else -1,
                "in_table": True,
            }
            for rank, (name, count) in enumerate(RELATIONS.items())
        },
        "weight_norm": 50.0,
        "seconds": 1.5,
    }
    if blimp:
        score = 0.5 + blimp_gain * _rise(step, onset + 60, 150) + rng.normal(0, noise)
        values |= {
            "blimp": score,
            "blimp_fields": {name: score + 0.03 * (rank - 1) for rank, name in enumerate(FIELDS)},
            "blimp_sets": {f"{name}_{i}": score + 0.02 * i - 0.01 for name in FIELDS for i in range(2)},
        }
    return values


def write_sweep(root: Path, roles: dict[str, str], seeds: tuple[int, ...]) -> None:
    """sweep.json of runs at CONDITION/seed-N, whether they exist or not."""
    runs = [
        {
            "directory": f"{condition}/seed-{seed}",
            "condition": condition,
            "seed": seed,
            "role": role,
            "release_step": None,
        }
        for condition, role in roles.items()
        for seed in seeds
    ]
    content = {"format": "megatron_sas sweep", "version": 1, "title": "a sweep", "runs": runs}
    (root / "sweep.json").write_text(json.dumps(content))


def write_glue(
    run: Path,
    *,
    step: int | None = 900,
    epochs: int = 3,
    sha256: str = "g",
    seeds: tuple[int, ...] = (1, 2),
    **means: float,
) -> None:
    """A result per task, of the model at `step`."""
    (run / "glue").mkdir(exist_ok=True)
    for task, mean in means.items():
        result = {
            "format": "megatron_sas glue",
            "version": 1,
            "task": task,
            "metric": "accuracy",
            "mean": mean,
            "seeds": [{"seed": seed, "metrics": {"accuracy": mean}} for seed in seeds],
            "model_step": step,
            "settings": {"epochs": epochs, "learning_rate": 2e-5},
            "data": {"train": {"path": str(run), "sha256": sha256}, "validation": [{"path": "x", "sha256": "v"}]},
        }
        (run / "glue" / f"{task}.json").write_text(json.dumps(result))
