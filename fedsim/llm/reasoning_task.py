"""Problems as a task: the loss of a solution's tokens given its question, each problem counting alike however long its solution."""

# N examples, B of a batch, L tokens

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsim.llm.causal_lm import IGNORED, LanguageTask, Run, runs_of_tokens, trailing
from fedsim.llm.decoder import Decoder, Folder, check_length
from fedsim.llm.reasoning import Problems
from fedsim.llm.tokens import Bytes, Tokenizer
from fedsim.randomness import rng_for
from fedsim.tasks.base import Batch, Dataset, Splits, check_share

Ints = NDArray[np.int64]


class ProblemSource(Protocol):
    """Anything that problems can be read from."""

    def read(self) -> Problems: ...


@dataclass(frozen=True, kw_only=True)
class Reasoning(LanguageTask):
    """``problems`` to solve: the model reads question and ``separator`` and is asked for the tokens of the solution and an end.

    ``model`` as in :class:`fedsim.llm.CausalLM`; ``length`` bounds question and solution together. ``test_share`` of the problems is held
    out. Key: "domain", the style of the solution. Raises ``ValueError`` naming a problem that does not fit, or whose question holds the
    separator: the first one in a text ends its question.
    """

    problems: ProblemSource
    model: Decoder | Folder | str = field(default_factory=Decoder)
    tokenizer: Tokenizer = field(default_factory=Bytes)
    length: int = 128
    separator: str = "?"
    test_share: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_share("test_share", self.test_share)
        if self.length < 2:
            raise ValueError(f"length must be at least 2, got {self.length!r}")
        check_length(self.model, self.length)
        if not self.separator:
            raise ValueError("separator must be text that stands between question and solution, got ''")
        if not hasattr(self.problems, "read"):
            raise ValueError(f"problems must be a source such as GSM8K(path) or Problems(questions, solutions), got {self.problems!r}")

    @property
    def domain_names(self) -> tuple[str, ...]:
        return self.problems.read().styles

    def load(self) -> Splits:
        problems = self.problems.read()
        held = np.zeros(len(problems), np.bool_)
        held[rng_for(self.seed, "problems", "split").permutation(len(problems))[: round(self.test_share * len(problems))]] = True
        if held.all() or not held.any():
            raise ValueError(f"test_share={self.test_share} of {len(problems)} problems leaves none on one side; give more problems")
        return Splits(self._dataset(problems, np.flatnonzero(~held)), self._dataset(problems, np.flatnonzero(held)))

    def prompt(self, question: str) -> Ints:
        """Tokens (n,) of ``question``, opened where the tokenizer opens texts, and the separator."""
        return np.concatenate([self.tokenizer.opening, self.tokenizer.encode(question), self.tokenizer.encode(self.separator)])

    def batch(self, questions: Sequence[str], solutions: Sequence[str]) -> Batch:
        """Problems of the user's own as one batch."""
        problems = Problems(tuple(questions), tuple(solutions))
        return self._dataset(problems, np.arange(len(problems))).batch(np.arange(len(problems)))

    def self_targets(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """The model's own next tokens (B, L) after each question; ignored within it and after padding."""
        separator = torch.from_numpy(self.tokenizer.encode(self.separator)).to(inputs.device)
        found = (inputs.unfold(1, len(separator), 1) == separator).all(-1)
        if not bool(found.any(1).all()):
            raise ValueError(f"row {int(torch.nonzero(~found.any(1))[0, 0])} of the inputs holds no separator {self.separator!r}")
        begins = found.int().argmax(1) + len(separator) - 1
        asked = torch.arange(inputs.shape[1], device=inputs.device) >= begins[:, None]
        asked &= ~trailing(inputs, self.tokenizer.pad)
        return torch.where(asked, self.logits(model, inputs).argmax(-1), IGNORED)

    def _dataset(self, problems: Problems, chosen: Ints) -> Dataset:
        rows, asked_from = [], []
        separator = self.tokenizer.encode(self.separator)
        for i in chosen.tolist():
            prompt = self.prompt(problems.questions[i])
            if _first(prompt, separator) != len(prompt) - len(separator):
                raise ValueError(
                    f"the question of problem {i} holds the separator {self.separator!r}, so nobody could tell where it ends;"
                    f" give separator= a text that no question holds, such as '\\nAnswer:'"
                )
            tokens = np.concatenate([prompt, self.tokenizer.encode(problems.solutions[i]), [self.tokenizer.end]])
            if len(tokens) > self.length + 1:
                raise ValueError(f"problem {i} has {len(tokens)} tokens, length={self.length} takes {self.length + 1}; raise length")
            rows.append(Run(tokens, problems.style[i] if problems.style else 0, 0, i))
            asked_from.append(len(prompt))
        return runs_of_tokens(rows, self.length, self.tokenizer, documents=False, asked_from=asked_from)


def _first(tokens: Ints, part: Ints) -> int:
    """Where ``part`` begins first; it is there."""
    windows = np.lib.stride_tricks.sliding_window_view(tokens, len(part))
    return int((windows == part).all(axis=1).argmax())
