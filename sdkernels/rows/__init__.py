"""Row operations: everything that reads or writes logits. A file holds a kernel, its launch and its operator.

But for what they share: ``device`` and ``threshold`` are device math, ``layout`` is how rows lie in memory, ``inplace``
makes the operators of a gradient, and ``implementations`` says which implementation serves a row.
"""
