"""Human-rated tweets and product reviews, split so that no near-duplicate is on both sides."""

from __future__ import annotations

import html
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from examples.reference.packages import vader_folder

Domain = Literal["tweets", "amazon"]

SPLIT_SEED = 0
HELD_OUT_PER_DOMAIN = 600
SIMILARITY = 0.6
"""Jaccard similarity of word sets from which on two texts are near-duplicates."""
NEUTRAL_BELOW = 0.5
"""Rows with a smaller absolute mean rating are left out."""

_FILES: Mapping[Domain, str] = {
    "tweets": "tweets_GroundTruth.txt",
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
}
_WORD = re.compile(r"[a-z0-9']+")


@dataclass(frozen=True)
class Row:
    """One rated text.

    Args:
        domain: Where the text comes from.
        text: The text.
        label: 1 for positive, 0 for negative.
    """

    domain: Domain
    text: str
    label: int


def rated_texts(file: Path) -> list[tuple[float, str]]:
    """Read a file of `ID<TAB>mean rating<TAB>text` lines.

    Args:
        file: The file.

    Returns:
        Mean rating (-4 to 4) and text of each line.
    """
    lines = (line for line in file.read_text(encoding="utf-8").split("\n") if line.strip())
    fields = (line.split("\t", 2) for line in lines)
    return [(float(rating), html.unescape(text).strip()) for _, rating, text in fields]


def rows() -> list[Row]:
    """All clearly positive or negative rows of both domains, in file order."""
    folder = vader_folder()
    return [
        Row(domain, text, int(rating > 0))
        for domain, name in _FILES.items()
        for rating, text in rated_texts(folder / name)
        if abs(rating) >= NEUTRAL_BELOW
    ]


def near_duplicate_groups(texts: Sequence[str], similarity: float = SIMILARITY) -> list[int]:
    """Give near-duplicate texts the same group number, transitively.

    Compares sets of lower-case words by Jaccard similarity. Candidates come from a prefix filter (Bayardo
    et al., WWW 2007, section 3): two sets that are similar enough share one of their rarest words, so the
    result is exact.

    Args:
        texts: The texts.
        similarity: Jaccard similarity from which on two texts are near-duplicates, in (0, 1].

    Returns:
        A group number per text.
    """
    sets = [_words(text) for text in texts]
    frequency = Counter(word for words in sets for word in words)
    parent = list(range(len(sets)))
    seen: defaultdict[str, list[int]] = defaultdict(list)
    for index, words in enumerate(sets):
        rarest = sorted(words, key=lambda word: (frequency[word], word))
        prefix = rarest[: len(words) - math.ceil(similarity * len(words)) + 1]
        for other in {other for word in prefix for other in seen[word]}:
            shared = len(words & sets[other])
            if shared >= similarity * (len(words) + len(sets[other]) - shared):
                parent[_root(parent, index)] = _root(parent, other)
        for word in prefix:
            seen[word].append(index)
    return [_root(parent, index) for index in range(len(sets))]


def split(
    everything: Sequence[Row], held_out_per_domain: int = HELD_OUT_PER_DOMAIN, seed: int = SPLIT_SEED
) -> tuple[list[Row], list[Row]]:
    """Split rows into training and held-out rows, a near-duplicate group staying on one side.

    Args:
        everything: The rows.
        held_out_per_domain: The most rows to hold out of each domain. Groups are drawn at random and taken
            while they fit.
        seed: Seed of the draw; the global generators are not used.

    Returns:
        Training rows and held-out rows, both in the order of `everything`.
    """
    groups = near_duplicate_groups([row.text for row in everything])
    members: defaultdict[int, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    order = list(members)
    random.Random(seed).shuffle(order)
    taken: Counter[str] = Counter()
    held: set[int] = set()
    for group in order:
        new = Counter(everything[index].domain for index in members[group])
        if all(taken[domain] + count <= held_out_per_domain for domain, count in new.items()):
            taken.update(new)
            held.update(members[group])
    return _select(everything, held, wanted=False), _select(everything, held, wanted=True)


def _select(everything: Iterable[Row], held: set[int], *, wanted: bool) -> list[Row]:
    return [row for index, row in enumerate(everything) if (index in held) is wanted]


def _words(text: str) -> frozenset[str]:
    """Words of the text, without the placeholder of user names; an emoticon alone stands for itself."""
    words = frozenset(_WORD.findall(text.lower())) - {"anonymous"}
    return words or frozenset({text})


def _root(parent: list[int], index: int) -> int:
    while parent[index] != index:
        parent[index] = parent[parent[index]]
        index = parent[index]
    return index
