"""Fine-tuning on GLUE tasks: transformers' class for sequences in a plain loop, one seed after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from megatron_sas.core.cli import InputError
from megatron_sas.data.tokenizer import plain_text_tokenizer
from megatron_sas.data.unknown import Unknown
from megatron_sas.evaluation.provenance import weights_sha256
from megatron_sas.glue.data import Examples
from megatron_sas.glue.settings import FORMAT, Settings
from megatron_sas.glue.tasks import MISMATCHED, Task
from megatron_sas.model.architectures import architecture_of
from megatron_sas.model.huggingface import to_hf_config, to_hf_state
from megatron_sas.optim.param_groups import decay_groups
from megatron_sas.run.directory import is_checkpoint, newest_of_run
from megatron_sas.run.reading import model_step, read_model, read_tokenizer

VERSION = 1


class Pretrained:
    """A model to fine-tune again and again: read once, given out as fresh copies with new last layers."""

    def __init__(self, path: str | Path, task: Task) -> None:
        """`path` is a Hugging Face directory, a checkpoint, or a run. Raises `InputError` for others.

        A BERT directory that has a pooler keeps it; our checkpoints have none.
        """
        self.path = newest_of_run(path)
        config, state, tokenizer_path = read_model(self.path)
        self.tokenizer: PreTrainedTokenizerBase = read_tokenizer(tokenizer_path)
        _surround_texts(self.tokenizer)
        self.sha256 = weights_sha256(self.path)
        self.max_length = config.max_position_embeddings
        self._num_labels = 1 if task.is_regression else len(task.classes)
        self._directory = None if is_checkpoint(self.path) else self.path
        if self._directory is None:
            self._state = to_hf_state(state, config)
            self._config = AutoConfig.for_model(**to_hf_config(config), num_labels=self._num_labels)
        self._architecture = architecture_of(config)
        self._class: type[PreTrainedModel] = getattr(transformers, self._architecture.HF_CLASSIFIER)
        self.type_vocab_size = config.type_vocab_size if self._architecture.TAKES_TOKEN_TYPES else 0

    def fresh(self) -> PreTrainedModel:
        """A new model in float32; what the masked LM lacks is drawn from torch's generator: the classifier, and BERT's
        pooler unless it is pretrained."""
        if self._directory is not None:
            return self._class.from_pretrained(
                self._directory, num_labels=self._num_labels, dtype=torch.float32, local_files_only=True
            )
        model = self._class(self._config)
        known = model.state_dict().keys()
        missing, _ = model.load_state_dict({n: t for n, t in self._state.items() if n in known}, strict=False)
        if any(not name.startswith(self._architecture.NEW_IN_CLASSIFIER) for name in missing):
            raise RuntimeError(f"weights do not fit: missing {missing}")
        return model


def _surround_texts(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer that puts no [CLS] before and [SEP] after a text BERT's way of doing it; leave others alone."""
    names = {"[CLS]": tokenizer.cls_token_id, "[SEP]": tokenizer.sep_token_id}
    ids = tokenizer("a")["input_ids"]
    if [*ids[:1], *ids[-1:]] != list(names.values()):
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=list(names.items())
        )


@dataclass(frozen=True)
class Encoded:
    """Examples as token ids and token types, lists of N lists, and their labels (N,)."""

    ids: list[list[int]]
    types: list[list[int]] | None  # None: the model takes none
    labels: np.ndarray
    unknown: Unknown


def encode(examples: Examples, pretrained: Pretrained, max_length: int) -> Encoded:
    """Cut texts into at most `max_length` tokens with [CLS] and [SEP]; of a pair the longer text gives way first."""
    tokenizer = pretrained.tokenizer
    plain = plain_text_tokenizer(tokenizer.backend_tokenizer.to_str())
    plain.enable_truncation(max_length, strategy="longest_first", direction=tokenizer.truncation_side)
    encodings = plain.encode_batch([texts if len(texts) > 1 else texts[0] for texts in examples.texts])
    ids = [encoding.ids for encoding in encodings]
    types = [encoding.type_ids for encoding in encodings]
    if pretrained.type_vocab_size < 2:
        types = [[0] * len(row) for row in types] if pretrained.type_vocab_size else None
    special = (tokenizer.cls_token_id, tokenizer.sep_token_id)
    unknown = Unknown.of(np.concatenate([np.array(row) for row in ids]), tokenizer.unk_token_id, special)
    return Encoded(ids, types, examples.labels, unknown)


