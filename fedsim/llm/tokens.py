"""Text to whole numbers and back: bytes, an alphabet, or a tokenizer of Hugging Face.

Exports: Bytes, Characters, Pretrained, Tokenizer.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ints = NDArray[np.int64]


class Tokenizer(Protocol):
    """``vocabulary`` tokens, of which ``end`` closes a text and ``pad`` fills up; both are left out when decoding."""

    @property
    def vocabulary(self) -> int: ...

    @property
    def end(self) -> int: ...

    @property
    def pad(self) -> int: ...

    @property
    def opening(self) -> Ints:
        """Tokens (n,), none or one, that stand before every document and every question."""
        ...

    def encode(self, text: str) -> Ints:
        """Tokens (n,) of ``text``, without opening and end."""
        ...

    def decode(self, tokens: ArrayLike) -> str:
        """The text of ``tokens`` (n,)."""
        ...


@dataclass(frozen=True)
class Bytes:
    """The 256 bytes of UTF-8, an end and a padding.

    >>> Bytes().decode(Bytes().encode("naïve"))
    'naïve'
    """

    vocabulary = 258
    end = 256
    pad = 257

    @property
    def opening(self) -> Ints:
        return np.empty(0, np.int64)

    def encode(self, text: str) -> Ints:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int64)

    def decode(self, tokens: ArrayLike) -> str:
        tokens = np.asarray(tokens)
        return tokens[tokens < 256].astype(np.uint8).tobytes().decode(errors="replace")


@dataclass(frozen=True)
class Characters:
    """One token for each character of ``alphabet``, in its order, then an end and a padding.

    ``unknown`` stands in for every other character; without it one raises ``ValueError``.

    >>> Characters("abc").encode("cab").tolist()
    [2, 0, 1]
    """

    alphabet: str
    unknown: str | None = None

    def __post_init__(self) -> None:
        if not self.alphabet or len(set(self.alphabet)) < len(self.alphabet):
            raise ValueError(f"alphabet must hold characters, none twice, got {self.alphabet!r}")
        if self.unknown is not None and (len(self.unknown) != 1 or self.unknown not in self.alphabet):
            raise ValueError(f"unknown must be one character of the alphabet, got {self.unknown!r}")

    @property
    def vocabulary(self) -> int:
        return len(self.alphabet) + 2

    @property
    def end(self) -> int:
        return len(self.alphabet)

    @property
    def pad(self) -> int:
        return len(self.alphabet) + 1

    @property
    def opening(self) -> Ints:
        return np.empty(0, np.int64)

    @cached_property
    def _places(self) -> dict[str, int]:
        return {character: i for i, character in enumerate(self.alphabet)}

    def encode(self, text: str) -> Ints:
        other = -1 if self.unknown is None else self._places[self.unknown]
        tokens = np.array([self._places.get(character, other) for character in text], np.int64)
        if len(tokens) and tokens.min() < 0:
            raise ValueError(f"character {text[int(np.argmin(tokens))]!r} is not in the alphabet {self.alphabet!r}; add it, or set unknown")
        return tokens

    def decode(self, tokens: ArrayLike) -> str:
        return "".join(self.alphabet[t] for t in np.asarray(tokens).tolist() if t < len(self.alphabet))


@dataclass(frozen=True)
class Pretrained:
    """The tokenizer in the local folder ``path``; where it knows no padding, its end pads.

    No special token is added to a text. ``start`` puts the tokenizer's beginning of text before every document and question: set it
    for models that were trained so, such as Llama's. Raises ``ValueError`` for a folder without a tokenizer, or one without what is asked for.
    """

    path: str
    start: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", str(self.path))
        if not Path(self.path).is_dir():
            raise ValueError(f"path must be a local folder with a tokenizer, got {self.path!r}")

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(self.path, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.path} holds no tokenizer that can be read: {error}") from error
        if tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer in {self.path} has no end of text; set its eos_token")
        if self.start and tokenizer.bos_token_id is None:
            raise ValueError(f"the tokenizer in {self.path} has no beginning of text; set its bos_token, or start=False")
        return tokenizer

    @property
    def vocabulary(self) -> int:
        return len(self._tokenizer)

    @property
    def end(self) -> int:
        return int(self._tokenizer.eos_token_id)

    @property
    def pad(self) -> int:
        found = self._tokenizer.pad_token_id
        return self.end if found is None else int(found)

    @property
    def opening(self) -> Ints:
        return np.array([self._tokenizer.bos_token_id] if self.start else [], np.int64)

    def encode(self, text: str) -> Ints:
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False), np.int64)

    def decode(self, tokens: ArrayLike) -> str:
        return str(self._tokenizer.decode(np.asarray(tokens).tolist(), skip_special_tokens=True))
