"""Text for calibration and perplexity that needs nothing beyond pip and the standard library."""

from __future__ import annotations

from pydoc_data.topics import topics
from typing import TYPE_CHECKING

from examples.reference.packages import vader_folder
from examples.reference.ratings import rated_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def technical_prose() -> str:
    """The Python language reference as the standard library ships it.

    Returns:
        About 465,000 characters (Python 3.11). They differ between Python versions, so compare only
        perplexities that one Python measured.
    """
    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def news_snippets() -> list[str]:
    """Sentences of newspaper editorials, in their order, repeated ones once.

    Returns:
        About 5,000 sentences.

    Raises:
        ReferenceUnavailable: The package with the texts can't be had.
    """
    sentences = (text for _, text in rated_texts(vader_folder() / "nytEditorialSnippets_GroundTruth.txt"))
    return list(dict.fromkeys(sentences))


def excerpt(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int) -> str:
    """The beginning of a text, cut where a token ends.

    Args:
        tokenizer: A fast tokenizer.
        text: The text.
        tokens: Tokens wanted, without special tokens.

    Returns:
        The text up to there, as it was.

    Raises:
        ValueError: The text is too short, or the number is not positive.
    """
    ends = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)["offset_mapping"]
    if not 1 <= tokens <= len(ends):
        message = f"{tokens} tokens were asked for, the text has {len(ends)}"
        raise ValueError(message)
    return text[: ends[tokens - 1][1]]


def token_windows(tokenizer: PreTrainedTokenizerBase, text: str, length: int, count: int) -> list[list[int]]:
    """Cut a text into consecutive windows of tokens, without special tokens.

    Args:
        tokenizer: The tokenizer.
        text: The text.
        length: Tokens per window.
        count: Number of windows.

    Returns:
        `count` lists of `length` token ids.

    Raises:
        ValueError: The text is too short, or a number is not positive.
    """
    if length < 1 or count < 1:
        message = f"length and count must be positive, got {length} and {count}"
        raise ValueError(message)
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < length * count:
        message = f"{count} windows of {length} tokens need {length * count} tokens, the text has {len(ids)}"
        raise ValueError(message)
    return [ids[start : start + length] for start in range(0, length * count, length)]
