"""How fast every method desmears: milliseconds for one curve, curves a second in batches, preparation apart.

Noisy curves of mixed spheres on three instruments, on one and two threads of the CPU and, where
there is one, on a GPU. Every number of threads has a process of its own, so that torch and the
linear algebra of numpy alike keep to it. Writes Markdown:

    python benchmarks/speed.py            # at most 9 minutes on a CPU
    python benchmarks/speed.py --quick    # a smoke test: one instrument, one thread, short fine-tuning

Times are of whole calls, `prepared(curves)`: checks, answer, errors, re-smearing and the Dataset. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from provenance import with_model

from dsnet_bluesky.data import BadInput, curve
from dsnet_bluesky.desmearing import METHODS as INSTALLED
from dsnet_bluesky.desmearing import Prepared, prepare
from dsnet_bluesky.smearing import Smearing
from dsnet_bluesky.training import hardware

Floats = NDArray[np.floating[Any]]

FINER = 4
"""Curves are made on a grid this much finer than q_calc."""

NOISE = 0.02
BATCHES = (32, 512)
GPU_BATCHES = (32, 512, 8192)

PATIENCE = 4.0
"""Seconds that a batch may be expected to take; longer ones are left out."""

LIMIT = 260.0
"""Seconds that one number of threads may take; what has not been timed by then is left out."""

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Grid:
    """An instrument to be timed: its operator on any grid of the ideal curve."""

    title: str
    build: Callable[[Floats | None], Smearing]


PAPER_Q = np.linspace(0.01, 5.01, 501)
SLIT_Q = np.geomspace(0.01, 2.0, 200)
FINE_Q = np.linspace(0.02, 5.0, 2000)

GRIDS = {
    "paper": Grid("501 equal steps, Gaussian of sigma 0.04 1/nm", lambda nodes: Smearing.gaussian(PAPER_Q, 0.04, q_calc=nodes)),
    "slit": Grid("200 logarithmic steps, slit of half-length 0.1 1/nm", lambda nodes: Smearing.slit(SLIT_Q, 0.1, q_calc=nodes)),
    "wide": Grid(
        "2,000 equal steps, Gaussian of sigma 0.1 1/nm (40 steps)", lambda nodes: Smearing.gaussian(FINE_Q, 0.1, q_calc=nodes)
    ),
}

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lake": ("lake", {}),
    "wiener": ("wiener", {}),
    "map": ("map", {}),
    "ift": ("ift", {}),
    "cme": ("cme", {}),
    "dsnet": ("dsnet", {}),
    "dsnet, network only": ("dsnet", {"consistency": False, "fallback": False}),
    "dsnet, half": ("dsnet", {"half": True}),
    "dsnet-fast": ("dsnet-fast", {}),
    "dsnet-fast, half": ("dsnet-fast", {"half": True}),
    "dsnet-paper": ("dsnet-paper", {}),
}
"""By the name in the tables: a method and its options. dsnet-paper, fine-tuned, is timed on its own grid only."""


def spheres(smearing: Smearing, build: Callable[[Floats | None], Smearing], count: int) -> xr.Dataset:
    """Make curves: three spheres of any size and share, with a background, and relative noise."""
    nodes = smearing.q_calc
    fine = np.append((nodes[:-1, None] + np.diff(nodes)[:, None] * np.arange(FINER) / FINER).ravel(), nodes[-1])
    rng = np.random.default_rng(0)
    radii = rng.uniform(8, 40, (count, 3)) / nodes[-1]
    shares = rng.dirichlet([1, 1, 1], count)
    I = (
        np.array([sum(w * sphere(fine * r) for w, r in zip(*pair, strict=True)) for pair in zip(shares, radii, strict=True)])
        + 1e-4
    )
    smeared = build(fine).apply(I)
    return curve(smearing.q, smeared * (1 + NOISE * rng.standard_normal(smeared.shape)), NOISE * smeared)


def sphere(x: Floats) -> Floats:
    """Form factor of a sphere at x = q R."""
    x = np.maximum(x, 1e-2)
    return (3 * (np.sin(x) - x * np.cos(x)) / x**3) ** 2


# Timing, in a process of its own


def once(action: Callable[[], Any]) -> float:
    """Time one call in seconds."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def usual(action: Callable[[], Any], seconds: float, most: int) -> float:
    """Give the median time of several calls, after one to warm up."""
    return float(np.median(times(action, seconds, most)))


