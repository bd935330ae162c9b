"""Causal attention inside segments: in plain XLA, around a ring of devices, and by kernels of TPUs and GPUs."""
