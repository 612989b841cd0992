"""The specification in code: every function in plain PyTorch on dense logits, any dtype, float64 included.

Nothing is checked, fused or saved here, and autograd does the differentiating. ``rows`` is what the operators run for
float64, and on a CPU for which csrc was not built.
"""
