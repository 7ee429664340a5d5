"""Problems that are solved by writing: their readers, what counts as an answer, and how often a model gets it right.

Answers are parsed strictly (the form the data set states) and leniently (the last number or option). A trace that never ended is wrong
and counted as unfinished; one without an answer is wrong and counted as unparsed. GSM8K: Cobbe et al. (2021), arXiv:2110.14168;
MathQA: Amini et al. (2019), arXiv:1905.13319.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np

from fedsim.llm.generation import Trace
from fedsim.llm.text import json_lines, read_text
from fedsim.llm.tokens import Tokenizer

Answer = Decimal | str
_NUMBER = r"(?<!\d)-?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|(?<!\w)\.\d+)"  # no sign after a digit: 5-6 is a range
_STATED = r"\(\s*([a-e])\s*\)|([a-e])(?:\)|(?=\s*(?:[.,;:!?\n]|$)))"  # bare letters end their clause: "a" is also an article
_THOUGHT = "</think>"


@dataclass(frozen=True)
class Problems:
    """Questions, solutions written out, and the style of each (a number into ``styles``). A source too: what it reads is itself."""

    questions: tuple[str, ...]
    solutions: tuple[str, ...]
    style: tuple[int, ...] = ()
    styles: tuple[str, ...] = ("",)

    def __post_init__(self) -> None:
        for name in ("questions", "solutions", "style", "styles"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.questions or len(self.questions) != len(self.solutions):
            raise ValueError(f"there must be a solution for each question, got {len(self.questions)} and {len(self.solutions)}")
        if self.style and (len(self.style) != len(self.questions) or not 0 <= min(self.style) <= max(self.style) < len(self.styles)):
            raise ValueError(f"style must hold a number below {len(self.styles)} for each of {len(self.questions)} questions")

    def __len__(self) -> int:
        return len(self.questions)

    def __repr__(self) -> str:
        return f"Problems({len(self)} in {len(self.styles)} styles)"

    def read(self) -> "Problems":
        return self


@dataclass(frozen=True)
class GSM8K:
    """The JSON lines of GSM8K: ``question``, and ``answer`` that ends in ``#### number``."""

    path: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", str(self.path))

    def read(self) -> Problems:
        rows = json_lines(self.path)
        questions, solutions = _column(rows, "question", self.path), _column(rows, "answer", self.path)
        for number, solution in enumerate(solutions):
            if gsm8k_answer(solution) is None:
                raise ValueError(f"the answer of problem {number} of {self.path} does not end in '#### number'")
        return Problems(tuple(questions), tuple(solutions))


@dataclass(frozen=True)
class MathQA:
    """The JSON list of MathQA: ``Problem``, ``options``, ``Rationale`` and ``correct``, a letter."""

    path: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", str(self.path))

    def read(self) -> Problems:
        try:
            rows = json.loads(read_text(self.path))
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.path} is no JSON: {error}") from error
        problems, options, reasons, right = (_column(rows, n, self.path) for n in ("Problem", "options", "Rationale", "correct"))
        for number, (offered, letter) in enumerate(zip(options, right, strict=True)):
            if letter.lower() not in mathqa_options(offered):
                raise ValueError(f"problem {number} of {self.path} offers no option {letter!r}: {offered!r}")
        questions = (f"{problem}\n{offered}" for problem, offered in zip(problems, options, strict=True))
        solutions = (f"{reason}\nThe answer is ({letter.lower()})." for reason, letter in zip(reasons, right, strict=True))
        return Problems(tuple(questions), tuple(solutions))


def gsm8k_answer(text: str) -> Decimal | None:
    """The number of the last ``#### number`` of ``text``.

    >>> gsm8k_answer("so 3 * 6 = 18 eggs\\n#### 1,800.0") == 1800
    True
    """
    found = re.findall(rf"#### *({_NUMBER})", text)
    return _number(found[-1]) if found else None


def last_number(text: str) -> Decimal | None:
    """The last number of ``text``, after the closing think tag where there is one; a hyphen after a digit is no sign.

    >>> last_number("It costs $5. Or 1,000?")
    Decimal('1000')
    >>> last_number("for ages 5-6"), last_number("1,2,3"), last_number("about .5")
    (Decimal('6'), Decimal('3'), Decimal('0.5'))
    """
    found = re.findall(_NUMBER, text.rpartition(_THOUGHT)[2])
    return _number(found[-1]) if found else None


