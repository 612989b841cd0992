"""Row operations: everything that reads or writes logits. Each file holds a kernel, its launch and its operator."""
