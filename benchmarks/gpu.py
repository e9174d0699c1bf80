"""Measure dsnet on a GPU: whether it answers as on the CPU, and how many curves a second.

Needs a GPU that torch can use, and nothing of the catalog: numpy, scipy, torch, xarray and safetensors will do.

    python benchmarks/gpu.py --output benchmarks/results/gpu.md     # about a minute
    python benchmarks/gpu.py --stages                               # only where the time goes, in seconds
    python benchmarks/gpu.py --stages --device cpu                  # the same without a GPU

The curves are those of `benchmarks/speed.py`. Agreement is that of ln I between the devices, for curves that both answer with
the network. Times are of whole calls, `prepared(curves)`, with checks, errors, re-smearing, and the way to the device and
back; and of the part on the device alone.
"""

from __future__ import annotations

import argparse
import datetime
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from speed import GRIDS, Grid, spheres, usual
from torch.profiler import ProfilerActivity, profile

from dsnet_bluesky.desmearing import prepare
from dsnet_bluesky.dsnet import DSNet
from dsnet_bluesky.features import features_of
from dsnet_bluesky.training.machine import hardware

SIZES = (1, 32, 512, 8192)
COMPARED = 256
DEAREST = 15
"""Operations that are named."""

LARGE = 130
"""Rows of the largest normal matrices of the indirect transform."""
OPTIONS: dict[str, dict[str, Any]] = {"dsnet": {}, "dsnet, half": {"half": True}}


def many(grid: Grid, count: int) -> xr.Dataset:
    """Return as many curves, some of them alike."""
    made = spheres(grid.build(None), grid.build, min(count, COMPARED))
    return made.isel(exposure=np.arange(count) % made.sizes["exposure"])


def agreement(grid: Grid, options: dict[str, Any]) -> str:
    """Compare the answers of the two devices."""
    smearing = grid.build(None)
    curves = many(grid, COMPARED)
    network_only = {"consistency": False, "fallback": False}
    cpu, gpu = (prepare(smearing, "dsnet", **network_only, **more)(curves) for more in ({}, {"device": "cuda", **options}))
    away = np.abs(np.log(gpu["I"].values / cpu["I"].values))
    bands = np.abs(gpu["I"].values - cpu["I"].values) / cpu["Idev"].values
    return f"{np.quantile(away, 0.5):.1e} | {np.quantile(away, 0.999):.1e} | {away.max():.1e} | {bands.max():.1e}"


def rates(grid: Grid, options: dict[str, Any]) -> str:
    """Time calls of several sizes, and the work on the device alone."""
    smearing = grid.build(None)
    curves = many(grid, max(SIZES))
    prepared = prepare(smearing, "dsnet", device="cuda", **options)
    cells = []
    for size in SIZES:
        batch = curves.isel(exposure=slice(size))
        seconds = usual(lambda batch=batch: prepared(batch), 1.0, 15)
        cells.append(f"{1e3 * seconds:.1f} ms" if size == 1 else f"{size / seconds:,.0f}")
    return " | ".join([*cells, f"{on_device(smearing, curves, options):,.0f}"])


@torch.inference_mode()
def on_device(smearing: Any, curves: Any, options: dict[str, Any], size: int = 2048) -> float:
    """Give curves a second of features and network alone."""
    method = DSNet(smearing, device="cuda", **options)
    I, Idev = method.working.curves(curves["I"].values[:size], curves["Idev"].values[:size])

    def work() -> None:
        features = features_of(method.operator, I, Idev)
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=method.half):
            method.network(method.operator, features)

    return size / completed(work, "cuda", 20)


def completed(work: Callable[[], Any], device: str, most: int) -> float:
    """Time work until the device has done it, in s."""

    def once() -> None:
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    return usual(once, 1.5, most)


@torch.inference_mode()
def stages(grid: Grid, device: str, size: int = 2048) -> list[str]:
    """Say how long each stage takes for a batch of one instrument, in us a curve, and which operations take the time."""
    smearing, curves = grid.build(None), many(grid, size)
    method = DSNet(smearing, device=device)
    operator = method.operator
    I, Idev = method.working.curves(curves["I"].values, curves["Idev"].values)
    wide = {"dtype": torch.float64, "device": device}
    scale = np.abs(I).mean(axis=1, keepdims=True)
    scaled = torch.as_tensor(I / scale, **wide), torch.as_tensor(Idev / scale, **wide)
    features = features_of(operator, I, Idev)
    assert operator.ladder is not None
    ladder = operator.ladder
    normal = (torch.eye(LARGE, **wide) + 1 / LARGE).expand(size, -1, -1).contiguous()
    tall = torch.ones(size, smearing.q.size, LARGE, **wide)
    whole = partial(method, curves["I"].values, curves["Idev"].values)
    works: dict[str, Callable[[], Any]] = {
        "features in all": lambda: features_of(operator, I, Idev),
        "of that the ladder": lambda: ladder(*scaled),
        "network": lambda: method.network(operator, features),
        "whole pass": whole,
        f"one Cholesky factor of {LARGE}": lambda: torch.linalg.cholesky_ex(normal),
        "the same by blocks": lambda: by_blocks(normal),
        f"one inverse of a factor of {LARGE}": lambda: torch.linalg.solve_triangular(normal, normal, upper=False),
        f"one normal matrix of {LARGE}": lambda: tall.mT @ tall,
    }

    found = [f"| {name} | {1e6 * completed(work, device, 9) / size:,.1f} |" for name, work in works.items()]
    return [*found, "", *operations(whole, device, size)]


