"""Whether this machine can run simulations: versions, cores, memory, disks, Ray, and the law of arithmetic that equal bits rest on.

Exports :func:`examine` and :class:`Finding`. Whatever breaks while it looks is a finding, never a traceback.
"""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedsim.runs.text import number, size

_PYTHON = (3, 11)
_NEEDED_MEMORY, _WORKER_MEMORY = 1e9, 3.5e8  # bytes: to run at all, and for each worker with torch in it
_NEEDED_DISK, _ROOMY_DISK = 1e8, 2e9
_RAY_SECONDS = 120.0
_WIDTH, _FEWER = 16, (1, 2, 5, 13)
_SILENCE = {"FLWR_TELEMETRY_ENABLED": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}


@dataclass(frozen=True)
class Finding:
    """What one check found. ``failed``: simulations cannot run as promised; ``note``: they can. ``remedy`` says what to do about either."""

    name: str
    state: Literal["ok", "note", "failed"]
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        line = f"{self.state:<6}  {self.name:<10}  {self.text}"
        return f"{line}\n{'':<20}-> {self.remedy}" if self.remedy else line


def examine(out: str | Path = "runs", *, address: str | None = None, ray: bool = True) -> Iterator[Finding]:
    """Look at this machine, one :class:`Finding` after another; ``out`` is where runs would be stored.

    ``address`` of a Ray cluster to join ("auto", "host:port"); ``None`` starts a small one and stops it. ``ray=False`` leaves Ray alone.
    """
    checks: dict[str, Callable[[], Finding]] = {
        "python": _python,
        "packages": _packages,
        "extras": _extras,
        "cores": _cores,
        "memory": _memory,
        "torch": _torch,
        "gpus": _gpus,
        "lanes": _lanes,
        "runs": lambda: _directory("runs", Path(out), "choose another place with --out"),
        "temporary": lambda: _directory("temporary", Path(tempfile.gettempdir()), "set TMPDIR to another place"),
        "telemetry": _telemetry,
    }
    if ray:
        checks["ray"] = lambda: _ray(address)
    for name, check in checks.items():
        try:
            yield check()
        except Exception as error:  # a check that cannot be made is what the user has to know
            yield Finding(
                name, "failed", f"{type(error).__name__}: {' '.join(str(error).split())}", "repair the installation and look again"
            )


def _python() -> Finding:
    text = f"{platform.python_version()} on {platform.platform()}"
    if sys.version_info < _PYTHON:
        return Finding("python", "failed", text, f"use Python {'.'.join(map(str, _PYTHON))} or later")
    return Finding("python", "ok", text)


def _packages() -> Finding:
    wanted = _requirements("")
    if wanted is None:
        return Finding(
            "packages", "note", "fedsim is used from its folder, without a list of what it needs", "install it: pip install -e ."
        )
    lacking = {name: least for name, least in wanted.items() if not _is_met(name, least)}
    if lacking:
        found = ", ".join(f"{name} {_version(name) or 'is missing'}" for name in lacking)
        needed = " ".join(f"'{name}>={least}'" for name, least in lacking.items())
        return Finding("packages", "failed", found, f"pip install {needed}")
    return Finding("packages", "ok", ", ".join(f"{name} {_version(name)}" for name in ("fedsim", *wanted)))


def _extras() -> Finding:
    lacking = {
        extra: [name for name, least in (_requirements(extra) or {}).items() if not _is_met(name, least)]
        for extra in ("plots", "images", "streams")
    }
    if not any(lacking.values()):
        return Finding("extras", "ok", "reports, picture data and data streams are there")
    text = "; ".join(f"without {', '.join(names)} no {extra}" for extra, names in lacking.items() if names)
    return Finding("extras", "note", text, f"pip install 'fedsim[{','.join(extra for extra, names in lacking.items() if names)}]'")


def _requirements(extra: str) -> dict[str, str] | None:
    """Least versions by package of what fedsim needs, or of one of its extras; ``None`` where it is not installed."""
    try:
        lines = importlib.metadata.requires("fedsim") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = (re.fullmatch(r'([\w.-]+)>=([\d.]+)(?:;\s*extra == "(\w+)")?', line.replace(" >=", ">=").strip()) for line in lines)
    return {m[1]: m[2] for m in found if m and (m[3] or "") == extra}


