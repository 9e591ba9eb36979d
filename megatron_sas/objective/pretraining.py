"""The module that is trained: BERT, the masked-LM loss and the terms in one forward, as DeepSpeed wants it.

DeepSpeed divides what it is given by the accumulation steps A and averages gradients over the W ranks. With N masked
tokens in the *global* batch of G sequences, the objective

    Σ over masked tokens / N  +  Σ over terms of λ · Σ over sequences of R / G          (reduction "sequence")

is therefore handed over as local sums times W·A/N and W·A/G, which makes it independent of W and A. The reduction "sum"
is the paper's code: R summed over the micro-batch, averaged over ranks and accumulation steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron_sas.data.mlm_dataset import IGNORED
from megatron_sas.model.base import MaskedLM
from megatron_sas.objective.base import Batch, Term
from megatron_sas.objective.terms import Needs


@dataclass
class LossParts:
    """One micro-batch's objective. The sums are float32 scalars without gradient, of the terms that were computed."""

    loss: Tensor  # scaled, to be passed to `engine.backward`
    mlm_sum: Tensor  # Σ over masked tokens of -log p
    term_sums: dict[str, Tensor]  # Σ over sequences of R
    edge_counts: dict[str, Tensor]  # int64: the edges that a term asked for


class MaskedLMWithTerms(nn.Module):
    """BERT and its objective.

    `precision` is the context in which `forward` computes. It is entered here and not around the call, because
    DeepSpeed switches off an autocast that it finds around its own forward.
    """

    def __init__(self, bert: MaskedLM, terms: Mapping[str, Term]) -> None:
        super().__init__()
        self.bert = bert
        self.terms = dict(terms)
        self._compiled = False
        self.precision: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext

    def forward(
        self,
        input_ids: Tensor,
        masked_positions: Tensor,
        labels: Tensor,
        heads: Tensor | None = None,
        *,
        mlm_scale: Tensor | float,
        term_scales: Mapping[str, float],
    ) -> LossParts:
        """The loss of a micro-batch.

        Args:
            input_ids: int64 `(B, S)`.
            masked_positions, labels: int64 `(M,)`, flat indices into B·S and the original tokens there; a label of
                -100 does not count.
            heads: int64 `(B, S)` dependency heads; needed by terms that look at them.
            mlm_scale: W·A/N (a tensor: N is all-reduced on the device), see above.
            term_scales: by name of the terms to compute, λ times W·A/G, or λ alone for the reduction "sum"; a term
                whose scale is 0 is computed but has no gradient.
        """
        batch = Batch(input_ids, masked_positions, labels, heads)
        needs = Needs({name: self.terms[name] for name in term_scales}, batch)
        # The head's gradient has all rows of the word embedding. On a CPU autograd adds the few of the tokens to it in
        # place, if they come as a sparse tensor, instead of adding up two gradients of that size.
        word = self.bert.embeddings.word
        word.sparse = not self._compiled and word.weight.device.type == "cpu" and word.weight.dtype == torch.float32
        with self.precision():
            output = self.bert(input_ids, only_at=masked_positions, **needs.arguments)
            word.sparse = False  # for whoever else calls the model
            mlm_sum = self.mlm_loss(output.hidden, labels)
        loss, sums = mlm_sum * mlm_scale, {}
        for name, scale in term_scales.items():
            with torch.set_grad_enabled(torch.is_grad_enabled() and scale != 0.0):
                term_sum = self.terms[name](needs.output_for(name, output), batch).sum()
            if scale != 0.0:
                loss = loss + term_sum * scale
            sums[name] = term_sum.detach()
        return LossParts(loss, mlm_sum.detach(), sums, {name: (e >= 0).sum() for name, e in needs.edges.items()})

    def mlm_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """The head on hidden states `(M, C)`, and the sum of its losses.

        One function, because a compiler that sees both needs no float32 copy of the logits.
        """
        if torch.compiler.is_compiling():
            return mlm_loss_sum(self.bert.logits(hidden), labels)
        logits, bias = self.bert.logits(hidden, apart=True)
        return mlm_loss_sum(logits, labels, bias)

    def compile_parts(self, mode: str | None = None) -> None:
        """Compile embeddings, layers and loss with `torch.compile`: fused element-wise work, one kind of layer once.

        Parts, because layers of one kind share one compiled function (the last is a kind of its own: it returns few
        rows) and λ, which changes, stays outside. The terms too. `mode` is that of `torch.compile`.
        """
        # A function for every kind of layer, with and without edges; beyond the limit torch goes on uncompiled.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
        self._compiled = True
        self.bert.embeddings.compile(dynamic=False, mode=mode)
        for layer in self.bert.layers:
            layer.compile(dynamic=False, mode=mode)
        self.mlm_loss = torch.compile(self.mlm_loss, dynamic=False, mode=mode)


