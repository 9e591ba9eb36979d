"""The breakthrough watch: recent models in a ring on the disk, kept for good when an onset is detected.

Every `watch.every` steps the saver writes a snapshot next to training. As long as nothing happens it goes to
RUN/ring, which forgets old ones; an onset moves the ring to RUN/snapshots, and so do the snapshots after it go there.
All ranks gather for each of these snapshots anyway, so rank 0, which alone has a `Watch`, decides alone.

Everything is a function of the records up to a step: a resumed run reads them again and goes on as if never stopped.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_sas.config import Config
from megatron_sas.core.files import fsync_directory
from megatron_sas.onsets.online import WATCHED, OnsetDetector
from megatron_sas.run.checkpoint import remove_directory
from megatron_sas.run.directory import RunDirectory, step_name, steps_in
from megatron_sas.run.records import Records, iterate_records
from megatron_sas.run.saver import Saver

EVENT = "onset_detected"


class OnsetSnapshots:
    """The watch of one run, on rank 0."""

    def __init__(
        self,
        config: Config,
        own_step: int,
        records: Records,
        saver: Saver,
        log: Callable[[str], None],
    ) -> None:
        """Go on where the records end.

        Args:
            config: of a run whose watch is on.
            own_step: of the checkpoint of this run that it continues from; -1 if it has none.
            records: cut back to the step that the run continues from; events are written there.
            saver: writes the snapshots.
            log: prints a line.
        """
        self.section, self.scheduled, self.last_step = config.watch, config.snapshots, config.train.steps
        self.records, self.saver, self.log = records, saver, log
        run = RunDirectory(records.path.parent)
        self.ring, self.snapshots, self._own_step = run.ring, run.snapshots, own_step
        self._detectors = {
            name: OnsetDetector(self.section.delta, WATCHED[name][2], self.section.start)
            for name in self.section.metrics
        }
        self._keep_until = -1  # snapshots up to this step are kept for good
        self._remove_what_was_cut_off()
        self._read_past()

    def observe(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Look at what was just recorded; on an onset, write the event and keep the ring for good.

        Raises:
            OSError: the ring could not be moved.
        """
        for name, onset in self._feed(kind, step, values).items():
            self.saver.wait_for_thread()  # the newest of the ring may still be under way
            reach = self.section.keep * self.section.interval
            known = steps_in(self.ring).keys() | steps_in(self.snapshots).keys()
            kept = [s for s in sorted(known) if step - reach <= s < step and self.section.due(s)]
            values = {"metric": name, "strength": onset.strength, "threshold": onset.threshold, "snapshots": kept}
            self.records.write("event", step, {"event": EVENT, **values})
            self._keep_until = max(self._keep_until, step + self.section.reach_after)
            self._promote(step)
            self.log(
                f"step {step}: onset of {name} detected (bend {onset.strength:.3g}, threshold {onset.threshold:.3g}); "
                f"{len(kept)} snapshots kept, more until step {step + self.section.reach_after}"
            )

    def place(self, step: int) -> Path:
        """The directory for the snapshot of `step`; makes room in the ring.

        The ring holds what a detection now would keep, and what one would after a restart from the newest checkpoint,
        or from the one that is being written.
        """
        reach = self.section.keep * self.section.interval
        ends = [step, max(self._own_step, self.saver.published), self.saver.step or -1]
        for old in steps_in(self.ring):
            if not any(end - reach < old <= end for end in ends):
                remove_directory(self.ring / step_name(old))
        wanted = step <= self._keep_until or self.scheduled.due(step, self.last_step)
        return self.snapshots if wanted else self.ring

    def _feed(self, kind: str, step: int, values: dict[str, Any]) -> dict[str, Any]:
        """Give every detector its value; returns the onsets, whose detectors have done their work."""
        onsets = {}
        for name, detector in list(self._detectors.items()):
            wanted, key, _ = WATCHED[name]
            if kind == wanted and (onset := detector.add(step, values.get(key))):
                onsets[name] = onset
                del self._detectors[name]
        return onsets

    def _read_past(self) -> None:
        passed, recorded = {}, set()
        for line in iterate_records(self.records.path):
            passed |= dict.fromkeys(self._feed(line["kind"], line["step"], line), line["step"])
            if line.get("event") == EVENT and line["step"] >= self.section.start:
                recorded.add(line["metric"])
                self._keep_until = max(self._keep_until, line["step"] + self.section.reach_after)
                self._promote(line["step"])  # again, if the machine went down meanwhile
        for name in recorded:
            self._detectors.pop(name, None)
        for name in passed.keys() - recorded:  # the settings have changed
            at = passed[name]
            self.log(f"watch: by these settings {name} had its onset at step {at}; it is not watched any more")

    def _remove_what_was_cut_off(self) -> None:
        """Snapshots that a run which was killed made after the checkpoint; they are made again, where they belong."""
        for step in steps_in(self.ring):
            if step > self._own_step or not self.section.due(step):
                remove_directory(self.ring / step_name(step))
        for step in steps_in(self.snapshots):
            scheduled = self.scheduled.due(step, self.last_step)
            if step > self._own_step and self.section.due(step) and not scheduled:
                remove_directory(self.snapshots / step_name(step))

    def _promote(self, onset: int) -> None:
        """Move what the ring has around `onset` to the snapshots. Interrupted anywhere, it can be done again."""
        first = onset - self.section.keep * self.section.interval
        steps = [step for step in steps_in(self.ring) if first <= step <= onset + self.section.reach_after]
        if not steps:
            return
        self.snapshots.mkdir(parents=True, exist_ok=True)
        for name in map(step_name, steps):
            if (self.snapshots / name).exists():
                remove_directory(self.ring / name)
            else:
                os.replace(self.ring / name, self.snapshots / name)
        fsync_directory(self.snapshots)
        fsync_directory(self.ring)
