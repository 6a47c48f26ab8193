"""The demo's picture: loss and accuracy over time, and where the time of streaming went."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from pathlib import Path

COLOURS = ("#0072b2", "#d55e00")  # told apart by colour-blind readers too
STAGES = (
    ("planning", "plan_ns", "#999999"),
    ("reading files", "fetch_ns", "#999999"),
    ("decoding", "decode_ns", "#999999"),
    ("consumer waiting", "consumer_wait_ns", "#d55e00"),
)


def save_picture(path: Path, curves, guess: float, stream: dict[str, float]) -> Path:
    """Draw the training curves and the stage times; return where the picture is."""
    figure, (loss, accuracy, stages) = plt.subplots(1, 3, figsize=(13, 3.8), width_ratios=[1, 1, 1.15])
    for curve, colour in zip(curves, COLOURS, strict=False):
        loss.plot(curve.seconds, curve.loss, color=colour, marker=".", label=curve.name)
        accuracy.plot(curve.seconds, curve.accuracy, color=colour, marker=".", label=curve.name)
    accuracy.axhline(guess, color="#666666", linestyle=":", label="commonest type")
    loss.set(title="Loss on training cells", xlabel="seconds of training", ylabel="cross entropy", ylim=(0, None))
    accuracy.set(title="Accuracy on held-out cells", xlabel="seconds of training", ylim=(0, 1))
    loss.legend(frameon=False)
    accuracy.legend(frameon=False, loc="lower right")

    seconds = [stream[key] / 1e9 for _, key, _ in STAGES]
    stages.axvline(stream["seconds"], color="black", linestyle="--", linewidth=1, zorder=1)
    bars = stages.barh([name for name, _, _ in STAGES], seconds, color=[colour for _, _, colour in STAGES])
    stages.bar_label(bars, fmt="%.2f s", padding=4, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
    stages.annotate(" whole pass", (stream["seconds"], 0.02), xycoords=("data", "axes fraction"), fontsize=9)
    stages.invert_yaxis()
    stages.set(
        title=f"{stream['cells']:,} cells streamed: {stream['cells'] / stream['seconds']:,.0f} cells/s",
        xlabel="seconds, summed over threads",
        xlim=(0, 1.25 * max([*seconds, stream["seconds"]])),
    )
    for axes in (loss, accuracy, stages):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
