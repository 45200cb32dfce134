"""The δ of EWGS from second derivatives (Lee et al., arXiv 2104.00903, section 3.2), by Hutchinson's estimator."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_r2.aware.ewgs import EWGS, EWGSInputs
from hf_r2.aware.input_quantizer import averaged

PROBES, BATCH = 50, 16
"""The paper's number of probes, and of examples that it takes at a time."""


def hessian_traces(loss: Tensor, tensors: Sequence[Tensor], probes: int = PROBES) -> tuple[list[Tensor], list[Tensor]]:
    """Estimate the traces of a loss's Hessians in each of some tensors.

    With v of independent ±1, `E[vᵀ H v]` is the trace of H (Hutchinson). One product with the Hessian in all tensors
    together serves each of them: what mixes two of them has mean 0.

    Args:
        loss: scalar, a function of the tensors that can be differentiated twice.
        tensors: any shapes.
        probes: random vectors v.

    Returns:
        The loss's gradients in the tensors, of their shapes, and the traces, scalars.
    """
    gradients = torch.autograd.grad(loss, tensors, create_graph=True)
    traces = [torch.zeros((), dtype=torch.float32, device=tensor.device) for tensor in tensors]
    for _ in range(probes):
        signs = [torch.randint_like(tensor, 2) * 2 - 1 for tensor in tensors]
        products = torch.autograd.grad(
            gradients, tensors, grad_outputs=signs, retain_graph=True, materialize_grads=True
        )
        for trace, sign, product in zip(traces, signs, products, strict=True):
            trace += (sign * product).sum() / probes
    return [gradient.detach() for gradient in gradients], traces


def update_deltas(model: nn.Module, batches: Iterable[Mapping[str, Any]], probes: int = PROBES) -> list[float]:
    """Give every EWGS quantizer of a model the δ of its layer: `max(0, Tr(H) / N / (3 std(g)))`.

    g and H are gradient and Hessian of the loss in its N quantized values x_q, averaged over the batches, and over all
    processes, which must call it together. The paper takes 10 batches of 16 at the start of every epoch. The model is
    left as it was but for δ.

    Args:
        model: attached, with compression begun, and trained for a step if its inputs' quantization is learned.
        batches: keyword arguments of the model, with labels, on its device; see [`small_batches`].
        probes: see [`hessian_traces`].

    Returns:
        What δ became, in the order of `model.modules()`.

    Raises:
        ValueError: if the model computes no loss.
    """
    quantizers = [module for module in model.modules() if isinstance(module, EWGS | EWGSInputs)]
    statistics = [torch.zeros(2, dtype=torch.float32, device=quantizer.delta.device) for quantizer in quantizers]
    buffers, training = [(buffer, buffer.clone()) for buffer in model.buffers()], model.training
    model.train()
    for batch in batches:
        for quantizer in quantizers:
            quantizer.watched = []
        # The other kernels of attention have no second derivative
        with torch.random.fork_rng(), sdpa_kernel(SDPBackend.MATH):
            loss = model(**batch).loss
            if loss is None:
                raise ValueError("δ of EWGS from the Hessian needs the model's loss: give it batches with labels")
            _add_statistics(loss, quantizers, statistics, probes)
    for quantizer in quantizers:
        quantizer.watched = None
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
        for quantizer, (trace, deviation) in zip(quantizers, map(averaged, statistics), strict=True):
            quantizer.delta.copy_((trace / (3 * deviation)).nan_to_num(0.0, posinf=0.0).clamp_min(0))
    model.train(training)
    return [float(quantizer.delta) for quantizer in quantizers]


def small_batches(batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Cut a batch into those of the paper's size; what has no dimension of examples goes with each."""
    examples = max(len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim())

    def part(value: Any, start: int) -> Any:
        cut = isinstance(value, Tensor) and value.dim() and len(value) == examples
        return value[start : start + BATCH] if cut else value

    for start in range(0, examples, BATCH):
        yield {key: part(value, start) for key, value in batch.items()}


def _add_statistics(loss: Tensor, quantizers: Sequence[Any], statistics: Sequence[Tensor], probes: int) -> None:
    """Add a batch's Tr(H) / N and std(g) of every quantizer."""
    codes = [tensor for quantizer in quantizers for tensor in quantizer.watched]
    gradients, traces = map(iter, hessian_traces(loss, codes, probes))
    for quantizer, statistic in zip(quantizers, statistics, strict=True):
        count = len(quantizer.watched)
        parts = torch.cat([next(gradients).flatten() for _ in range(count)])
        trace = sum(next(traces) for _ in range(count))
        # Codes are steps · x_q: a derivative in x_q is one in codes times the steps
        statistic[0] += quantizer.steps**2 * trace / len(parts)
        statistic[1] += quantizer.steps * parts.std()