def times(action: Callable[[], Any], seconds: float, most: int) -> list[float]:
    """Time several calls, after one to warm up; only that one where it takes long."""
    first = once(action)
    repeats = int(np.clip(seconds / max(first, 1e-6), 1, most)) if first < PATIENCE else 0
    return [once(action) for _ in range(repeats)] or [first]


BUSY = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"
"""A process that computes as long as the one that started it lives."""


@contextmanager
def busy() -> Iterator[None]:
    """Keep every core busy with another process."""
    cores = len(os.sched_getaffinity(0))
    others = [subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.DEVNULL) for _ in range(cores)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def timed(smearing: Smearing, curves: xr.Dataset, method: str, options: dict[str, Any], batches: Sequence[int]) -> dict[str, Any]:
    """Time one method: preparation, one curve and batches, in seconds."""
    try:
        prepare(smearing, method, **options)
        started = time.perf_counter()
        prepared = prepare(smearing, method, **options)
        preparation = time.perf_counter() - started
        one = curves.isel(exposure=[0])
        single = usual(lambda: prepared(one), 1.0, 60)
        with busy():
            crowded = times(lambda: prepared(one), 2.0, 60)
        found = {str(size): batch_time(prepared, curves, size, single) for size in batches}
    except BadInput as error:
        return {"refused": str(error).split(";")[0].split(". ")[0]}
    beside = np.quantile(crowded, [0.5, 0.9]).tolist()
    return {
        "preparation": preparation,
        "single": single,
        "busy": beside,
        "batches": found,
        "answers": answers(prepared, curves),
    }


def batch_time(prepared: Prepared, curves: xr.Dataset, size: int, single: float) -> float | None:
    """Time a batch; None where it would take too long."""
    small = min(size, 32)
    expected = once(lambda: prepared(curves.isel(exposure=slice(small)))) * size / small if single * small < PATIENCE else np.inf
    if expected > PATIENCE:
        return None
    batch = curves.isel(exposure=slice(size))
    return usual(lambda: prepared(batch), 1.0, 5)


def answers(prepared: Prepared, curves: xr.Dataset) -> dict[str, int]:
    """Count what answered in the name of dsnet, of 32 curves."""
    if prepared.method != "dsnet":
        return {}
    names, counts = np.unique(prepared(curves.isel(exposure=slice(32)))["answer"].values, return_counts=True)
    return dict(zip(names.tolist(), counts.tolist(), strict=True))


def fine_tuned(smearing: Smearing, curves: xr.Dataset, options: dict[str, Any]) -> dict[str, Any]:
    """Time the fine-tuning of dsnet-paper to one curve, once."""
    prepare(smearing, "dsnet-paper", **options)
    started = time.perf_counter()
    prepared = prepare(smearing, "dsnet-paper", **options)
    preparation = time.perf_counter() - started
    prepare(smearing, "dsnet-paper", iterations=1, **{k: v for k, v in options.items() if k != "iterations"})(
        curves.isel(exposure=0)
    )
    single = once(lambda: prepared(curves.isel(exposure=0)))
    return {"preparation": preparation, "single": single, "busy": None, "batches": {}, "answers": {}}


