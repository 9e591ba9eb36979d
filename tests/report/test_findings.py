"""What the sentences claim, on runs whose course is known."""

import statistics

import pytest
from synthetic_runs import write_run

from megatron_sas.report.comparisons import compare_to_controls, summarize
from megatron_sas.report.findings import caveats, headline, narrate
from megatron_sas.report.load import load_runs
from megatron_sas.report.run_onsets import default_delta, find_onsets


def Analysis(runs, delta=90):
    onsets, found = find_onsets(runs, delta), summarize(runs)
    return onsets, found, [finding.text for finding in narrate(found, onsets, [])]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Three seeds of the base (onset 400) and of a suppressed condition without a UAS break."""
    root = tmp_path_factory.mktemp("runs")
    for seed in range(3):
        write_run(root / f"base-{seed}", seed=seed, onset=390 + 10 * seed)
        write_run(root / f"minus-{seed}", seed=9 + seed, weight=0.015, uas_gain=0.0, blimp_gain=0.0, loss_gain=0.8)
    return root


def test_single_runs(paths):
    runs = load_runs([paths / "base-1", paths / "minus-1"])
    onsets, found, sentences = Analysis(runs)
    base = onsets[runs[0].path]
    assert abs(base["uas"].strongest.step - 400) <= 25 and base["uas"].strongest.detected
    assert abs(base["loss"].strongest.step - 400) <= 25 and base["loss"].strongest.detected
    assert abs(base["blimp"].strongest.step - 460) <= 25 and base["blimp"].strongest.detected
    assert not onsets[runs[1].path]["uas"].strongest.detected
    first, second, difference = sentences
    assert f"UAS breaks upward at step {base['uas'].strongest.step:.0f} (a fit of straight pieces breaks" in first
    assert "Structure (UAS) breaks" in first and "before capability" in first
    assert "0.35" in first and "untrained" in first
    assert "In minus-1" in second and "UAS shows no clear break" in second and "Structure" not in second
    gap = found[0].final["uas"].mean - found[1].final["uas"].mean
    assert f"UAS {gap:.3f} lower" in difference and "±" not in difference
    assert any("single run of each condition" in note for note in caveats(found))


def test_headline_has_onsets_order_and_differences(paths):
    names = ["base", "minus"]
    runs = load_runs([paths / f"{n}-{s}" for n in names for s in range(3)], [n for n in names for _ in range(3)])
    onsets, found, _ = Analysis(runs)
    when, order, changes = headline(found, onsets)
    assert when.startswith("In base (3 runs), MLM loss breaks downward") and order.startswith("Structure (UAS) breaks")
    assert changes.startswith("Compared with the base, MLM loss is higher in minus; ")
    assert "BLiMP is lower in minus" in changes and "UAS is lower in minus" in changes
    single = load_runs([paths / "base-1", paths / "minus-1"])
    onsets, found, _ = Analysis(single)
    assert headline(found, onsets)[-1].startswith("Compared with the base (not tested), MLM loss is higher in")


def test_several_seeds(paths):
    names = ["base", "minus"]
    runs = load_runs([paths / f"{n}-{s}" for n in names for s in range(3)], [n for n in names for _ in range(3)])
    _, found, sentences = Analysis(runs)
    base, minus = found
    finals = [run.curve("uas").values[-1] for run in runs]
    assert base.final["uas"].mean == pytest.approx(statistics.mean(finals[:3]))
    assert base.final["uas"].error == pytest.approx(statistics.stdev(finals[:3]) / 3**0.5)
    difference = minus.difference["uas"].value  # the seeds are others, so the difference is not paired
    assert difference.mean == pytest.approx(statistics.mean(finals[3:]) - statistics.mean(finals[:3]))
    errors = base.final["uas"].error, minus.final["uas"].error
    assert not difference.paired and difference.error == pytest.approx((errors[0] ** 2 + errors[1] ** 2) ** 0.5)
    assert base.difference == {}
    assert sentences[0].startswith("In base (3 runs), MLM loss breaks downward at step ") and " ± " in sentences[0]
    assert "no clear break in any run" in sentences[1]
    assert "higher" in sentences[2] and "±" in sentences[2]
    assert caveats(found) == []


def test_no_difference_is_said_to_be_none(paths):
    runs = load_runs([paths / f"base-{s}" for s in range(3)])
    for run in runs[1:]:
        run.config["sas"]["schedule"] = [{"start": 0, "value": 0.001}]
    _, _, sentences = Analysis([runs[0], *runs[1:]])
    assert len([s for s in sentences if s.startswith("Compared")]) == 2
    twin = load_runs([paths / "base-0"], ["twin"])[0]
    twin.config["sas"]["schedule"] = [{"start": 0, "value": 0.001}]
    _, _, sentences = Analysis([runs[0], twin])
    assert sentences[-1] == "Compared with the base (λ = 0), twin ends with MLM loss equal, BLiMP equal and UAS equal."


def test_caveats(tmp_path, paths):
    short = write_run(tmp_path / "short", weight=-0.01, steps=300, blimp=False)
    found = summarize(load_runs([short]))
    notes = " ".join(caveats(found))
    assert "No run with λ = 0" in notes and "Not evaluated in these runs: BLiMP" in notes
    notes = " ".join(caveats(summarize(load_runs([short, paths / "base-0", paths / "base-1"], ["s", "b", "b"]))))
    assert "single run of s:" in notes and "Not evaluated" not in notes
    assert "MLM loss and UAS end before 95% of the longest curve in s/short (step 300): no difference is taken" in notes
    assert "BLiMP was not evaluated in s/short." in notes


def test_a_metric_that_ends_early_in_one_run_is_told(paths):
    """The runs themselves are of one length: an interrupted measurement, or values that are no numbers."""
    runs = load_runs([paths / f"base-{seed}" for seed in range(3)], ["base"] * 3)
    for record in runs[2].evaluations:
        if record["step"] > 450:
            record["uas"] = None
    found = summarize(runs)
    assert found[0].final["uas"].count == 2 and found[0].final["loss"].count == 3
    (note,) = caveats(found)
    assert note.startswith("UAS ends before 95% of the longest curve in base/base-2 (step 450): ")


def test_repetitions_with_one_seed_are_told(paths):
    runs = load_runs([paths / f"base-{seed}" for seed in range(3)], ["base"] * 3)
    runs[1].config["run"]["seed"] = runs[0].seed
    (note,) = caveats(summarize(runs))
    assert note.startswith("Runs of base have the same seed (0): ")


def test_too_short_to_tell(tmp_path):
    run = write_run(tmp_path / "short", steps=50)
    _, _, (sentence,) = Analysis(load_runs([run]))
    assert sentence.count("shows no break") == 3 and "less than two windows" in sentence


def test_simultaneous_breaks_have_no_order(paths):
    (run,) = load_runs([paths / "base-0"])
    for record in run.evaluations:
        record["blimp"] = record["uas"]
    _, _, (sentence,) = Analysis([run])
    assert "their order cannot be told" in sentence


def test_default_delta(tmp_path, paths):
    runs = load_runs([paths / "base-0", write_run(tmp_path / "long", steps=2000)])
    assert default_delta(runs) == 90
    assert default_delta(load_runs([write_run(tmp_path / "sparse", steps=600, every=100)])) == 100
    assert default_delta(load_runs([write_run(tmp_path / "start", steps=0)])) == 1


def test_controls_are_compared_at_the_same_weight(tmp_path):
    """Same seeds, same λ: what the regularizer does to grammar beyond what its control does."""
    conditions = {"base": (0.0, None, 0.25), "minus": (0.015, None, 0.2), "permuted": (0.015, "permuted", 0.0)}
    paths, labels = [], []
    for label, (weight, heads, blimp) in conditions.items():
        for seed in range(3):
            path = tmp_path / f"{label}-{seed}"
            paths.append(write_run(path, seed=seed, weight=weight, heads=heads, blimp_gain=blimp))
            labels.append(label)
    runs = load_runs(paths, labels)
    found, onsets = summarize(runs), find_onsets(runs, 90)
    comparisons = compare_to_controls(found)
    sentences = [finding.text for finding in narrate(found, onsets, comparisons)]
    (beside,) = [s for s in sentences if s.startswith("Compared with permuted (the same λ), minus ends with ")]
    blimp = next(c for c in comparisons if c.metric.name == "blimp")
    assert f"BLiMP {blimp.value.mean:.3f} ± {blimp.value.error:.3f} higher" in beside and "MLM loss" in beside
    assert sentences.index(beside) == len(sentences) - 1
    assert not any("same λ" in finding.text for finding in narrate(found, onsets, []))
