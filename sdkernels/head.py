"""The LM head and a loss, chunk of tokens by chunk of tokens: matmul, row kernels, gradient, matmuls.

A chunk of float32 logits is made, the loss's own function on logits reads it, its gradient takes its place, and two
matmuls turn that into gradients of hidden states and weight. Nothing of size (tokens, V) is ever there.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sdkernels.families import FAMILIES, Values
from sdkernels.first_order import first_order
from sdkernels.packing import pack, unpack

# Bytes of float32 logits that a side holds at a time. On a GPU 2,000 tokens keep the matmuls fast and the sum of the
# weight's gradient, read and written once a chunk, cheap.
CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 1280 << 20}

SHARD_TOKENS = {"cpu": 256, "cuda": 2048}  # a chunk's where the vocabulary is sharded


class Side(NamedTuple):
    """Hidden states (N, H), and the head that makes logits (N, V) of them: weight (V, H) and bias (V,)."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


class Other(NamedTuple):
    """The side that gets no gradient, if any. A weight of None means the student's head: both share one matmul."""

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None


class _Whole(torch.autograd.Function):
    """A DTensor's full tensor. Its gradient is the mean over the mesh: that of data that are split over it, as under
    FSDP, and of data that are not."""

    @staticmethod
    def forward(ctx, value):
        ctx.mesh, ctx.placements = value.device_mesh, value.placements
        return value.full_tensor()

    @staticmethod
    def backward(ctx, grad):
        from torch.distributed.tensor import DTensor, Partial

        parts = [Partial()] * ctx.mesh.ndim
        return DTensor.from_local(grad / ctx.mesh.size(), ctx.mesh, parts).redistribute(placements=ctx.placements)


def whole(value: Any) -> Any:
    """A DTensor gathered, anything else as it is."""
    return _Whole.apply(value) if hasattr(value, "full_tensor") else value


def first_row(weight: Any, group: dist.ProcessGroup) -> int | None:
    """The first global row of this rank's part of a DTensor (V, H), sharded as it shards; None of a plain tensor."""
    if not hasattr(weight, "to_local"):
        return None
    return min(group.rank() * -(-weight.shape[0] // group.size()), weight.shape[0])


def local_rows(name: str, value: Any, group: dist.ProcessGroup) -> Any:
    """This rank's rows of a DTensor (V, H) or (V,), which must be sharded over the group alone; else the value."""
    if not hasattr(value, "to_local"):
        return value
    from torch.distributed.tensor import Shard

    ranks, meshed = dist.get_process_group_ranks(group), value.device_mesh.mesh.tolist()
    if value.placements != (Shard(0),) or meshed != ranks:
        raise ValueError(f"{name} is a DTensor with placements {value.placements} over ranks {meshed}; with a group it "
                         f"must have {(Shard(0),)} over the group's, {ranks}: redistribute it so, or pass this rank's "
                         "rows as a plain tensor, with vocab_start if shards are unequal (under FSDP, inside the "
                         "model's forward)")  # fmt: skip
    return value.to_local()


class _Head:
    """Weight and bias of a side in the dtypes of its matmuls and of its logits."""

    def __init__(self, side: Side, scale: float, softcap: float, dtype: torch.dtype | None) -> None:
        self.logits_dtype = _logits_dtype(side.hidden, side.weight, dtype)
        given = torch.promote_types(side.hidden.dtype, side.weight.dtype) if dtype is None else dtype
        self.dtype = given if side.hidden.is_cuda else self.logits_dtype  # only there 16-bit matmuls give float32
        self.rounding = dtype or self.dtype
        self.scale, self.softcap = scale, softcap
        self.weight = self.cast(side.weight)
        self.bias = None if side.bias is None else side.bias.to(self.logits_dtype)

    def cast(self, value: Tensor) -> Tensor:
        """Rounded as autocast asks, in the dtype of the matmuls."""
        return value.to(self.rounding).to(self.dtype)

    def write_logits(self, hidden: Tensor, logits: Tensor) -> None:
        """Over `logits` (n, V): (hidden @ weight.T + bias) scale, capped."""
        if self.dtype == self.logits_dtype:
            given, beta = (logits, 0.0) if self.bias is None else (self.bias, self.scale)
            torch.addmm(given, hidden, self.weight.t(), beta=beta, alpha=self.scale, out=logits)
        else:
            torch.mm(hidden, self.weight.t(), out_dtype=self.logits_dtype, out=logits)
            if self.bias is not None:
                logits.add_(self.bias)
            if self.scale != 1:
                logits.mul_(self.scale)
        if self.softcap:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)


def _add_product(total: Tensor, left: Tensor, right: Tensor, beta: float, scale: float) -> None:
    """total = beta total + scale left @ right, summed in its dtype."""
    out_dtype = {} if left.dtype == total.dtype else {"out_dtype": total.dtype}
    torch.addmm(total, left, right, beta=beta, alpha=scale, out=total, **out_dtype)


class _Gradients:
    """What is wanted of the gradients of a side's hidden states, weight and bias, filled chunk by chunk."""

    def __init__(self, side: Side, head: _Head, wants: Sequence[bool]) -> None:
        self.head = head
        self.hidden = torch.empty_like(side.hidden, dtype=head.logits_dtype) if wants[0] else None
        allocate = torch.empty_like if len(side.hidden) else torch.zeros_like  # the first chunk writes, if there is one
        self.weight = allocate(side.weight, dtype=head.logits_dtype) if wants[1] else None
        self.bias = None
        if wants[2] and side.bias is not None:
            self.bias = torch.zeros_like(side.bias, dtype=head.logits_dtype)

    def add(self, grad: Tensor, logits: Tensor, hidden: Tensor, piece: slice) -> None:
        """Those through the logits (n, V) of a chunk, from their gradient and the hidden states; masked rows are 0."""
        head, scale = self.head, self.head.scale
        if head.softcap:
            torch.ops.aten.tanh_backward.grad_input(grad, logits.div_(head.softcap), grad_input=grad)
        if self.bias is not None:
            self.bias.add_(grad.sum(0), alpha=scale)
        grad = grad.to(hidden.dtype)
        if self.hidden is not None:
            _add_product(self.hidden[piece], grad, head.weight, 0.0, scale)
        if self.weight is not None:  # with 0 what is in the memory does not count
            _add_product(self.weight, grad.t(), hidden, float(piece.start > 0), scale)

    def all(self, like: Tensor) -> list[Tensor]:
        """The three, those that are not wanted empty."""
        return [like.new_empty(0) if x is None else x for x in (self.hidden, self.weight, self.bias)]


def _autograd_on() -> Any:
    """Autograd inside an operator: compiled graphs call it with the dispatch keys of autograd off."""
    off = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradCPU", "AutogradCUDA", "AutogradOther", "ADInplaceOrView"):
        off = off.remove(getattr(torch._C.DispatchKey, key))
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), off)


