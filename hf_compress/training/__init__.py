"""What loop: quantization-aware training, pruning and distillation inside the Hugging Face `Trainer`."""
