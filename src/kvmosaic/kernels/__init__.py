"""Attention over stored bytes: one folder per kernel, the PyTorch reference beside its compiled forms."""
