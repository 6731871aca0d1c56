"""Training a byte-pair encoding: the commonest pair of neighbours becomes a token, over and over.

Text is cut into words first, which no token crosses (Sennrich et al. 2016; GPT-2's words and bytes:
Radford et al. 2019, section 2.2). A word that is there a thousand times is counted a thousand times
but looked at once, and after a merge only words that had the pair are looked at again.

No torch: the launcher runs this.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import pairwise

Pair = tuple[int, int]

LONGEST_PIECE = 64  # characters: a text without spaces would be one word, and take for ever
MOST = f"{{1,{LONGEST_PIECE}}}"

# GPT-2's words, with letters and digits as Python's re knows them
WORD = re.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d"
    rf"| ?[^\W\d_]{MOST}| ?\d{MOST}| ?(?:[^\s\w]|_){MOST}|\s{MOST}(?!\S)|\s{MOST}",
)


def alphabet() -> list[str]:
    """GPT-2's letter for each byte: itself where that can be seen, else one from 256 on."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in seen}
    for byte in range(256):
        letters.setdefault(byte, chr(256 + len(letters) - len(seen)))
    return [letters[byte] for byte in range(256)]


def train_bpe(lines: Iterable[str], vocab_size: int) -> tuple[list[str], list[tuple[str, str]]]:
    """The tokens, by id, and the merges, in order, of an encoding of at most `vocab_size` ids.

    The first 256 ids are the bytes, in the order of their letters. Of equally common pairs the one
    with the smaller ids is merged. It ends early where no pair is left.
    """
    letters = alphabet()
    tokens = sorted(letters)
    number = {byte: tokens.index(letter) for byte, letter in enumerate(letters)}
    texts = Counter(word for line in lines for word in WORD.findall(line))
    words = [[number[byte] for byte in word.encode()] for word in texts]
    times = list(texts.values())

    counts: Counter[Pair] = Counter()
    where: dict[Pair, set[int]] = defaultdict(set)  # words that have a pair, or had it once
    for i, word in enumerate(words):
        for pair in pairwise(word):
            counts[pair] += times[i]
            where[pair].add(i)

    merges: list[tuple[str, str]] = []
    while len(tokens) < vocab_size and counts:
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        if counts[best] < 1:
            break
        new = len(tokens)
        merges.append((tokens[best[0]], tokens[best[1]]))
        tokens.append("".join(merges[-1]))
        for i in where.pop(best):
            before, words[i] = words[i], list(merged(words[i], best, new))
            for pair in pairwise(before):
                counts[pair] -= times[i]
            for pair in pairwise(words[i]):
                counts[pair] += times[i]
                where[pair].add(i)
        counts = Counter({pair: count for pair, count in counts.items() if count > 0})
    return tokens, merges


def merged(word: list[int], pair: Pair, new: int) -> Iterator[int]:
    """The word with each occurrence of the pair, from the left, as one token."""
    i = 0
    while i < len(word):
        if i + 1 < len(word) and (word[i], word[i + 1]) == pair:
            yield new
            i += 2
        else:
            yield word[i]
            i += 1
