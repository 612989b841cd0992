"""Runnable trainers for self-distillation and RL, and the small verifiable task they share."""
