"""Next-token prediction: a Hugging Face causal language model, from scratch or from a folder, on text in one or several domains.

Every example is a run of ``length`` tokens with the token that follows each; losses are in nats a token. Runs are padded at the right,
where a causal model needs no mask: what it says about a token never depends on later ones.
"""

# N examples, B of a batch, L tokens, V vocabulary

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsim.llm.decoder import Decoder, Folder, built, check_length
from fedsim.llm.text import Source
from fedsim.llm.tokens import Bytes, Tokenizer
from fedsim.pruning.structures import StructureMap
from fedsim.randomness import rng_for, torch_seeded
from fedsim.tasks.base import Batch, Dataset, Splits, Task, check_share

IGNORED = -100  # the target of a token that nobody asks for
Ints = NDArray[np.int64]


class Run(NamedTuple):
    """Tokens of one text, or of several of one author laid end to end, and its keys."""

    tokens: Ints
    domain: int
    author: int
    document: int


class LanguageTask(Task):
    """What tasks of next-token prediction share; a subclass has ``model``, ``tokenizer`` and ``length`` and loads its data."""

    model: Any
    tokenizer: Tokenizer
    length: int

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        """The size of the vocabulary."""
        return self.tokenizer.vocabulary

    @property
    def skew_key(self) -> str:
        """Clients differ in the domains they write in."""
        return "domain"

    @property
    def example(self) -> Tensor:
        """A run of tokens (1, L): shapes do not depend on which."""
        return torch.zeros((1, self.length), dtype=torch.int64)

    def build(self, seed: int) -> nn.Module:
        """The plain Hugging Face model, without a cache; ``seed`` matters where it starts from scratch."""
        from fedsim.llm.families import check_positions

        with torch_seeded(seed, "model"):
            model = built(self.model, self.tokenizer.vocabulary)
        check_positions(model, self.length, f"texts of length={self.length}")
        return model

    def logits(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Unnormalised log-probabilities (B, L, V) of the next tokens."""
        logits: Tensor = model(inputs).logits
        return logits

    def token_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross entropy of each token (B, L) in nats; 0 where none is asked for."""
        logits = self.logits(model, batch.inputs)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # in bfloat16 a loss has three digits
        return F.cross_entropy(logits.transpose(1, 2), batch.targets, ignore_index=IGNORED, reduction="none")

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean over the tokens asked for in each example (B,): a long one counts as much as a short one."""
        return self.token_losses(model, batch).sum(1) / _asked(batch)

    def correct(self, model: nn.Module, batch: Batch) -> Tensor:
        """Share (B,) of the tokens asked for that are the most probable."""
        hits = self.logits(model, batch.inputs).argmax(-1) == batch.targets
        return hits.sum(1) / _asked(batch)

    def self_targets(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """The model's own next tokens (B, L); ignored after padding."""
        return torch.where(trailing(inputs, self.tokenizer.pad), IGNORED, self.logits(model, inputs).argmax(-1))

    def structures(self, model: nn.Module, *, couple_residual: bool = False) -> StructureMap:
        """Head groups and MLP channels; the residual stream stays whole."""
        from fedsim.llm.structures import language_structures

        return language_structures(model, self.length)


@dataclass(frozen=True, kw_only=True)
class CausalLM(LanguageTask):
    """``texts``, a source or one for each named domain, cut into runs of ``length`` tokens.

    ``model`` is a :class:`Decoder` to train from scratch, or a local :class:`Folder` or its path. ``test_share`` of every domain's documents is held
    out. With ``pack`` the documents of one author are laid end to end and a rest shorter than a run is dropped, so an author of fewer tokens
    is left out; without it each begins a run of its own, padded at its end. Limits keep a random subset, a function of ``seed``. Keys: "domain", "author" (numbered over all
    domains), and without ``pack`` "document". Raises ``ValueError`` for text or fields that cannot be used, and naming a domain of which
    no run is left.
    """

    texts: Source | tuple[tuple[str, Source], ...] | Mapping[str, Source]
    model: Decoder | Folder | str = field(default_factory=Decoder)
    tokenizer: Tokenizer = field(default_factory=Bytes)
    length: int = 96
    pack: bool = True
    test_share: float = 0.1
    train_limit: int | None = None
    test_limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_share("test_share", self.test_share)
        for name, least in (("length", 2), ("train_limit", 1), ("test_limit", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value!r}")
        check_length(self.model, self.length)
        texts = self.texts
        if isinstance(texts, Mapping):
            object.__setattr__(self, "texts", tuple(texts.items()))
        elif not isinstance(texts, tuple):
            object.__setattr__(self, "texts", (("", texts),))
        for pair in self._domains:
            if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[0], str):
                raise ValueError(f"texts must be a source of text, or pairs of a name and a source, got {pair!r} in {self.texts!r}")
        if not self._domains or len({name for name, _ in self._domains}) < len(self._domains):
            raise ValueError(f"texts must name at least one domain and none twice, got {self.texts!r}")
        for name, source in self._domains:
            if not hasattr(source, "read"):
                raise ValueError(f"texts[{name!r}] must be a source of text such as TextFile(path) or Documents(texts), got {source!r}")

    @property
    def _domains(self) -> tuple[tuple[str, Source], ...]:
        assert isinstance(self.texts, tuple)
        return self.texts

    @property
    def domain_names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self._domains)

    @property
    def skew_key(self) -> str:
        """Clients differ in the domains they write in; in one domain, in its authors."""
        return "domain" if len(self._domains) > 1 else "author"

    def load(self) -> Splits:
        train: list[Run] = []
        test: list[Run] = []
        authors: dict[tuple[int, str], int] = {}
        documents = 0
        for domain, (name, source) in enumerate(self._domains):
            found = source.read()
            held = self._held_out(name, len(found))
            for number, text in enumerate(found.texts):
                key = domain, found.authors[number] if found.authors else ""
                run = Run(self._tokens(text), domain, authors.setdefault(key, len(authors)), documents + number)
                (test if held[number] else train).append(run)
            documents += len(found)
        return Splits(self._dataset(train, "train", self.train_limit), self._dataset(test, "test", self.test_limit))

    def _held_out(self, name: str, number: int) -> NDArray[np.bool_]:
        held = np.zeros(number, np.bool_)
        if number < 2:
            raise ValueError(f"domain {name!r} has {number} document, and one must be trained on, another held out; cut it into several")
        many = min(max(round(self.test_share * number), 1), number - 1)
        held[rng_for(self.seed, "text", "split", name).permutation(number)[:many]] = True
        return held

    def _tokens(self, text: str) -> Ints:
        return np.concatenate([self.tokenizer.opening, self.tokenizer.encode(text), [self.tokenizer.end]])

    def _dataset(self, runs: list[Run], split: str, limit: int | None) -> Dataset:
        if self.pack:
            runs = list(_packed(runs))
        rows = [row for run in runs for row in _cut(run, self.length, drop_rest=self.pack)]
        for domain in sorted(set(range(len(self._domains))) - {row.domain for row in rows}):
            raise ValueError(
                f"no author of domain {self.domain_names[domain]!r} fills a run of {self.length} tokens in the {split} split"
                f" ({len({run.author for run in runs if run.domain == domain})} authors); lower length, or set pack=False"
            )
        if limit is not None and limit < len(rows):
            chosen = np.sort(rng_for(self.seed, "text", "limit", split).choice(len(rows), limit, replace=False))
            rows = [rows[i] for i in chosen]
        return runs_of_tokens(rows, self.length, self.tokenizer, documents=not self.pack)