def work(arguments: argparse.Namespace) -> None:
    """Time everything with the threads of this process; print the hardware and then every entry, as lines of JSON."""
    if arguments.device == "cpu":
        torch.set_num_threads(arguments.threads)
    batches = BATCHES if arguments.device == "cpu" else GPU_BATCHES
    print(json.dumps(hardware(arguments.device)), flush=True)
    for name in arguments.grids:
        smearing = GRIDS[name].build(None)
        curves = spheres(smearing, GRIDS[name].build, max(batches))
        for label, (method, options) in METHODS.items():
            if method not in INSTALLED or (arguments.device != "cpu" and not method.startswith("dsnet")):
                continue
            options = {**options, **({"device": arguments.device} if method.startswith("dsnet") else {})}
            if method == "dsnet":
                entry = timed(smearing, curves, method, {**options, "model": arguments.model}, batches)
            elif method == "dsnet-paper":
                if name != "paper":
                    continue
                entry = fine_tuned(smearing, curves, {**options, "iterations": arguments.iterations})
            else:
                entry = timed(smearing, curves, method, options, batches)
            print(json.dumps([name, label, entry]), flush=True)


def summary(entry: dict[str, Any]) -> str:
    """Write the figures of a method in a line."""
    if "refused" in entry:
        return f"refused: {entry['refused']}"
    rates = [f"{int(size) / t:.3g}/s in {size}" for size, t in entry["batches"].items() if t]
    return ", ".join([f"prepared in {1e3 * entry['preparation']:.3g} ms", f"one in {1e3 * entry['single']:.3g} ms", *rates])


# The report