def mlm_loss_sum(logits: Tensor, labels: Tensor, bias: Tensor | None = None) -> Tensor:
    """Σ over M positions of -log softmax(logits)[label], in float32, from logits `(M, V)` and int64 labels `(M,)`.

    Positions whose label is -100 do not count. A bias `(V,)` that the logits lack is added on the way, while a part of
    them is in a cache.
    Columns of the padded vocabulary are -inf: they take no probability and get no gradient.
    Logits of which a gradient is wanted are overwritten, and a backward can be run once.
    """
    if torch.compiler.is_compiling():  # which needs no copies of the logits for this
        return F.cross_entropy(logits.float(), labels, reduction="sum", ignore_index=IGNORED)
    return _SummedCrossEntropy.apply(logits, labels, logits.new_zeros(logits.shape[1]) if bias is None else bias)


class _SummedCrossEntropy(torch.autograd.Function):
    """A few rows at a time in float32, and the gradient in the logits' own memory.

    `F.cross_entropy` makes three more arrays of the logits' size. Float32 logits of which a gradient is wanted become
    exp(logit - largest) in the forward, so that no exponential is taken twice.
    """

    @staticmethod
    def forward(ctx, logits, labels, bias):  # noqa: ANN001
        bias = bias.float()
        counted, columns = labels != IGNORED, torch.where(labels != IGNORED, labels, 0)
        label_logits = logits.gather(1, columns[:, None]).squeeze(1).float() + bias[columns]
        ctx.exponentials = logits.dtype == torch.float32 and ctx.needs_input_grad[0]
        largest, total = (logits.new_empty(len(logits), dtype=torch.float32) for _ in range(2))
        for part in _parts(logits):
            rows = logits[part] if ctx.exponentials else logits[part].to(torch.float32, copy=True)
            largest[part] = rows.add_(bias).amax(dim=1)
            total[part] = rows.sub_(largest[part, None]).exp_().sum(dim=1)
        lse = total.log() + largest
        ctx.save_for_backward(logits, labels, bias, total if ctx.exponentials else lse)
        return torch.where(counted, lse - label_logits, 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # noqa: ANN001
        logits, labels, bias, of_rows = ctx.saved_tensors
        counted = labels != IGNORED
        factors, columns = torch.where(counted, grad, 0.0)[:, None], torch.where(counted, labels, 0)[:, None]
        grad_bias = torch.zeros_like(bias)
        for part in _parts(logits):
            rows, of_row = logits[part], of_rows[part, None]
            if ctx.exponentials:
                gradient = rows.mul_(factors[part] / of_row).scatter_add_(1, columns[part], -factors[part])
            else:
                softmax = (rows.float() + bias).sub_(of_row).exp_()
                gradient = softmax.mul_(factors[part]).scatter_add_(1, columns[part], -factors[part])
                rows.copy_(gradient)
            grad_bias += gradient.sum(dim=0)
        return logits, None, grad_bias


def _parts(logits: Tensor) -> list[slice]:
    """All rows, as many at a time as fit into a cache of every CPU thread; on other devices few calls matter more."""
    values = 2**18 * torch.get_num_threads() if logits.device.type == "cpu" else 2**26
    rows = max(1, values // logits.shape[1])
    return [slice(start, start + rows) for start in range(0, len(logits), rows)]