def runs_of_tokens(rows: list[Run], length: int, tokenizer: Tokenizer, *, documents: bool, asked_from: list[int] | None = None) -> Dataset:
    """Rows of at most ``length`` + 1 tokens as inputs and targets (N, L), the targets before ``asked_from`` (N,) ignored.

    Raises ``ValueError`` for a token outside the vocabulary, and naming an example of which no token is asked for.
    """
    inputs = np.full((len(rows), length), tokenizer.pad, np.int64)
    targets = np.full((len(rows), length), IGNORED, np.int64)
    for i, row in enumerate(rows):
        tokens = row.tokens
        inputs[i, : len(tokens) - 1], targets[i, : len(tokens) - 1] = tokens[:-1], tokens[1:]
        if asked_from is not None:
            targets[i, : asked_from[i] - 1] = IGNORED
    low, high = min(int(row.tokens.min()) for row in rows), max(int(row.tokens.max()) for row in rows)
    if low < 0 or high >= tokenizer.vocabulary:
        raise ValueError(f"tokens must lie in 0..{tokenizer.vocabulary - 1}, got {low} to {high}")
    empty = np.flatnonzero((targets == IGNORED).all(axis=1))
    if len(empty):
        raise ValueError(
            f"no token of example {empty[0]} is asked for ({len(empty)} of {len(rows)} examples); its loss would be a mean of nothing"
        )
    keys = {name: np.array([getattr(row, name) for row in rows], np.int64) for name in ("domain", "author")}
    if documents:
        keys["document"] = np.array([row.document for row in rows], np.int64)
    return Dataset(inputs, targets, keys)


def trailing(inputs: Tensor, pad: int) -> Tensor:
    """Flags (B, L) of the padding at the end of each row."""
    return (inputs == pad).flip(1).cumprod(1).flip(1).bool()


def _asked(batch: Batch) -> Tensor:
    return (batch.targets != IGNORED).sum(1)


def _packed(runs: list[Run]) -> Iterator[Run]:
    """One run for each author of each domain."""
    groups: dict[tuple[int, int], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.domain, run.author), []).append(run)
    for members in groups.values():
        yield members[0]._replace(tokens=np.concatenate([run.tokens for run in members]))


def _cut(run: Run, length: int, *, drop_rest: bool) -> Iterator[Run]:
    """Runs of ``length`` + 1 tokens, of which the last is the first of the next."""
    for start in range(0, len(run.tokens) - 1, length):
        tokens = run.tokens[start : start + length + 1]
        if len(tokens) == length + 1 or not drop_rest:
            yield run._replace(tokens=tokens)
