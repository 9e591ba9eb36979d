"""The tasks of GLUE (Wang et al. 2019): what their files look like, how they are scored, and how to fine-tune on them.

Scores are those of scikit-learn and SciPy, which the metric script "glue" of the library `evaluate` calls too; that
script is downloaded when it is used, and compute nodes often have no network.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_sas.core.cli import InputError
from megatron_sas.evaluation.base import Metric

FORMAT = "megatron_sas glue"


@dataclass(frozen=True)
class Task:
    """One task; `folder` and the names of files are those of the GLUE download."""

    name: str
    folder: str
    text: tuple[tuple[str, ...], ...]  # the names that a column may have, of single sentences or of each of a pair
    label: tuple[str, ...]  # likewise
    classes: tuple[str, ...]  # names of the labels 0, 1, …; empty for scores (regression)
    metric: str  # the one that stands for the task
    positions: tuple[int, ...] | None = None  # text and label columns of a TSV file without header
    validation: tuple[str, ...] = ("dev.tsv",)
    hub_validation: tuple[str, ...] = ("validation",)

    @property
    def is_regression(self) -> bool:
        """Whether labels are scores."""
        return not self.classes

    def score(self, labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
        """All metrics of the task, `metric` among them; both arrays are (N,) of class numbers, or of scores."""
        return _SCORES[self.name](labels, predictions)


_ENTAILMENT = ("entailment", "not_entailment")
_TWO = (("sentence1",), ("sentence2",))
SCORE_RANGE = (0.0, 5.0)  # of STS-B
GLUE = Metric("", title="GLUE", name="glue", direction=1)
"""The mean over tasks, of final models only: no curve, no key in records."""
NOT_AVERAGED = frozenset({"wnli"})  # tasks that averages over tasks leave out, as most papers do
MISMATCHED = "_mismatched"  # ending of the metrics on MNLI's second validation set

TASKS = {
    task.name: task
    for task in (
        Task("cola", "CoLA", (("sentence",),), ("label",), ("unacceptable", "acceptable"), "matthews_correlation",
             positions=(3, 1)),
        Task("sst2", "SST-2", (("sentence",),), ("label",), ("negative", "positive"), "accuracy"),
        Task("mrpc", "MRPC", (("sentence1", "#1 String"), ("sentence2", "#2 String")), ("label", "Quality"),
             ("not_equivalent", "equivalent"), "combined_score"),
        Task("stsb", "STS-B", _TWO, ("label", "score"), (), "combined_score"),
        Task("qqp", "QQP", (("question1",), ("question2",)), ("label", "is_duplicate"),
             ("not_duplicate", "duplicate"), "combined_score"),
        Task("mnli", "MNLI", (("premise", "sentence1"), ("hypothesis", "sentence2")), ("gold_label", "label"),
             ("entailment", "neutral", "contradiction"), "accuracy",
             validation=("dev_matched.tsv", "dev_mismatched.tsv"),
             hub_validation=("validation_matched", "validation_mismatched")),
        Task("qnli", "QNLI", (("question",), ("sentence",)), ("label",), _ENTAILMENT, "accuracy"),
        Task("rte", "RTE", _TWO, ("label",), _ENTAILMENT, "accuracy"),
        Task("wnli", "WNLI", _TWO, ("label",), ("not_entailment", "entailment"), "accuracy"),
    )
}  # fmt: skip


def _accuracy(labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    return {"accuracy": float((labels == predictions).mean())}


def _matthews(labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    from sklearn.metrics import matthews_corrcoef

    return {"matthews_correlation": float(matthews_corrcoef(labels, predictions)), **_accuracy(labels, predictions)}


def _f1_and_accuracy(labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    from sklearn.metrics import f1_score

    f1 = float(f1_score(labels, predictions, zero_division=0.0))
    accuracy = _accuracy(labels, predictions)["accuracy"]
    return {"f1": f1, "accuracy": accuracy, "combined_score": (f1 + accuracy) / 2}


def _correlations(labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """A constant prediction, which has no correlation, counts as 0."""
    from scipy.stats import pearsonr, spearmanr

    if np.ptp(predictions) == 0:
        return {"pearson": 0.0, "spearman": 0.0, "combined_score": 0.0}
    pearson = float(pearsonr(labels, predictions).statistic)
    spearman = float(spearmanr(labels, predictions).statistic)
    return {"pearson": pearson, "spearman": spearman, "combined_score": (pearson + spearman) / 2}


_SCORES: dict[str, Callable[[np.ndarray, np.ndarray], dict[str, float]]] = {
    "cola": _matthews,
    "mrpc": _f1_and_accuracy,
    "qqp": _f1_and_accuracy,
    "stsb": _correlations,
    **dict.fromkeys(("sst2", "mnli", "qnli", "rte", "wnli"), _accuracy),
}


@dataclass(frozen=True)
class Settings:
    """How to fine-tune; the defaults are those that transformers' examples use for GLUE, with a warm-up."""

    learning_rate: float = 2e-5
    batch_size: int = 32
    epochs: int = 3
    max_length: int = 128
    warmup_share: float = 0.1
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    precision: str = "fp32"

    def __post_init__(self) -> None:
        for name in ("learning_rate", "batch_size", "epochs", "max_length", "grad_clip"):
            if not getattr(self, name) > 0:
                raise InputError(f"--{name.replace('_', '-')}: {getattr(self, name)} is not above 0")
        if not 0 <= self.warmup_share < 1:
            raise InputError(f"--warmup-share: {self.warmup_share} is not a share from 0 to below 1")
        if self.weight_decay < 0:
            raise InputError(f"--weight-decay: {self.weight_decay} is below 0")

    def rate(self, step: int, steps: int) -> float:
        """The factor of the learning rate for update `step` of `steps`, both from 0: linear warm-up, linear decay."""
        warmup = math.ceil(self.warmup_share * steps)
        return step / warmup if step < warmup else (steps - step) / max(1, steps - warmup)
