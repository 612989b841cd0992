"""What the tests of operators share: a small problem, and opcheck without tracing the same graph twice."""

import nasty
import torch

B, T, V = 2, 3, 21
UNTRACED = ("test_schema", "test_autograd_registration", "test_faketensor")
_traced = set()


def opcheck(operator, arguments):
    """opcheck; its tracing, 99% of its time, once a process for an operator with and without a gradient."""
    kind = (operator, any(isinstance(x, torch.Tensor) and x.requires_grad for x in arguments))
    more = {"test_utils": UNTRACED} if kind in _traced else {}
    torch.library.opcheck(operator.default, arguments, **more)
    _traced.add(kind)


def problem(dtype=torch.float32, device="cpu"):
    """Student, teacher, ids of which one is -100, a mask and advantages of a sequence."""
    student, teacher = (torch.randn(B, T, V, dtype=dtype, device=device) * 2 for _ in range(2))
    token_ids = nasty.ids(B * T, V, device).reshape(B, T)
    token_ids[0, 1] = -100
    mask = torch.ones(B, T, dtype=torch.bool, device=device)
    mask[1, 0] = False
    return student, teacher, token_ids, mask, torch.tensor([1.0, -2.0], dtype=dtype, device=device)