def finetune(
    pretrained: Pretrained,
    task: Task,
    train: Encoded,
    validation: Sequence[Encoded],
    settings: Settings,
    seed: int,
    device: torch.device,
    after_step: Callable[[], Any] | None = None,
) -> dict[str, Any]:
    """Fine-tune with one seed and score after every epoch.

    Everything random (new layers, order, dropout) follows from `seed`, so on a CPU the result is the same every time.
    Returns `seed`, `metrics` (of the last epoch), `best_epoch` (from 1, the first with the highest `task.metric`),
    `epochs` (the metrics of each), `train_loss` (mean of each) and `unknown` (pieces of all texts that are [UNK]).
    Metrics on a second validation set end with
    "_mismatched". Raises `InputError` when the loss is no longer finite.
    """
    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    model = pretrained.fresh().to(device)
    groups = decay_groups(model.parameters(), settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate)
    steps = settings.epochs * -(-len(train.ids) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: settings.rate(step, steps))
    epochs, losses = [], []
    for epoch in range(settings.epochs):
        model.train()
        losses_sum = torch.zeros((), dtype=torch.float64, device=device)
        for rows in torch.randperm(len(train.ids), generator=order).split(settings.batch_size):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=settings.precision == "bf16"):
                loss = model(**_batch(train, rows.tolist(), pretrained.tokenizer.pad_token_id, device)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses_sum += loss.detach() * len(rows)
            if after_step is not None:
                after_step()
        total = float(losses_sum)  # read once an epoch: reading would make the host wait for a GPU
        if not math.isfinite(total):
            raise InputError(
                f"--seeds: with seed {seed} the loss is not finite in epoch {epoch + 1}; lower --learning-rate"
            )
        losses.append(total / len(train.ids))
        scores: dict[str, float] = {}
        for number, examples in enumerate(validation):
            found = task.score(examples.labels, predict(model, examples, settings, pretrained.tokenizer.pad_token_id))
            scores |= {name + MISMATCHED * number: value for name, value in found.items()}
        epochs.append(scores)
    best = max(range(len(epochs)), key=lambda epoch: epochs[epoch][task.metric])
    unknown = sum((examples.unknown for examples in validation), train.unknown)
    return {
        "seed": seed,
        "metrics": epochs[-1],
        "best_epoch": best + 1,
        "epochs": epochs,
        "train_loss": losses,
        "unknown": unknown.record(),
    }


def predict(model: PreTrainedModel, examples: Encoded, settings: Settings, pad_token_id: int) -> np.ndarray:
    """Class numbers int64 (N,), or scores float32 (N,)."""
    model.eval()
    device = next(model.parameters()).device
    lengths = np.array([len(row) for row in examples.ids])
    outputs: list[np.ndarray] = [np.empty(0)] * len(lengths)
    with torch.no_grad():
        for rows in _chunks(np.argsort(-lengths, kind="stable").tolist(), 4 * settings.batch_size):
            batch = _batch(examples, rows, pad_token_id, device)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=settings.precision == "bf16"):
                logits = model(**batch).logits.float().cpu().numpy()
            for row, values in zip(rows, logits, strict=True):
                outputs[row] = values
    stacked = np.stack(outputs)
    return stacked[:, 0] if stacked.shape[1] == 1 else stacked.argmax(axis=1)


def record(
    task: Task,
    pretrained: Pretrained,
    train: Examples,
    validation: Sequence[Examples],
    settings: Settings,
    seeds: list[dict[str, Any]],
) -> dict[str, Any]:
    """The result file: mean and standard error (null for one seed) of the task's metric over the seeds."""
    values = np.array([seed["metrics"][task.metric] for seed in seeds])
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return {
        "format": FORMAT,
        "version": VERSION,
        "task": task.name,
        "metric": task.metric,
        "seeds": seeds,
        "mean": float(values.mean()) if len(values) else None,
        "standard_error": error,
        **identity(task, pretrained, train, validation, settings),
        "model_step": model_step(pretrained.path),
        "train_examples": len(train),
        **{f"validation_examples{MISMATCHED * n}": len(examples) for n, examples in enumerate(validation)},
    }


def identity(
    task: Task, pretrained: Pretrained, train: Examples, validation: Sequence[Examples], settings: Settings
) -> dict[str, Any]:
    """What results must have in common to be seeds of one experiment."""
    return {
        "model": str(pretrained.path.resolve()),
        "model_sha256": pretrained.sha256,
        "data": {"train": train.source, "validation": [examples.source for examples in validation]},
        "settings": {**asdict(settings), "max_length": min(settings.max_length, pretrained.max_length)},
        "task": task.name,
    }


def _batch(examples: Encoded, rows: Sequence[int], pad_token_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    longest = max(len(examples.ids[row]) for row in rows)

    def padded(lists: list[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([lists[row] + [value] * (longest - len(lists[row])) for row in rows], device=device)

    mask = [[1] * len(examples.ids[row]) + [0] * (longest - len(examples.ids[row])) for row in rows]
    return {
        "input_ids": padded(examples.ids, pad_token_id),
        **({} if examples.types is None else {"token_type_ids": padded(examples.types, 0)}),
        "attention_mask": torch.tensor(mask, device=device),
        "labels": torch.from_numpy(examples.labels[np.asarray(rows)]).to(device),
    }


def _chunks(rows: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