def _chunk_size(tokens: int, weight: Tensor, sharded: bool) -> int:
    """As few chunks as CHUNK_BYTES allows, all of one size: matmuls of few tokens are slow.

    Ranks of unequal shards must agree on it.
    """
    device = "cpu" if weight.device.type == "cpu" else "cuda"
    most = SHARD_TOKENS[device] if sharded else CHUNK_BYTES[device] // (4 * weight.shape[0])
    chunks = -(-tokens // max(most, 1))
    return -(-tokens // max(chunks, 1)) or 1


def _logits_dtype(hidden: Tensor, weight: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """That of logits, results and sums of gradients; `dtype` is autocast's."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype) if dtype is None else dtype
    return torch.promote_types(dtype, torch.float32)


def _saved_as_they_are() -> Any:
    """No hooks on what autograd saves: those of the caller, as of checkpointing, are not for the graph of a chunk."""
    if torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() is not None:  # there are none, nor may be
        return nullcontext()
    # Detached: an output that its own node holds would keep a graph without a backward, and the chunk, forever.
    return torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda x: x)


def _empty_results(function: str, hidden: Tensor, layout: str, dtype: torch.dtype) -> list[Tensor]:
    places = [int(word.split("=")[1]) for word in layout.split(";") if word.startswith("max_size=")]
    return [
        hidden.new_empty(
            (hidden.shape[0], *(places if result.listed else ())),
            dtype=torch.int64 if result.integer else dtype,
        )
        for result in FAMILIES[function].results
    ]


torch.library.define(
    "sdkernels::linear_sweep",
    "(str function, Tensor hidden, Tensor weight, Tensor? bias, Tensor? other_hidden, Tensor? other_weight, "
    "Tensor? other_bias, Tensor[] tensors, Tensor numbers, str layout, Tensor?[] upstream, bool[] wants, "
    "int? chunk_size, ScalarType? dtype) -> Tensor[]",
)


# Not a `custom_op`, which has autograd off: the loss's own backward makes the gradient of a chunk.
@torch.library.impl("sdkernels::linear_sweep", "CompositeExplicitAutograd")
def _linear_sweep(function, hidden, weight, bias, other_hidden, other_weight, other_bias, tensors, numbers, layout,
                  upstream, wants, chunk_size, dtype):  # fmt: skip
    """The function's results for all tokens, then the gradients of hidden states, weight and bias that are wanted.

    `upstream` holds the gradient (N,) of each result, or None. A chunk whose gradients are wanted takes three matmuls.
    """
    values = unpack(tensors, numbers, layout)
    scale, softcap = values.pop("logit_scale"), values.pop("softcap")
    group = None
    if "group" in values:
        from torch.distributed.distributed_c10d import _resolve_process_group  # which a build without them lacks

        group = values["group"] = _resolve_process_group(values["group"])
    keep = values["mask"]
    family, tokens = FAMILIES[function], hidden.shape[0]
    results = _empty_results(function, hidden, layout, _logits_dtype(hidden, weight, dtype))
    student, shared = Side(hidden, weight, bias), other_hidden is not None and other_weight is None
    if shared and dtype is None and other_hidden.dtype != hidden.dtype:  # matmuls of its own
        other_weight, other_bias, shared = weight, bias, False
    with torch.autocast(hidden.device.type, enabled=False), _autograd_on(), torch.no_grad(), _saved_as_they_are():
        head = _Head(student, scale, softcap, dtype)
        gradients = _Gradients(student, head, wants)
        chunk_size = chunk_size or _chunk_size(tokens, weight, group is not None)
        size = (min(chunk_size, tokens) * (2 if shared else 1), weight.shape[0])
        buffer = torch.empty(size, dtype=head.logits_dtype, device=hidden.device)
        other_head, other_buffer = head, buffer
        if other_weight is not None:
            other_head = _Head(Side(other_hidden, other_weight, other_bias), scale, softcap, dtype)
            other_buffer = torch.empty(size, dtype=other_head.logits_dtype, device=hidden.device)
        for start in range(0, tokens, chunk_size):
            piece = slice(start, min(start + chunk_size, tokens))
            count = piece.stop - start
            # A masked token's hidden states may hold NaN, which 0 times would remain.
            inputs = head.cast(hidden[piece]).masked_fill(~keep[piece].unsqueeze(-1), 0)
            logits, other_logits = buffer[:count], None
            if shared:
                both = torch.cat((inputs, head.cast(other_hidden[piece])))
                head.write_logits(both, buffer[: 2 * count])
                other_logits = buffer[count : 2 * count]
            else:
                head.write_logits(inputs, logits)
                if other_hidden is not None:
                    other_logits = other_buffer[:count]
                    other_head.write_logits(other_head.cast(other_hidden[piece]), other_logits)
            wanted = [None if each is None else each[piece] for each in upstream] if any(wants) else []
            leaf = logits.detach().requires_grad_(any(wants))
            mine = {name: value[piece] if isinstance(value, Tensor) else value for name, value in values.items()}
            with torch.set_grad_enabled(any(wants)):
                found = family.run(leaf, other_logits, mine, any(wants) and not softcap)
            for result, part in zip(results, found, strict=True):
                result[piece] = part.detach()
            if any(wants):
                flows = [result.flows for result in family.results]
                pairs = [(part, on) for part, on, flow in zip(found, wanted, flows, strict=True)
                         if flow and on is not None]  # fmt: skip
                outputs, on_outputs = zip(*((part, on.to(part.dtype)) for part, on in pairs), strict=True)
                (grad,) = torch.autograd.grad(outputs, leaf, on_outputs)
                gradients.add(grad, logits, inputs, piece)
                del grad  # or the next chunk's would be made beside it
        if group is not None and gradients.hidden is not None:
            dist.all_reduce(gradients.hidden, group=group)
    return [*results, *gradients.all(hidden)]


@torch.library.register_fake("sdkernels::linear_sweep")
def _(function, hidden, weight, bias, other_hidden, other_weight, other_bias, tensors, numbers, layout, upstream, wants,
      chunk_size, dtype):  # fmt: skip
    sums = _logits_dtype(hidden, weight, dtype)
    return [
        *_empty_results(function, hidden, layout, sums),
        torch.empty_like(hidden, dtype=sums) if wants[0] else hidden.new_empty(0),
        torch.empty_like(weight, dtype=sums) if wants[1] else hidden.new_empty(0),
        torch.empty_like(bias, dtype=sums) if wants[2] else hidden.new_empty(0),
    ]


def _swept_gradients(ctx, inputs: Sequence[Tensor], upstream: Sequence[Tensor | None]) -> list[Tensor]:
    """Gradients of hidden states, weight and bias from those of the results: all chunks once more."""
    *sides, numbers = inputs[:7]
    found = torch.ops.sdkernels.linear_sweep(
        ctx.function, *sides, list(inputs[7:]), numbers, ctx.layout,
        [None if x is None else x.contiguous() for x in upstream], ctx.wants, ctx.chunk_size, ctx.dtype,
    )  # fmt: skip
    return found[-3:]


def _for_inputs(ctx, gradients: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Gradients for what the two functions below take, in its dtypes."""
    wanted = [x.to(dtype) if want else None for x, dtype, want in zip(gradients, ctx.dtypes, ctx.wants, strict=True)]
    return (*(None,) * 5, *wanted, *(None,) * (len(ctx.needs_input_grad) - 8))


def _remember(ctx, function, layout, chunk_size, dtype, sides) -> None:
    """What backward needs besides tensors."""
    ctx.function, ctx.layout, ctx.chunk_size, ctx.dtype = function, layout, chunk_size, dtype
    ctx.wants = [ctx.needs_input_grad[i] for i in (5, 6, 7)]
    ctx.dtypes = [None if x is None else x.dtype for x in sides]
    ctx.set_materialize_grads(False)


class _Total(torch.autograd.Function):
    """The sum of factor * loss, and the results as constants. Forward forms the gradients, backward scales them."""

    @staticmethod
    def forward(ctx, function, layout, chunk_size, dtype, factor, hidden, weight, bias, *others):
        _remember(ctx, function, layout, chunk_size, dtype, (hidden, weight, bias))
        results = FAMILIES[function].results
        upstream = [factor if not i else None for i in range(len(results))]
        *found, on_hidden, on_weight, on_bias = torch.ops.sdkernels.linear_sweep(
            function, hidden, weight, bias, *others[:3], list(others[4:]), others[3], layout, upstream, ctx.wants,
            chunk_size, dtype,
        )  # fmt: skip
        ctx.save_for_backward(hidden, weight, bias, *others, factor)
        ctx.formed = (on_hidden, on_weight, on_bias)
        ctx.mark_non_differentiable(*found)
        return (found[0].double() * factor).sum(), *found

    @staticmethod
    @first_order
    def backward(ctx, saved, on_total, *_):
        if on_total is None:
            return (None,) * len(ctx.needs_input_grad)
        formed, ctx.formed = ctx.formed, None  # handed out: another backward forms them again
        if formed is not None:
            return _for_inputs(ctx, [x.mul_(on_total) for x in formed])
        *inputs, factor = saved()
        upstream = [factor * on_total if not i else None for i in range(len(FAMILIES[ctx.function].results))]
        return _for_inputs(ctx, _swept_gradients(ctx, inputs, upstream))


class _Results(torch.autograd.Function):
    """The results, computed here unless they are known. Backward makes the logits once more."""

    @staticmethod
    def forward(ctx, function, layout, chunk_size, dtype, known, hidden, weight, bias, *others):
        _remember(ctx, function, layout, chunk_size, dtype, (hidden, weight, bias))
        results = FAMILIES[function].results
        found = [x.clone() for x in known] if known else torch.ops.sdkernels.linear_sweep(
            function, hidden, weight, bias, *others[:3], list(others[4:]), others[3], layout, [None] * len(results),
            [False] * 3, chunk_size, dtype,
        )[:-3]  # fmt: skip
        ctx.save_for_backward(hidden, weight, bias, *others)
        ctx.mark_non_differentiable(*(x for x, result in zip(found, results, strict=True) if not result.flows))
        return tuple(found)

    @staticmethod
    @first_order
    def backward(ctx, saved, *upstream):
        if all(x is None for x in upstream):
            return (None,) * len(ctx.needs_input_grad)
        return _for_inputs(ctx, _swept_gradients(ctx, saved(), upstream))


def fused(
    function: str, student: Side, other: Other, factor: Tensor | None, values: Values, chunk_size: int | None
) -> tuple[Tensor | None, list[Tensor]]:
    """Results (N,) of a function on the logits of `student`, and the sum of factor * loss where a factor is given.

    `values` has the function's options by name, tensors (N, ...) and `logit_scale` and `softcap` (0: none) among them.
    """
    if not torch.is_grad_enabled():  # which `needs_input_grad` does not say
        student = Side(*(None if x is None else x.detach() for x in student))
    device = student.hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if torch.float64 in (student.hidden.dtype, student.weight.dtype):
        dtype = None  # autocast leaves float64 alone
    tensors, numbers, layout = pack(values)
    options = (function, layout, chunk_size, dtype)
    inputs = (*student, *other, numbers, *tensors)
    if factor is None:
        return None, list(_Results.apply(*options, (), *inputs))
    total, *results = _Total.apply(*options, factor, *inputs)
    return total, list(_Results.apply(*options, tuple(results), *inputs))
