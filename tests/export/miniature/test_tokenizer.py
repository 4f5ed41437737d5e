"""Claims about the tokenizer: CLIP's own files and habits, with merges learned from the words of prompts."""

from __future__ import annotations

import math

from export.checkpoint import Checkpoint
from export.miniature.tokenizer import END, byte_symbols, vocabulary_and_merges


def test_the_tokenizer_is_clips(checkpoints: dict[str, Checkpoint]) -> None:
    first, second = (checkpoints["default"].load_tokenizer(name) for name in ("tokenizer", "tokenizer_2"))
    vocabulary, _ = vocabulary_and_merges()
    assert vocabulary["!"] == 0 and vocabulary[END] == len(vocabulary) - 1  # pooling takes the highest id of a row
    assert len(set(byte_symbols())) == 256
    assert len(first("Two friends hiking, golden hour").input_ids) == 2 + 6  # a token for a common word
    padded = [t("a cat", padding="max_length").input_ids for t in (first, second)]
    assert len(padded[0]) == len(padded[1]) == 77
    assert padded[0][4:] == [vocabulary[END]] * 73 and padded[1][4:] == [0] * 73
    assert padded[0][3] == padded[1][3] == vocabulary[END]
    for prompt in ("naïve café 日本 🙂", "x" * 300, ""):
        ids = first(prompt, truncation=False).input_ids
        assert ids[0] == vocabulary["<|startoftext|>"] and ids[-1] == vocabulary[END]
        assert vocabulary[END] not in ids[1:-1]  # a byte-level tokenizer knows every text
    assert len(first("x" * 300, truncation=True).input_ids) == 77
    assert first("CAT").input_ids == first("cat").input_ids


def test_the_merges_are_plain_byte_pair_encoding() -> None:
    """Merging by rank with the written files gives the tokens that the words were trained to."""
    vocabulary, merges = vocabulary_and_merges()
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    assert len(ranks) == len(merges) and all(a + b in vocabulary and a in vocabulary for a, b in merges)
    pieces = [*"perso", "n</w>"]
    while True:
        pairs = list(zip(pieces, pieces[1:], strict=False))
        rank, i = min(((ranks.get(pair, math.inf), i) for i, pair in enumerate(pairs)), default=(math.inf, 0))
        if rank == math.inf:
            break
        pieces[i : i + 2] = ["".join(pairs[i])]
    assert pieces == ["person</w>"]
