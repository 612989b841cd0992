"""The specification in code: every function in plain PyTorch on dense logits, any dtype, float64 included.

Nothing is checked or fused here, and options of where things are, `inplace`, `group` and `vocab_start`, are left out.
Autograd does the differentiating, but of OPSD's entries, where it would make NaN of 0 times infinity. ``rows`` and
``divergences`` are row operations, gradients among them: what the operators run for float64, on a CPU for which csrc
was not built, and for lists that no Triton kernel serves.
"""