def hash_answer(text: str) -> Decimal | None:
    """The number after the last ``#`` of ``text``, as in :class:`fedsim.llm.arithmetic.Arithmetic`."""
    found = re.findall(rf"#({_NUMBER})", text)
    return _number(found[-1]) if found else None


def mathqa_options(offered: str) -> dict[str, str]:
    """Options by letter.

    >>> mathqa_options("a ) 38 , b ) 27.675 , c ) none of these")
    {'a': '38', 'b': '27.675', 'c': 'none of these'}
    """
    parts = re.split(r"(?:^|,)\s*([a-e])\s*\)", offered.strip())
    return {letter: value.strip().rstrip(",").strip() for letter, value in zip(parts[1::2], parts[2::2], strict=True)}


def choice(text: str) -> str | None:
    """The last ``answer is (x)`` of ``text``, in lower case; without parentheses, where the letter ends its clause.

    >>> choice("The answer is a bit hard to see, but the answer is C.")
    'c'
    """
    return _last_letter(rf"answer\s+is\s*:?\s*(?:{_STATED})", text.rpartition(_THOUGHT)[2])


def lenient_choice(text: str, options: Mapping[str, str] | None = None) -> str | None:
    """:func:`choice`, else the last single letter of an option (no article "a"), else the one option equal to the last number of ``text``."""
    text = text.rpartition(_THOUGHT)[2]
    if (stated := choice(text)) is not None:
        return stated
    if (letter := _last_letter(rf"(?<![\w'])(?:{_STATED}|([b-e])(?![\w']))", text)) is not None:
        return letter
    number = last_number(text)
    equal = [letter for letter, value in (options or {}).items() if number is not None and last_number(value) == number]
    return equal[0] if len(equal) == 1 else None


@dataclass(frozen=True)
class Score:
    """Shares of ``number`` problems solved (strictly and leniently parsed), ``unparsed`` and ``unfinished``; ``length`` is tokens a trace."""

    strict: float
    lenient: float
    unparsed: float
    unfinished: float
    length: float
    number: int


def exact_match(
    traces: Sequence[Trace],
    solutions: Sequence[str],
    tokenizer: Tokenizer,
    *,
    strict: Callable[[str], Answer | None] = gsm8k_answer,
    lenient: Callable[..., Answer | None] = last_number,
    options: Sequence[Mapping[str, str]] | None = None,
) -> Score:
    """How many ``traces`` end in the answer of their solution.

    ``options`` of each problem, where given, are the second argument of ``lenient``; for MathQA, ``strict=choice, lenient=lenient_choice``
    and the :func:`mathqa_options` of every question's last line. Raises ``ValueError`` for no traces, or for a solution without an answer.
    """
    if not traces or len(traces) != len(solutions):
        raise ValueError(f"there must be a solution for each trace, and one at least, got {len(traces)} and {len(solutions)}")
    if options is not None and len(options) != len(traces):
        raise ValueError(f"there must be options for each trace, got {len(options)} for {len(traces)}")
    right = np.zeros((2, len(traces)), np.bool_)
    unparsed = 0
    for number, (trace, solution) in enumerate(zip(traces, solutions, strict=True)):
        gold = strict(solution)
        if gold is None:
            raise ValueError(f"solution {number} has no answer: {solution!r}")
        if trace.finished:
            text = tokenizer.decode(trace.tokens)
            found = strict(text), lenient(text) if options is None else lenient(text, options[number])
            unparsed += found[1] is None
            right[:, number] = [answer == gold for answer in found]
    return Score(
        strict=float(right[0].mean()),
        lenient=float(right[1].mean()),
        unparsed=unparsed / len(traces),
        unfinished=sum(not t.finished for t in traces) / len(traces),
        length=float(np.mean([len(t.tokens) for t in traces])),
        number=len(traces),
    )


def _number(text: str) -> Decimal | None:
    try:
        return Decimal(text.replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None


def _last_letter(pattern: str, text: str) -> str | None:
    """The one letter that the groups of the last match hold, in lower case."""
    found = None
    for match in re.finditer(pattern, text, re.IGNORECASE):
        found = "".join(group for group in match.groups() if group).lower()
    return found


def _column(rows: Sequence[Any], name: str, path: str) -> list[str]:
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get(name), str):
            raise ValueError(f"problem {number} of {path} has no text {name!r}, got {row if not isinstance(row, dict) else sorted(row)}")
    return [row[name] for row in rows]
