#!/usr/bin/env python3
"""The payload: the mass of the Z boson from pairs of muons, as a picture and as numbers.

It knows nothing of grids: it reads every zmumu_*.root of its working directory and writes zmumu.png and zmumu.json.
Both have the same bytes each time they are made from the same files, because outputs with a logical name never change.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import uproot

Floats = npt.NDArray[np.float64]

BRANCHES = ["Type", "Q1", "Q2", "M", *(f"{part}{muon}" for muon in "12" for part in ("E", "px", "py", "pz"))]

BIN_GEV = 1.0

NARROWEST_GEV = 1.0
"""Well below the Z's own 2.5 GeV. Without a bound the likelihood is infinite for a peak of no width on a single pair."""

MASS_AGREES_GEV = 1e-4
"""Between our mass and the file's: rounding stays a thousand times below, a wrong column is far above."""


@dataclass(frozen=True)
class Peak:
    """A Breit-Wigner shape over a flat background, fitted to masses in a window."""

    mass: float
    mass_error: float
    width: float
    width_error: float
    signal: float
    """The share of pairs that belong to the peak."""
    pairs: int
    window: tuple[float, float]

    def density(self, mass: Floats) -> Floats:
        """Pairs per GeV."""
        low, high = self.window
        shape = breit_wigner(mass, self.mass, self.width)
        return self.pairs * (self.signal * shape + (1 - self.signal) / (high - low))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--window", nargs=2, type=float, default=(60.0, 120.0), help="masses to look at, in GeV")
    low, high = options.parse_args().window

    masses, files = [], {}
    for path in sorted(Path().glob("zmumu_*.root")):
        selected, read = read_masses(path)
        masses.append(selected)
        files[path.name] = {"read": read, "selected": len(selected)}
        print(f"{path.name}: {read} pairs read, {len(selected)} selected", flush=True)
    if not masses:
        raise SystemExit("no zmumu_*.root to read")

    mass = np.concatenate(masses)
    inside = mass[(mass > low) & (mass < high)]
    peak = fit(inside, (low, high))
    print(f"peak at {peak.mass:.2f} +- {peak.mass_error:.2f} GeV, {len(inside)} pairs in the window", flush=True)
    figures = {
        "pairs_read": sum(file["read"] for file in files.values()),
        "pairs_selected": len(mass),
        "pairs_in_window": len(inside),
        "window_gev": [low, high],
        "peak_gev": round(peak.mass, 3),  # the last digits of a sum are the business of the processor
        "peak_error_gev": round(peak.mass_error, 3),
        "width_gev": round(peak.width, 3),
        "width_error_gev": round(peak.width_error, 3),
        "files": files,
    }
    Path("zmumu.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    draw(inside, peak, Path("zmumu.png"))
    print("zmumu.png and zmumu.json written", flush=True)


def read_masses(path: Path) -> tuple[Floats, int]:
    """The invariant masses of the good pairs of one file, and how many pairs it has.

    The sample lists a pair up to four times, once for each way its muons were reconstructed: G, a global muon; T, one
    of the tracker alone. Only GG is taken, or each Z would count four times and the errors would be half of what they are.
    """
    with uproot.open(path) as file:
        pairs: dict[str, Any] = file["events"].arrays(BRANCHES, library="np")
    energy, px, py, pz = (pairs[f"{part}1"] + pairs[f"{part}2"] for part in ("E", "px", "py", "pz"))
    mass = np.sqrt(np.maximum(energy**2 - px**2 - py**2 - pz**2, 0.0))
    if not np.allclose(mass, pairs["M"], rtol=0, atol=MASS_AGREES_GEV):
        raise SystemExit(f"{path}: the masses in the file are not those of its muons")
    good = (pairs["Type"] == "GG") & (pairs["Q1"] * pairs["Q2"] < 0)
    return mass[good], len(mass)


def breit_wigner(mass: Floats, peak: float, width: float) -> Floats:
    half = width / 2
    return half / np.pi / ((mass - peak) ** 2 + half**2)


def fit(mass: Floats, window: tuple[float, float]) -> Peak:
    """The most likely peak, by expectation maximisation: no binning and no minimiser, each step is a weighted mean."""
    if len(mass) == 0:
        return Peak(0.0, 0.0, 0.0, 0.0, 0.0, 0, window)
    flat = 1 / (window[1] - window[0])
    peak, width, signal = float(np.median(mass)), 4.0, 0.9
    for _ in range(200):  # settles to 0.1 MeV in about 60
        shape = signal * breit_wigner(mass, peak, width)
        belongs = shape / (shape + (1 - signal) * flat)
        weight = belongs / (1 + (2 * (mass - peak) / width) ** 2)
        peak = float(np.average(mass, weights=weight))
        width = max(NARROWEST_GEV, float(2 * np.sqrt(2 * np.sum(weight * (mass - peak) ** 2) / belongs.sum())))
        signal = float(belongs.mean())
    # For this shape, both the place and the half width are known to half width * sqrt(2 / pairs).
    error = width / 2 * np.sqrt(2 / belongs.sum())
    return Peak(peak, float(error), width, float(2 * error), signal, len(mass), window)


def draw(mass: Floats, peak: Peak, path: Path) -> None:
    from matplotlib.figure import Figure  # a second of imports, after the numbers are safe

    low, high = peak.window
    edges = np.arange(low, high + BIN_GEV / 2, BIN_GEV)
    counts, _ = np.histogram(mass, bins=edges)
    centres = (edges[:-1] + edges[1:]) / 2
    filled = counts > 0  # an empty bin has no error of its own to draw
    fine = np.linspace(low, high, 1200)
    curve = peak.density(fine) * BIN_GEV

    figure = Figure(figsize=(8, 5.6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.errorbar(
        centres[filled], counts[filled], yerr=np.sqrt(counts[filled]), xerr=BIN_GEV / 2, fmt="o",
        color="black", markersize=4.5, linewidth=1, label=f"data: {len(mass)} pairs", zorder=3,
    )  # fmt: skip
    axes.plot(fine, curve, color="#08519c", linewidth=1.8, label="fit: Breit-Wigner + constant")
    axes.fill_between(fine, curve, color="#c6dbef", linewidth=0)
    axes.vlines(peak.mass, 0, curve.max(), color="#08519c", linewidth=1, linestyle=":")

    axes.annotate(
        f"$m$ = {peak.mass:.2f} ± {peak.mass_error:.2f} GeV\n$Γ$ = {peak.width:.2f} ± {peak.width_error:.2f} GeV",
        xy=(peak.mass, curve.max()), xytext=(0.63, 0.84), textcoords="axes fraction", fontsize=14, color="#08519c",
        arrowprops={"arrowstyle": "-", "color": "#08519c", "linewidth": 1, "shrinkA": 8, "shrinkB": 2},
    )  # fmt: skip
    notes = ["$Γ$ includes the detector's resolution", "two global muons of opposite charge"]
    for line, note in enumerate(notes):
        axes.text(0.63, 0.78 - 0.045 * line, note, transform=axes.transAxes, fontsize=9.5, color="#555555")
    axes.set_title("CMS Open Data", loc="left", fontsize=14, fontweight="bold")
    axes.set_title(r"$pp$ collisions, $\sqrt{s}$ = 7 TeV, 2010", loc="right", fontsize=11)
    axes.set_xlabel("invariant mass of the muon pair, $m_{μμ}$ [GeV]", fontsize=13)
    axes.set_ylabel(f"pairs / {BIN_GEV:g} GeV", fontsize=13)
    axes.set_xlim(low, high)
    axes.set_ylim(0, 1.2 * max(curve.max(), counts.max(), 1))
    axes.minorticks_on()
    axes.tick_params(direction="in", which="both", top=True, right=True, labelsize=11)
    axes.legend(frameon=False, loc="upper left", fontsize=11)
    figure.savefig(path, metadata={"Software": None})  # the library's version would be in there


if __name__ == "__main__":
    main()
