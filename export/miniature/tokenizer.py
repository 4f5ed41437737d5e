"""A small CLIP tokenizer in CLIP's own files: byte-level BPE, so every prompt has tokens."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from pathlib import Path

START, END = "<|startoftext|>", "<|endoftext|>"
# Words of ordinary prompts, from which the merges are learned. Other long words are split into pieces, as in CLIP.
WORDS = (
    "a an the of in on at with and or by for to from under over near behind is are one two three four people person "
    "man woman men women boy girl child children friend friends couple family portrait photo photograph picture image "
    "painting drawing sketch poster face head hair eyes smile smiling laughing walking running sitting standing "
    "hiking dancing reading holding wearing shirt dress suit jacket coat hat glasses scarf red blue green yellow "
    "white black brown pink purple orange golden silver dark light bright soft hour sunset sunrise morning evening "
    "night day sky sun moon star stars cloud clouds rain snow winter summer spring autumn beach sea ocean lake river "
    "mountain mountains forest tree trees flower flowers garden park field city street road house home room kitchen "
    "office studio cafe bridge castle car train boat dog cat horse bird astronaut robot king queen knight hero wizard "
    "cinematic realistic detailed sharp focus blurry background style art film camera lens bokeh high low quality "
    "resolution best worst watercolor oil digital concept illustration anime cartoon fantasy space old young happy sad "
    "beautiful ugly big small wide close up view full body left right text watermark deformed"
)


@cache
def byte_symbols() -> tuple[str, ...]:
    """One printable character per byte, printable ones first, so that "!" is id 0 as in CLIP's vocabulary.

    Source: GPT-2's byte-level BPE: bytes 33–126, 161–172 and 174–255 stand for themselves, the others for 256, 257, …
    """
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return tuple(chr(byte) for byte in plain) + tuple(chr(256 + n) for n in range(len(others)))


@cache
def vocabulary_and_merges(merges: int = 500) -> tuple[dict[str, int], tuple[tuple[str, str], ...]]:
    """Token → id, and the merges in order of rank: 256 bytes, 256 bytes that end a word, the merges, START, END.

    Plain BPE training: the commonest neighbouring pair is merged, repeatedly; ties go to the first in the alphabet, so
    the result does not depend on the order of the words.
    """
    words = [[*word[:-1], word[-1] + "</w>"] for word in sorted(set(WORDS.split()))]
    learned: list[tuple[str, str]] = []
    while len(learned) < merges:
        pairs = Counter(pair for word in words for pair in zip(word, word[1:], strict=False))
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        learned.append(best)
        for word in words:
            i = 0
            while i + 1 < len(word):
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = ["".join(best)]
                i += 1
    tokens = [*byte_symbols(), *(symbol + "</w>" for symbol in byte_symbols()), *map("".join, learned), START, END]
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}, tuple(learned)


def write_tokenizer(folder: Path, pad_token: str) -> None:
    """CLIP's four tokenizer files, as SDXL's folders hold them.

    pad_token: END for the first text encoder, "!" (id 0) for SDXL's second.
    """
    vocabulary, merges = vocabulary_and_merges()
    folder.mkdir(parents=True)
    special = {"bos_token": START, "eos_token": END, "pad_token": pad_token, "unk_token": END}
    config = {
        **special,
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": 77,
        "tokenizer_class": "CLIPTokenizer",
    }
    files = {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges), ""]),
        "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
