"""Sums with their working written out: a reasoning task whose every solution is known, in two styles.

The long style keeps running sums (``7+5=12;12+8=20;20+3=23#23``), the terse one only names them (``12,20,23#23``). Words before
the question carry no information, so calibrating on prompts alone looks at the wrong thing.
"""

from dataclasses import dataclass

from fedsim.llm.reasoning import Problems
from fedsim.llm.tokens import Characters
from fedsim.randomness import rng_for

STYLES = ("long", "terse")
_WORDS = (
    *("river", "stone", "light", "cloud", "table", "green", "music", "paper", "horse", "bread", "clock", "water"),
    *("house", "night", "plant", "story", "glass", "field", "voice", "metal", "ocean", "dream", "chair", "smoke"),
)


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """``number`` sums of ``terms`` digits after ``words`` words, a share ``terse`` of them solved tersely: a function of ``seed``."""

    number: int = 4000
    terms: int = 4
    words: int = 5
    terse: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("number", 1), ("terms", 2), ("words", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)!r}")
        if not 0 <= self.terse <= 1:
            raise ValueError(f"terse must be a share in [0, 1], got {self.terse!r}")

    def read(self) -> Problems:
        rng = rng_for(self.seed, "arithmetic")
        digits = rng.integers(1, 10, (self.number, self.terms)).tolist()
        words = rng.integers(0, len(_WORDS), (self.number, self.words)).tolist()
        style = (rng.random(self.number) < self.terse).astype(int).tolist()
        questions = (" ".join([*(_WORDS[w] for w in some), "+".join(map(str, sum_of))]) for some, sum_of in zip(words, digits, strict=True))
        solutions = (solution(sum_of, STYLES[s]) for sum_of, s in zip(digits, style, strict=True))
        return Problems(tuple(questions), tuple(solutions), tuple(style), STYLES)


def solution(digits: list[int], style: str) -> str:
    """The working and the answer of a sum.

    >>> solution([7, 5, 8], "long"), solution([7, 5, 8], "terse")
    ('7+5=12;12+8=20#20', '12,20#20')
    """
    total, steps = digits[0], []
    for digit in digits[1:]:
        steps.append(f"{total}+{digit}={total + digit}" if style == "long" else f"{total + digit}")
        total += digit
    return (";" if style == "long" else ",").join(steps) + f"#{total}"


def characters() -> Characters:
    """The alphabet of these problems, their question mark included."""
    return Characters("".join(sorted(set("0123456789+=;,#? ") | set("".join(_WORDS)))))
