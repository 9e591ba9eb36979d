"""Which update of training a model's name stands for, in a folder of models that somebody else named.

The step is the number behind "step" or a word like it, or else the one in which the names differ. Public series that
have more to them are known: OLMo's stages and counts of tokens (`stage2-ingredient1-step1000-tokens5B`) and Ettin's
phases (`step599525`, `ext2000`, `decay100`). Pythia's (`step1000`), MultiBERTs' (`seed_0-step_20k`) and BabyLM's
(`chck_10M`) need nothing special.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal

from megatron_sas.core.cli import InputError

STEP_PATTERN_HELP = (
    "regular expression whose group is the step in the names of a folder's models, e.g. 'step_([0-9]+k?)'; k, M and B "
    "stand for thousand, million and billion (default: what the models record, or the number in which names differ)"
)

REMEDY = "rename them alike, move some elsewhere, or give --step-pattern"

_NUMBER = re.compile(r"(?<!\d)(?<!\d[.,])(\d+(?:[.,]\d+)*)([kKmMbB]?)(?![a-zA-Z0-9]|[.,]\d)")
_GROUPED = re.compile(r"\d{1,3}(\.\d{3})+")  # 1.000 may be one or a thousand
_EXPONENT = re.compile(r"\d[eE][+-]?$")
_FACTORS = {"": 1, "k": 1_000, "m": 1_000_000, "b": 1_000_000_000}
_TOKENS = re.compile(r"[-_]tokens\d+[kKmMbBtT]")  # OLMo: tokens seen until the step before it
_STAGE = re.compile(r"stage(\d+)([-_]ingredient\d+)?[-_]")  # OLMo: an ingredient is one of several runs of a stage
_PHASE = re.compile(r"(step|ext|decay)(?=\d+$)")  # Ettin
_MARK = re.compile(r"(step|steps|checkpoint|ckpt|chck|iter|update)[-_.]?$", re.IGNORECASE)
_PHASES = ("step", "ext", "decay")


@dataclass(frozen=True)
class _Name:
    """A name taken apart: `rest` is the text between its `numbers`, without phase and count of tokens."""

    whole: str
    order: int
    phase: str
    rest: tuple[str, ...]
    numbers: tuple[re.Match[str], ...]


def steps_of_names(names: Sequence[str], folder: str, report: Callable[[str], None] = lambda line: None) -> list[int]:
    """The step of each model in a folder by its name, or its place in the order of names if none has a number.

    A phase that follows another one counts on from its last step in the folder: `ext2000` next to `step599525` is
    601525. `report` gets a line about that, and about the order of names.

    Raises:
        InputError: names are not alike, differ in several numbers, or have a number that is no step (`1e5`, `1,000`,
            `1.5`); `folder` is where they are, for the message.
    """
    parsed = [_parse(name) for name in names]
    if not any(name.numbers for name in parsed):
        report(f"{folder}: no numbers in the names, so the models count in the order of their names")
        ranks = {name: rank for rank, name in enumerate(sorted(names))}
        return [ranks[name] for name in names]
    first = parsed[0]
    for name in parsed[1:]:
        if name.rest != first.rest:
            raise InputError(f"{folder}: {first.whole} and {name.whole} are not named alike; {REMEDY}")
    column = _column_of_steps(parsed, folder)
    steps = [_whole_number(f"{folder}/{name.whole}", name.whole, name.numbers[column]) for name in parsed]
    offsets = _phase_offsets(parsed, steps, folder)
    begins = [f"{phase} at {offset}" for (_, phase), offset in offsets.items() if offset]
    if begins:
        report(f"{folder}: steps count on from phase to phase; those of {', '.join(begins)}")
    return [step + offsets[name.order, name.phase] for name, step in zip(parsed, steps, strict=True)]


def step_by_pattern(name: str, pattern: re.Pattern[str], where: str) -> int:
    """The number that the only group of `pattern`, or its group `step`, finds in a name, with a unit (k, M, B) or not.

    Raises:
        InputError: it finds none, or what it finds is no whole number.
    """
    match = pattern.search(name)
    text = match["step" if "step" in pattern.groupindex else 1] if match else None
    if text is None:
        raise InputError(f"{where}: --step-pattern {pattern.pattern!r} does not find a step in it; correct the pattern")
    number = _NUMBER.fullmatch(text)
    if number is None:
        raise InputError(f"{where}: --step-pattern finds {text!r}, which is no number like 1500, 20k or 1.5M")
    return _whole_number(where, text, number)


def last_number(name: str, where: str) -> int | None:
    """The last number in the name of a single model, None if there is none. Raises `InputError` if it is no step."""
    numbers = list(_NUMBER.finditer(name))
    return _whole_number(where, name, numbers[-1]) if numbers else None


def _parse(whole: str) -> _Name:
    name, order, phase = _TOKENS.sub("", whole), 0, ""
    if stage := _STAGE.search(name):
        order, phase = int(stage[1]), stage[0].rstrip("-_")
        name = name[: stage.start()] + name[stage.end() :]
    elif word := _PHASE.search(name):
        order, phase = _PHASES.index(word[1]), word[1]
        name = f"{name[: word.start()]}step{name[word.end() :]}"
    numbers = tuple(_NUMBER.finditer(name))
    ends = [0, *(number.end() for number in numbers)]
    starts = [*(number.start() for number in numbers), len(name)]
    rest = tuple(name[end:start] for end, start in zip(ends, starts, strict=True))
    return _Name(whole, order, phase, rest, numbers)


def _column_of_steps(names: Sequence[_Name], folder: str) -> int:
    """Which number of a name is the step: one behind a word for it, else the one in which names differ, else the last.

    Raises:
        InputError: names differ in another number, too.
    """
    first = names[0]
    columns = range(len(first.numbers))
    varying = [column for column in columns if len({name.numbers[column][0] for name in names}) > 1]
    marked = [column for column in columns if _MARK.search(first.rest[column])]
    step = (marked or varying or columns)[-1]
    if others := [column for column in varying if column != step]:
        other = next(name for name in names if name.numbers[others[0]][0] != first.numbers[others[0]][0])
        raise InputError(
            f"{folder}: {first.whole} and {other.whole} differ in more than one number, the step; {REMEDY}"
        )
    return step


def _phase_offsets(names: Sequence[_Name], steps: Sequence[int], folder: str) -> dict[tuple[int, str], int]:
    """Updates before each phase: the last step of the one before it, as far as the folder has it."""
    offsets: dict[tuple[int, str], int] = {}
    end = 0
    for order, phase in sorted({(name.order, name.phase) for name in names}):
        if any(order == earlier for earlier, _ in offsets):
            one, two = (next(n.whole for n in names if n.phase == p) for p in ([*offsets][-1][1], phase))
            raise InputError(f"{folder}: {one} and {two} are of two runs of one stage; {REMEDY}")
        offsets[order, phase] = end
        end += max(step for name, step in zip(names, steps, strict=True) if name.phase == phase)
    return offsets


def _whole_number(where: str, text: str, number: re.Match[str]) -> int:
    digits, unit = number.groups()
    exponent = _EXPONENT.search(text[: number.start()])
    if exponent is None and re.fullmatch(r"\d+(\.\d+)?", digits) and (unit or not _GROUPED.fullmatch(digits)):
        value = Decimal(digits) * _FACTORS[unit.lower()]
        if value == int(value):
            return int(value)
    raise InputError(
        f"{where}: the number in its name is no step that can be read for sure; write it as in 1500, 20k or 1.5M"
    )