def run(threads: int, device: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time everything in a process with so many threads, for `LIMIT` seconds at most."""
    print(f"{device}, threads: {threads}", flush=True)
    command = [sys.executable, __file__, "--worker", "--threads", str(threads), "--device", device, "--model", arguments.model]
    command += ["--iterations", str(arguments.iterations), "--grids", *arguments.grids]
    environment = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(threads))}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        limit = threading.Timer(LIMIT, process.kill)
        limit.start()
        found: dict[str, Any] = {"hardware": json.loads(process.stdout.readline())}
        for line in process.stdout:
            name, label, entry = json.loads(line)
            found.setdefault(name, {})[label] = entry
            print(f"  {name:6s} {label:20s} {summary(entry)}", flush=True)
        limit.cancel()
    if process.returncode:
        print(f"  ended early (code {process.returncode}; {LIMIT:g} s are allowed): the rest is left out", flush=True)
    return found


def cells(entry: dict[str, Any] | None, batches: Sequence[int]) -> list[str]:
    """Write preparation and one curve, alone and beside other work, in milliseconds, and the rates of batches."""
    if entry is None or "refused" in entry:
        return ["-" if entry is None else "refused", *["-"] * (len(batches) + 2)]
    took = [entry["batches"].get(str(size)) for size in batches]
    rates = [f"{size / t:.3g}" if t else "-" for size, t in zip(batches, took, strict=True)]
    beside = "{:.3g} ({:.3g})".format(*(1e3 * t for t in entry["busy"])) if entry["busy"] else "-"
    return [f"{1e3 * entry['preparation']:.3g}", f"{1e3 * entry['single']:.3g}", beside, *rates]


def table(name: str, found: dict[str, dict[str, Any]]) -> str:
    """Lay out the figures of one instrument: all methods, all machines."""
    head, columns = ["method"], []
    for title, figures in found.items():
        batches = GPU_BATCHES if title.startswith("GPU") else BATCHES
        columns.append((figures.get(name, {}), batches))
        head += [f"{title}: prepare, ms", "one, ms", "busy, ms", *(f"{size}: curves/s" for size in batches)]
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for label in METHODS:
        row = [cell for figures, batches in columns for cell in cells(figures.get(label), batches)]
        if set(row) != {"-"}:
            rows.append(f"| {label} | " + " | ".join(row) + " |")
    return "\n".join(rows)


def ratios(found: dict[str, dict[str, Any]]) -> str:
    """Compare dsnet with the fine-tuned dsnet-paper, in the same run."""
    lines = []
    for title, figures in found.items():
        entries = figures.get("paper", {})
        if not {"dsnet", "dsnet-paper"} <= set(entries):
            continue
        slow, fast = entries["dsnet-paper"]["single"], entries["dsnet"]
        rates = [int(size) / t for size, t in fast["batches"].items() if t]
        lines.append(
            f"- {title}: dsnet-paper takes {slow:.3g} s for a curve; one curve of dsnet {slow / fast['single']:,.0f} times less, "
            f"a curve in a batch {slow * max(rates, default=1 / fast['single']):,.0f} times less."
        )
    return "\n".join(lines)


def report(found: dict[str, dict[str, Any]], load: float, arguments: argparse.Namespace) -> str:
    """Write the whole Markdown."""
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in ("dsnet-bluesky", "torch", "numpy", "scipy"))
    machines = "; ".join(f"{title}: {figures['hardware']}" for title, figures in found.items())
    told = [figures.get("paper", {}).get("dsnet", {}).get("answers") for figures in found.values()]
    date = datetime.datetime.now(datetime.UTC).date()
    steps = "" if arguments.iterations == 500 else f" (here shortened to {arguments.iterations} steps)"
    parts = [
        "# Speed",
        f"`{with_model('python benchmarks/speed.py' + ' --quick' * arguments.quick, arguments.model)}`, {date}, {machines}, "
        f"Python {platform.python_version()}, {versions}. Load of the machine before the run: {load:.1f} processes.",
        PROTOCOL.format(noise=100 * NOISE, patience=PATIENCE, limit=LIMIT, steps=steps, model=arguments.model),
        "" if torch.cuda.is_available() else "No GPU was there to be timed.",
    ]
    for name in arguments.grids:
        parts += [f"## {GRIDS[name].title}", table(name, found)]
    parts += ["## Against fine-tuning", ratios(found)]
    parts.append(f"Of 32 curves on the paper's grid, what answered in the name of dsnet: {told[0]}.")
    return "\n\n".join(part for part in parts if part) + "\n"


PROTOCOL = """\
Curves: three spheres with a background, {noise:g} % noise, Idev given. **prepare**: `prepare(smearing, method)`, once for an
instrument. **one**: `prepared(curves)` for a single curve (median of up to 60 calls after a first). **busy**: the median while
as many other processes as there are cores compute, and in brackets what nine calls in ten stay below. **curves/s**: for
batches, on the idle machine; left out where one would take more than {patience:g} s. What is not timed within {limit:g} s of its
number of threads is left out. All answers come with Idev, but those of dsnet-paper. dsnet
(model {model}) has its default options: proximal steps and classical methods where the network's answer misses the measurement;
"network only" leaves these out, "half" lets convolutions compute in bfloat16. dsnet-fast has one U-Net in place of two.
dsnet-paper is fine-tuned to each curve with 500 steps{steps}, on the paper's grid.
Each number of threads has its own process, with `OMP_NUM_THREADS` and torch set to it.
"""


def main() -> None:
    """Time all methods and write the report."""
    parser = argparse.ArgumentParser(description="Milliseconds for one curve and curves a second, for every method.")
    parser.add_argument("--quick", action="store_true", help="smoke test: one instrument, one thread, 10 steps of fine-tuning")
    parser.add_argument("--model", default="dsnet", help="released model, or the folder of one (default: dsnet)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the report")
    parser.add_argument("--iterations", type=int, default=500, help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cpu", help=argparse.SUPPRESS)
    parser.add_argument("--grids", nargs="+", default=list(GRIDS), choices=list(GRIDS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work(arguments)
    if arguments.quick:
        arguments.iterations, arguments.grids = 10, ["paper"]
    load = os.getloadavg()[0]
    counts = [1] if arguments.quick else [count for count in (1, 2) if count <= (os.cpu_count() or 1)]
    found = {f"{count} thread{'s' * (count > 1)}": run(count, "cpu", arguments) for count in counts}
    if torch.cuda.is_available():
        found["GPU"] = run(1, "cuda", arguments)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "speed.md").write_text(report(found, load, arguments), encoding="utf-8")
    return None


if __name__ == "__main__":
    main()
