"""Text → token ids, as CLIP's tokenizers give them (no torch, no transformers) → embeddings."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backends import Backend
from ..errors import RealisIDWarning, RequestError
from ..manifest import Tokenizer
from ..persons.recent import RecentCache

BEGINNING = 10_000  # characters that are encoded first
SHOWN = 1000  # characters of the cut text that a warning repeats
TokenIds = tuple[tuple[int, ...], ...]  # one tuple of ids per text encoder


class Prompts:
    """The tokenizers of an engine, one per text encoder."""

    def __init__(self, folder: Path, tokenizers: Mapping[str, Tokenizer]) -> None:
        from tokenizers import Tokenizer as Bpe  # when an engine is loaded: it would slow down every import

        self._tokenizers: dict[str, Bpe] = {}
        for name, spec in tokenizers.items():
            bpe = Bpe.from_file(str(folder / spec.file))
            bpe.enable_truncation(spec.max_length)
            bpe.enable_padding(pad_id=spec.pad_id, length=spec.max_length)
            self._tokenizers[name] = bpe

    def encode(self, prompt: str, name: str = "prompt") -> TokenIds:
        """The ids of every text encoder, padded; longer prompts are cut as CLIP does, with a warning.

        Raises RequestError if it is not text.
        """
        if not isinstance(prompt, str):
            raise RequestError(f"{name} is {type(prompt).__name__}, expected one string. Make a Request per prompt.")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"{name} contains an unpaired surrogate, which is not valid text ({error.reason}). Give valid text."
            ) from None
        ids: list[tuple[int, ...]] = []
        for encoder, bpe in self._tokenizers.items():
            encoding = _encode_beginning(bpe, prompt)
            if encoding.overflowing and not ids:
                # special tokens span no text
                first = min(start for start, end in encoding.overflowing[0].offsets if end > start)
                rest = prompt[first:].strip()
                shown = repr(rest) if len(rest) <= SHOWN else f"{rest[:SHOWN]!r}… ({len(rest)} characters)"
                warnings.warn(
                    f"{name} has more than the {len(encoding.ids)} tokens that {encoder} reads; this was cut off: "
                    f"{shown}",
                    RealisIDWarning,
                    stacklevel=3,
                )
            ids.append(tuple(encoding.ids))
        return tuple(ids)


def _encode_beginning(bpe: Any, text: str) -> Any:
    """The encoding of a text. Only as much is read as the encoder has tokens for: 2 MB would take seconds.

    Tokens do not span white space, so a beginning that ends there has the same tokens as in the whole text. A word
    longer than BEGINNING is cut: only its last tokens change, and those are beyond the 77.
    """
    for length in (BEGINNING, 8 * BEGINNING, 64 * BEGINNING):
        if len(text) <= length:
            break
        space = next((i for i in range(length, length - BEGINNING // 2, -1) if text[i].isspace()), length)
        encoding = bpe.encode(text[:space])
        if encoding.overflowing:
            return encoding
    return bpe.encode(text)


@dataclass(frozen=True, eq=False)
class TextEmbedding:
    """One text as the UNet reads it: prompt_embeds (T, D) float32, pooled (P,) float32."""

    prompt_embeds: NDArray[np.float32]
    pooled: NDArray[np.float32]

    @classmethod
    def zeros(cls, length: int, dim: int, pooled_dim: int) -> TextEmbedding:
        """The none row's text when no negative prompt is given (`force_zeros_for_empty_prompt`)."""
        return cls(np.zeros((length, dim), np.float32), np.zeros(pooled_dim, np.float32))


class TextEncoders:
    """Token ids → embeddings, remembered by token ids."""

    def __init__(self, backend: Backend, names: tuple[str, ...], pooled_dim: int) -> None:
        self._backend, self._names, self._pooled_dim = backend, names, pooled_dim
        self._known: RecentCache[TextEmbedding] = RecentCache()

    def embed(self, ids: TokenIds) -> TextEmbedding:
        """The hidden states of every encoder side by side; the pooled embedding of the last one."""
        return self._known.get(ids, lambda: self._encode(ids))

    def _encode(self, ids: TokenIds) -> TextEmbedding:
        hidden_states, pooled = [], np.zeros(0, np.float32)
        for name, row in zip(self._names, ids, strict=True):
            outputs = self._backend.run(name, {"input_ids": self._backend.put(np.array([row], np.int64))})
            hidden_states.append(self._backend.get(outputs["hidden_states"])[0])
            if self._pooled_dim:  # the last encoder's stays
                pooled = self._backend.get(outputs["pooled"])[0]
        return TextEmbedding(np.concatenate(hidden_states, axis=-1), pooled)
