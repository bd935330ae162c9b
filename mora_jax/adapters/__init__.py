"""LoRA and MoRA as pure functions, as Flax NNX layers, and as something to attach to a model."""