def _is_met(name: str, least: str) -> bool:
    version = _version(name)
    return version is not None and _numbers(version) >= _numbers(least)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _cores() -> Finding:
    cores, load = usable_cores(), os.getloadavg()[0]
    text = f"{number(cores)} of {os.cpu_count()} cores usable, load {load:.1f}"
    if cores < (os.cpu_count() or 1):
        return Finding("cores", "note", text, f"Ray would start a worker on each core: say --workers {max(1, int(cores))}")
    if load > cores:
        return Finding("cores", "note", f"{text}: other programs are at work", "wait for them before fedsim tune, explain or any timing")
    return Finding("cores", "ok", text)


def usable_cores() -> float:
    """Cores this process may use: those it is bound to, or fewer where its control group has a quota."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, period = (_control_group("cpu.max") or "max 1").split()
    return float(bound) if quota == "max" else min(float(bound), int(quota) / int(period))


def _memory() -> Finding:
    free, workers = available_memory(), max(1, int(usable_cores()))
    text = f"{size(free)} free"
    if free < _NEEDED_MEMORY:
        return Finding("memory", "failed", text, f"end other programs until {size(_NEEDED_MEMORY)} are free")
    if free < _NEEDED_MEMORY + workers * _WORKER_MEMORY:
        fits = int((free - _NEEDED_MEMORY) / _WORKER_MEMORY)
        return Finding("memory", "note", f"{text}, {workers} workers may need more", f"say --workers {fits}")
    return Finding("memory", "ok", text)


def available_memory() -> float:
    """Bytes this process can still take: free on the machine, or fewer where its control group has a limit."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except OSError:  # not Linux: what is installed is all that is told
        free = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    limit = _control_group("memory.max") or "max"
    return free if limit == "max" else min(free, float(limit) - float(_control_group("memory.current") or 0))


def _control_group(name: str) -> str | None:
    try:
        return (Path("/sys/fs/cgroup") / name).read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _torch() -> Finding:
    import torch

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    return Finding("torch", "ok", f"{torch.__version__} for {built}; {torch.get_num_threads()} threads here, one in every worker")


def _gpus() -> Finding:
    import torch

    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    if found:
        return Finding("gpus", "ok", ", ".join(f"{p.name} ({size(p.total_memory)})" for p in found))
    if torch.version.cuda and Path("/proc/driver/nvidia/version").exists():
        return Finding("gpus", "note", "there is a driver, but torch sees no GPU", "look at CUDA_VISIBLE_DEVICES and at nvidia-smi")
    return Finding("gpus", "ok", "none: everything runs on the CPU")


def _lanes() -> Finding:
    broken = {name: found for name in ("mlp", "cnn") if (found := width_law(name))}
    if not broken:
        return Finding("lanes", "ok", "a client's bits do not depend on who trains beside it")
    text = "; ".join(f"{name}: {found}" for name, found in broken.items())
    return Finding("lanes", "failed", text, "put lanes=1 into the recipes that run here")


def width_law(model: str) -> str:
    """Where the bits of clients of a ``Digits`` model change with their neighbours in a block; empty where they do not.

    The first and the last client of blocks of 1, 2, 5 and 13 are compared with themselves in the full block, in order and in reverse.
    """
    from fedsim.runtime.executor import one_thread
    from fedsim.tasks import Digits

    task = Digits(model=model, hidden=(64, 64))
    everyone = list(range(_WIDTH))
    with one_thread():
        for count in _FEWER:
            for client in {0, count - 1}:
                alone = _end(task, everyone[:count], client)
                if (alone != _end(task, everyone, client)).any():
                    return f"client {client} of a block of {count} differs from itself in a block of {_WIDTH}"
                if (alone != _end(task, everyone[::-1], client)).any():
                    return f"client {client} differs where the block stands in reverse order"
    return ""


