"""What an evaluation is. To add one, write it in one file and add a line to `EVALUATIONS` (`registry.py`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megatron_sas.core.settings import Section
    from megatron_sas.data.packed import PackedData
    from megatron_sas.data.unknown import Unknown
    from megatron_sas.evaluation.batching import Encoder
    from megatron_sas.evaluation.items import Items
    from megatron_sas.objective.base import Term

TEXT = "text"  # the input that evaluations share: held-out packed text


@dataclass(frozen=True)
class Metric:
    """A number, or a table of numbers, that an evaluation gives: the only place where its names are written.

    A metric with a `title` is a curve of reports, with an onset, and a column of their tables.
    """

    key: str  # in evaluation records and in TensorBoard's tags
    label: str = ""  # in words, for model cards; with {} for the rows of a table
    direction: int = 0  # 1: more is better, so its onset is a rise; -1: less is; 0: neither
    format: str = ".4f"
    title: str = ""  # short, for columns and axes
    name: str = ""  # in the files of reports; default: the key
    printed: str = ""  # in the line that training prints; "": not printed
    axis: str = ""  # in the figure of complexity; "": not drawn there
    point: tuple[str, ...] = ()  # where in point.json of a measured snapshot it is; default: at the key
    each: str = ""  # of a table: column of summary.csv for each row, with {}; "": none
    chance: float | None = None  # what guessing gives
    watched: bool = False  # whether `watch.metrics` takes it

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or self.key)
        object.__setattr__(self, "point", self.point or (self.key,))

    @property
    def column(self) -> str:
        """Its column of summary.csv."""
        return self.point[0] if len(self.point) == 1 else self.key

    def in_point(self, point: Mapping[str, Any]) -> Any:
        """Its value in a point.json, None where that has none."""
        value: Any = point
        for name in self.point:
            value = value.get(name) if isinstance(value, Mapping) else None
        return value


@dataclass(frozen=True)
class Resources:
    """What an evaluation may be made from."""

    tokenizer: PreTrainedTokenizerBase
    text: PackedData | None  # held-out, of this tokenizer
    max_length: int  # tokens that the model takes
    mask_prob: float
    terms: Mapping[str, Term] = field(default_factory=dict)
    text_gives_attention: bool = False  # nothing else measures attention's entropy on snapshots


class Evaluation(ABC):
    """Something measured on a model, prepared once and run many times.

    It owns its fields of the section `evaluation`, what it measures, and the names of its metrics. `input` names what
    it is measured on, in a trajectory's settings: `TEXT`, or an input of its own, which `source` then describes.
    `metrics[0]` is the one that the others belong to: reports take them all from the same source, live or measured.
    `item_counts` names a table of its records and the field in which each row of that counts its items.
    """

    settings: ClassVar[type[Section]]  # its fields of the section `evaluation`
    metrics: ClassVar[tuple[Metric, ...]]
    input: ClassVar[str] = TEXT
    input_title: ClassVar[str] = ""  # of an input of its own, in the dry run; default: `input`
    items: ClassVar[type[Items] | None] = None
    item_counts: ClassVar[tuple[str, str] | None] = None
    unknown: Unknown | None = None  # how much of an input of its own the tokenizer does not know

    @classmethod
    def wanted(cls, section: Any) -> bool:
        """Whether the section asks for it, given that there is `TEXT` where it needs that: by its first setting."""
        return getattr(section, next(iter(cls.settings.model_fields))) is not None

    @classmethod
    def preview(cls, section: Any) -> tuple[str, list[str]]:
        """What it would use of an input of its own, in words, and what is too small there, each with a field's name.

        Raises:
            InputError: the input is wrong.
        """
        return "not read before the run", []

    @classmethod
    def shortages(cls, section: Any, text: PackedData) -> list[str]:
        """What the section asks for and the held-out text cannot give; each begins with the field's name."""
        return []

    @classmethod
    def faults(cls, section: Any, has_text: bool) -> list[str]:
        """What is wrong between these settings and the rest of the configuration; each begins with a field's name."""
        return []

    def __init__(self, section: Any, resources: Resources) -> None:
        """Read and prepare the inputs.

        Args:
            section: its `settings`, and `batch_tokens`, the tokens of a forward pass.
            resources: with a text where `input` is `TEXT`.

        Raises:
            InputError: an input is wrong, or does not fit the model.
        """
        self.section, self.resources = section, resources

    @abstractmethod
    def run(self, model: Encoder) -> dict[str, Any]:
        """What a training run records. A collective: every rank makes the same number of forward passes."""

    def measure(self, model: Encoder) -> tuple[dict[str, Any], Items | None]:
        """What the point.json of a snapshot gets, and the single items behind it."""
        return self.run(model), None

    def source(self) -> dict[str, Any]:
        """An input of its own: what decides the measurement, as JSON values."""
        return {}

    def facts(self) -> dict[str, Any]:
        """What the record of a run's start says about the input."""
        return {}

    def notes(self) -> list[str]:
        """Lines for the user about the input."""
        return []

    @classmethod
    def warning(cls, values: Mapping[str, Any]) -> str:
        """What is doubtful about the values of a record, in a few words; "" for nothing."""
        return ""

    @classmethod
    def independent_items(cls, counts: Sequence[int], rows: int) -> float:
        """The number of items that a value rests on, from the positive counts in the rows of `item_counts`."""
        return float(sum(counts))
