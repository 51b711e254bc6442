"""Other tools for calibrated quantization, each run in an environment of its own."""
