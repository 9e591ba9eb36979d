"""Fine-tuning on GLUE tasks: transformers' class for sequences in a plain loop, one seed after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers.processors import TemplateProcessing
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

import megatron_sas
from megatron_sas.core.cli import InputError
from megatron_sas.data.tokenizer import plain_text_tokenizer
from megatron_sas.data.unknown import Unknown
from megatron_sas.evaluation.provenance import weights_sha256
from megatron_sas.glue.data import Examples
from megatron_sas.glue.tasks import FORMAT, MISMATCHED, Settings, Task
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
    """N examples as tokens."""

    ids: list[list[int]]
    types: list[list[int]] | None  # None: the model takes none
    labels: np.ndarray  # (N,)
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
        types = [[0] * len(row) for row in ids] if pretrained.type_vocab_size else None
    special = (tokenizer.cls_token_id, tokenizer.sep_token_id)
    return Encoded(ids, types, examples.labels, Unknown.of(np.concatenate(ids), tokenizer.unk_token_id, special))


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
    `epochs` (the metrics of each), `train_loss` (mean of each) and `unknown` (tokens of all texts that are [UNK]).
    Metrics on a second validation set end with "_mismatched". Raises `InputError` when the loss is no longer finite.
    """
    pad_token_id, is_bf16 = pretrained.tokenizer.pad_token_id, settings.precision == "bf16"
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
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_bf16):
                loss = model(**_batch(train, rows.tolist(), pad_token_id, device)).loss
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
            of_set = task.score(examples.labels, predict(model, examples, settings, pad_token_id))
            scores |= {name + MISMATCHED * number: value for name, value in of_set.items()}
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
    longest_first = np.argsort([-len(row) for row in examples.ids], kind="stable")
    logits, size = [], 4 * settings.batch_size
    with torch.no_grad():
        for start in range(0, len(longest_first), size):
            batch = _batch(examples, longest_first[start : start + size].tolist(), pad_token_id, device)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=settings.precision == "bf16"):
                logits.append(model(**batch).logits.float().cpu().numpy())
    outputs = np.concatenate(logits)[np.argsort(longest_first)]
    return outputs[:, 0] if outputs.shape[1] == 1 else outputs.argmax(axis=1)


def record(
    task: Task,
    pretrained: Pretrained,
    train: Examples,
    validation: Sequence[Examples],
    settings: Settings,
    seeds: list[dict[str, Any]],
    device: torch.device,
) -> dict[str, Any]:
    """The result file: mean and standard error (null for one seed) of the task's metric over the seeds."""
    values = np.array([seed["metrics"][task.metric] for seed in seeds])
    modules = {"megatron_sas": megatron_sas, "torch": torch, "transformers": transformers}
    return {
        "format": FORMAT,
        "version": VERSION,
        "task": task.name,
        "metric": task.metric,
        "seeds": seeds,
        "mean": float(values.mean()) if len(values) else None,
        "standard_error": float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None,
        **identity(task, pretrained, train, validation, settings),
        "model_step": model_step(pretrained.path),
        "train_examples": len(train),
        **{f"validation_examples{MISMATCHED * n}": len(examples) for n, examples in enumerate(validation)},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": {name: module.__version__ for name, module in modules.items()},
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
    def padded(lists: list[list[int]], value: int) -> torch.Tensor:
        return pad_sequence([torch.tensor(row) for row in lists], batch_first=True, padding_value=value).to(device)

    ids = [examples.ids[row] for row in rows]
    return {
        "input_ids": padded(ids, pad_token_id),
        **({} if examples.types is None else {"token_type_ids": padded([examples.types[row] for row in rows], 0)}),
        "attention_mask": padded([[1] * len(row) for row in ids], 0),
        "labels": torch.from_numpy(examples.labels[np.asarray(rows)]).to(device),
    }
