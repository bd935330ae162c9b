"""Does MoRA store more than LoRA at equal parameters? Random pairs to be memorised."""
