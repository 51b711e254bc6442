"""The text that a language model is calibrated on when none is given: Python's own documentation."""

from __future__ import annotations

from ..core.errors import CalibrationError

NOTE = (
    "No calibration data was given: text of Python's own documentation is used (pydoc_data.topics, technical "
    "English). Text like that the model will see is better: calibration=[...]"
)


def default_texts() -> list[str]:
    """The topics of Python's `help()`: about 80 texts, half a million characters, part of every CPython.

    Their wording changes with the Python version, so the recorded hash does too.

    Raises:
        CalibrationError: This Python has none.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise CalibrationError(
            "No calibration data was given, and this Python lacks pydoc_data.topics, the default.",
            'pass calibration=["a text", "another text", ...]',
        ) from None
    return [topics[name] for name in sorted(topics)]
