"""BLiMP's fields and linguistic terms, each under one name, in new results and in those stored before it was so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

# The data spells one of the four fields in two ways, and keeps two sets apart from the term that BLiMP's paper and its
# published results count them to.
SPELLINGS = {
    "field": {"syntax/semantics": "syntax_semantics", "syntax-semantics": "syntax_semantics"},
    "linguistics_term": {"s-selection": "argument_structure"},
}
TABLES = {"field": "fields", "linguistics_term": "terms"}  # where in a result the means are
# How many of all of BLiMP's sets the data has under each name that was merged: what a record without the labels of its
# sets needs.
ALL_SETS = 67
SETS = {"syntax/semantics": 1, "syntax_semantics": 13, "s-selection": 2, "argument_structure": 7}

METRICS = ("pll", "within_word_l2r")  # how sentences are scored, see `pll.py`; the first is the default
MANY_TIES = 0.05  # share of pairs that the scores do not decide above which a result comes with a warning


def canonical(kind: str, name: str) -> str:
    """The one name of a field or a linguistic term (`kind` as in the data); unknown names stay."""
    return SPELLINGS[kind].get(name, name)


def means_over_sets(sets: Mapping[str, Mapping[str, Any]], kind: str) -> dict[str, float]:
    """Mean accuracy of the sets within each field or linguistic term, by its one name."""
    accuracies: dict[str, list[float]] = {}
    for result in sets.values():
        accuracies.setdefault(canonical(kind, result[kind]), []).append(result["accuracy"])
    return {name: float(np.mean(values)) for name, values in sorted(accuracies.items())}


def renew_result(result: dict[str, Any]) -> dict[str, Any]:
    """A result of `BlimpTask.evaluate` that may be old, with one mean per field and term over all its sets."""
    sets = result.get("sets", {})
    if not all(TABLES.keys() <= row.keys() for row in sets.values()):
        return result
    sets = {uid: row | {kind: canonical(kind, row[kind]) for kind in TABLES} for uid, row in sets.items()}
    return {**result, "sets": sets, **{table: means_over_sets(sets, kind) for kind, table in TABLES.items()}}


def renew_record(record: dict[str, Any]) -> dict[str, Any]:
    """An evaluation line of metrics.jsonl that may be old, likewise.

    Such lines do not say which field a set is of. Where they are of all of BLiMP the numbers of sets are known, and the
    means are merged by these. Of other sets they cannot be: means over some of the sets are left out, and named in
    `blimp_unmerged`.
    """
    record = dict(record)
    is_complete = len(record.get("blimp_sets") or {}) == ALL_SETS
    for kind, table in TABLES.items():
        means = record.get(f"blimp_{table}")
        if not isinstance(means, dict) or not means.keys() & SPELLINGS[kind].keys():
            continue
        groups: dict[str, list[str]] = {}
        for name in means:
            groups.setdefault(canonical(kind, name), []).append(name)
        renewed = record[f"blimp_{table}"] = {}
        for name, old in sorted(groups.items()):
            if len(old) == 1:
                renewed[name] = means[old[0]]
            elif is_complete:
                renewed[name] = float(np.average([means[o] for o in old], weights=[SETS[o] for o in old]))
            else:
                record["blimp_unmerged"] = [*record.get("blimp_unmerged", []), name]
    return record
