"""Errors a user can act on; bad arguments raise ``ValueError`` at construction instead."""


class FedsimError(Exception):
    """Base of every error fedsim raises while work is under way."""


class CapacityError(FedsimError):
    """Something asked for does not fit: no level fits a device, or the cluster lacks a resource."""


class CheckpointError(FedsimError):
    """A file of a run directory is missing, damaged, or belongs to another simulation."""


class DivergedError(FedsimError):
    """A loss or an update became non-finite; names the client, the round and, where known, the local step."""

    def __init__(self, message: str, *, client: int, round: int, step: int | None = None):
        super().__init__(message, client, round, step)
        self.message, self.client, self.round, self.step = message, client, round, step

    def __str__(self) -> str:
        where = f"client {self.client}, round {self.round}"
        if self.step is not None:
            where += f", local step {self.step}"
        return f"{self.message} ({where})"

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.client, self.round, self.step)


class ClientError(FedsimError):
    """User code failed for one client; the original exception is the ``__cause__``."""

    def __init__(self, message: str, *, client: int, round: int, step: int | None = None):
        super().__init__(message, client, round, step)
        self.message, self.client, self.round, self.step = message, client, round, step

    def __str__(self) -> str:
        return f"client {self.client} failed in round {self.round}: {self.message}"

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.client, self.round, self.step)


class WorkerError(FedsimError):
    """A worker could not start, or a unit of work was lost too often; the message names stage, unit and causes."""


def _rebuild(kind: type[DivergedError] | type[ClientError], message: str, client: int, round: int, step: int | None) -> Exception:
    return kind(message, client=client, round=round, step=step)


class CollapsedError(FedsimError):
    """A pruned language model no longer ends what it writes, so it cannot be calibrated on it."""