def by_blocks(matrices: torch.Tensor, width: int = 16) -> torch.Tensor:
    """Give Cholesky factors, shape (batch, n, n), by products and work on small blocks, which a GPU does for all at once.

    What its library does to a batch may be slower: to be compared. Where matrices are nearly singular, some digits are lost.
    """
    rest, size = matrices.clone(), matrices.shape[-1]
    for first in range(0, size, width):
        last = min(first + width, size)
        block = rest[:, first:last, first:last]
        for k in range(last - first):
            block[:, k:, k] /= block[:, k, k, None].sqrt()
            column = block[:, k + 1 :, k]
            block[:, k + 1 :, k + 1 :] -= column[:, :, None] * column[:, None, :]
        below = rest[:, last:, first:last] @ inverse(block.tril()).mT
        rest[:, last:, first:last] = below
        rest[:, last:, last:] -= below @ below.mT
    return rest.tril()


def inverse(lower: torch.Tensor) -> torch.Tensor:
    """Give the inverse of lower triangular blocks: of 1 + N it is (1 - N)(1 + N^2)(1 + N^4) ...; some power of N vanishes."""
    diagonal = lower.diagonal(dim1=-2, dim2=-1)[..., None]
    unit = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    power = unit - lower / diagonal
    found, order = unit + power, 2
    while order < lower.shape[-1]:
        power = power @ power
        found, order = found @ (unit + power), 2 * order
    return found / diagonal.mT


def operations(work: Callable[[], Any], device: str, size: int) -> list[str]:
    """Say which of torch's operations take the time of some work, in us a curve, and how often each is called."""
    on_device = device.startswith("cuda")
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_device else [])]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # only the thread that asks is looked at
    with profile(activities=kinds) as found:
        completed(work, device, 1)
    torch.set_num_threads(threads)
    totals = found.key_averages()
    spent = {each.key: (each.self_device_time_total if on_device else each.self_cpu_time_total, each.count) for each in totals}
    dearest = sorted(spent.items(), key=lambda pair: -pair[1][0])[:DEAREST]
    # A call to warm up and one to time.
    rows = [f"| {name[:60]} | {time / 2 / size:,.1f} | {count // 2} |" for name, (time, count) in dearest]
    return ["| operation of the whole pass | us a curve | calls |", "|---|---|---|", *rows]


def rows(measure: Callable[[Grid, dict[str, Any]], str]) -> list[str]:
    """Return a row of a table for every instrument and method."""
    found = []
    for grid in GRIDS.values():
        for name, options in OPTIONS.items():
            found.append(f"| {grid.title} | {name} | {measure(grid, options)} |")
            print(found[-1], flush=True)
    return found


def report() -> list[str]:
    """Measure agreement and rates on the GPU."""
    lines = [
        "# dsnet on a GPU",
        "",
        f"`python benchmarks/gpu.py`, {datetime.datetime.now(datetime.UTC).date()}, {torch.cuda.get_device_name()}, "
        f"torch {torch.__version__}, numpy {np.__version__}; the CPU beside it: {torch.get_num_threads()} thread(s).",
        "",
        f"## Agreement with the CPU ({COMPARED} curves, network only)",
        "",
        "Differences of ln I: median, 99.9 % quantile, largest; and the largest difference of I in stated errors.",
        "",
        "| instrument | method | median | 99.9 % | largest | largest, in Idev |",
        "|---|---|---|---|---|---|",
    ]
    lines += rows(agreement)
    lines += [
        "",
        "## Curves a second",
        "",
        "| instrument | method | one curve | " + " | ".join(f"{size:,}" for size in SIZES[1:]) + " | device alone, 2,048 |",
        "|---|---|" + "---|" * (len(SIZES) + 1),
    ]
    lines += rows(rates)
    lines += ["", f"Largest memory of the device in use: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB.", ""]
    return [*lines, *where(next(iter(GRIDS.values())), "cuda", 2048)]


def where(grid: Grid, device: str, size: int) -> list[str]:
    """Lay out `stages`."""
    head = [
        f"## Where the time goes: {grid.title}, {size:,} curves, {hardware(device)}",
        "",
        "| stage | us a curve |",
        "|---|---|",
    ]
    return head + stages(grid, device, size)


def main(words: Sequence[str] | None = None) -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--stages", action="store_true", help="only where the time goes")
    parser.add_argument("--device", default="cuda", help="of --stages")
    parser.add_argument("--curves", type=int, default=2048, help="of --stages")
    arguments = parser.parse_args(words)
    started = time.perf_counter()
    grid = next(iter(GRIDS.values()))
    lines = where(grid, arguments.device, arguments.curves) if arguments.stages else report()
    text = "\n".join(lines) + "\n"
    print(text, f"{time.perf_counter() - started:.0f} s")
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
