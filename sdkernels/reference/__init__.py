"""The specification in code: every function in plain PyTorch on dense logits, same signatures, float64 included."""