def _end(task: Any, clients: list[int], client: int) -> Any:
    """The parameters (P,) of ``client`` after two local steps in a block of ``clients``: the block's mean, where nobody else has weight."""
    import numpy as np

    from fedsim.local_training import Shape, Unit, train_unit
    from fedsim.parameters import Layout
    from fedsim.shards import Shards
    from fedsim.strategies import FedAvg
    from fedsim.uploads import Sizes

    strategy, data, net = FedAvg(client_lr=0.1, local_steps=2), task.data().train, task.build(0)
    unit = Unit(
        seed=0,
        round=0,
        draws=np.zeros(len(clients), np.int64),
        shape=0,
        clients=np.array(clients),
        steps=np.full(len(clients), 2),
        lanes=_WIDTH,
        model="model",
        server="model",
        start=0,
        points=(2,),
        weights=(np.array([clients]) == client).astype(np.float64),
        shares=np.ones(1),
        carry=None,
        memory=None,
        last=2,
    )
    shared = {
        "shapes": (Shape(task, Sizes.of(strategy, Layout.of(net), None)),),
        "train": data,
        "shards": Shards(np.arange(len(data)), np.linspace(0, len(data), _WIDTH + 1).astype(np.int64)),
        "strategy": strategy,
        "state": None,
        "model": Layout.of(net).flatten(net),
    }
    return train_unit(unit, shared, {}).node.total


def _directory(name: str, path: Path, remedy: str) -> Finding:
    """Whether files can be written, renamed and linked there (a run's lock is a link), and how much fits."""
    place = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    text = f"{path}: {size(free)} free"
    try:
        with tempfile.TemporaryDirectory(prefix=".fedsim-", dir=place) as inside:
            written = Path(inside, "written")
            written.write_bytes(b"fedsim")
            os.replace(written, written.with_name("renamed"))
            os.link(written.with_name("renamed"), written)
    except OSError as error:
        return Finding(name, "failed", f"{path}: {error.strerror or error}", remedy)
    if free < _NEEDED_DISK:
        return Finding(name, "failed", text, f"free {size(_NEEDED_DISK)}, or {remedy}")
    if free < _ROOMY_DISK:
        return Finding(name, "note", text, f"long runs and Ray may need {size(_ROOMY_DISK)}: free some, or {remedy}")
    return Finding(name, "ok", text)


def _telemetry() -> Finding:
    if os.environ.get("RAY_USAGE_STATS_ENABLED") == "1":
        return Finding("telemetry", "note", "Ray reports its use", "export RAY_USAGE_STATS_ENABLED=0")
    loud = {name: value for name, value in _SILENCE.items() if os.environ.get(name) != value}
    if loud:
        way = "export " + " ".join(f"{name}={value}" for name, value in loud.items())
        return Finding("telemetry", "note", "Ray's is off; other packages may report their use where they are imported", way)
    return Finding("telemetry", "ok", "off")


def _ray(address: str | None) -> Finding:
    """In a process of its own, so that one that hangs or dies is a finding as well."""
    code = "import sys; from fedsim.doctor import reach; reach(sys.argv[1])"
    remedy = (
        "start a cluster with: ray start --head, or leave out --address"
        if address
        else "end other Ray processes of this machine, look at free memory and disk; --workers 0 runs without Ray"
    )
    if address and (silence := _silence(address)):
        return Finding("ray", "failed", silence, remedy)
    try:
        done = subprocess.run([sys.executable, "-c", code, address or ""], capture_output=True, text=True, timeout=_RAY_SECONDS)
    except subprocess.TimeoutExpired:
        return Finding("ray", "failed", f"no answer in {_RAY_SECONDS:g} s", remedy)
    if done.returncode:
        return Finding("ray", "failed", (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300], remedy)
    told = json.loads(done.stdout.splitlines()[-1])
    where = f"joined {address}" if address else "started and stopped"
    return Finding("ray", "ok", f"{where}: a worker after {told['start']:.1f} s, a round trip of {1e3 * told['trip']:.1f} ms")


def _silence(address: str) -> str:
    """Why nobody listens at "host:port", which Ray would wait minutes to tell; empty where somebody does, and for other forms of address."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()):
        return ""
    try:
        socket.create_connection((host, int(port)), timeout=5.0).close()
    except OSError as error:
        return f"nobody answers at {address} ({error.strerror or error})"
    return ""


def reach(address: str) -> None:
    """Start one worker, ask it once more, and print the seconds of both as JSON. An empty ``address`` starts a cluster."""
    from fedsim.runtime.ray import RayExecutor

    begun = time.perf_counter()
    with RayExecutor(address=address or None, workers=1) as executor:
        executor.map(_answer, [0], {})
        started = time.perf_counter()
        executor.map(_answer, [0], {})
        print(json.dumps({"start": started - begun, "trip": time.perf_counter() - started}))


def _answer(unit: Any, shared: Mapping[str, Any], cache: MutableMapping[Any, Any]) -> int:
    return os.getpid()
