"""Figures for notebooks and reports. Nothing else in the library imports this module."""

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from .splits import Split

# Okabe and Ito's eight colours, which colour-blind readers can tell apart, then lighter ones of the same hues.
_BASE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#555555")
_LIGHT = ("#7FB8D8", "#F2CF7F", "#7FCEB9", "#E5BCD3", "#2F6F93", "#8A3D00", "#9A9100", "#B0B0B0")
SEEN_COLOUR, UNSEEN_COLOUR, NEUTRAL = _BASE[0], _BASE[5], "#555555"
METHOD_COLOURS = {
    "dense_clip": "#BBBBBB",
    "patch_tokens": "#777777",
    "zegclip": _BASE[1],
    "spt_seg": _BASE[0],
    "supervised": _BASE[2],
    "spt_seg transductive": _BASE[4],
    "zegclip transductive": _BASE[6],
}


def class_colours(classes: int) -> list[str]:
    """One colour a class; beyond 16 they are drawn from an evenly spaced map."""
    if classes <= 16:
        return list((*_BASE, *_LIGHT)[:classes])
    return [plt.cm.turbo(i / (classes - 1)) for i in range(classes)]


def show_image(axes: Axes, image_3HW: Tensor, title: str = "") -> None:
    """Draw an image with values in [0, 1]: (3, H, W)."""
    axes.imshow(image_3HW.detach().cpu().permute(1, 2, 0).clamp(0, 1).numpy())
    axes.set_title(title)
    axes.set_axis_off()


def show_labels(axes: Axes, label_HW: Tensor, split: Split, title: str = "", legend: bool = False) -> None:
    """Draw a label map (H, W) in class colours, ignored pixels (255) white.

    With a legend, the classes in it are named below the picture, unseen ones marked with *.
    """
    colours = class_colours(len(split.classes))
    label = label_HW.cpu().numpy().astype(int)
    axes.imshow(
        np.ma.masked_equal(label, 255), cmap=ListedColormap(colours), vmin=-0.5, vmax=len(colours) - 0.5,
        interpolation="nearest",
    )  # fmt: skip
    axes.set_title(title)
    axes.set_xticks([])
    axes.set_yticks([])
    if legend:
        ids = [k for k in np.unique(label) if k != 255]
        names = [split.classes[k] + ("*" if split.classes[k] in split.unseen else "") for k in ids]
        handles = [Patch(color=colours[k], label=name) for k, name in zip(ids, names)]
        axes.legend(
            handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=2, fontsize=7, frameon=False
        )


def show_heat(axes: Axes, heat_hw: Tensor, title: str = "", symmetric: bool = False) -> None:
    """Draw a map of values (h, w); `symmetric` puts zero in the middle of a diverging map."""
    heat = heat_hw.detach().float().cpu().numpy()
    top = np.abs(heat).max() if symmetric else None
    drawn = axes.imshow(heat, cmap="RdBu_r" if symmetric else "viridis", vmin=-top if symmetric else None, vmax=top)
    axes.figure.colorbar(drawn, ax=axes, fraction=0.046, pad=0.03)
    axes.set_title(title)
    axes.set_xticks([])
    axes.set_yticks([])


def log_spectrum(image_hw: Tensor) -> Tensor:
    """log10(1 + |F|) with zero frequency in the middle: real (h, w) -> (h, w)."""
    return torch.fft.fftshift(torch.fft.fft2(image_hw.float(), norm="ortho").abs()).log1p() / np.log(10)


def method_name(run: dict) -> str:
    """How a run is called in figures: its method, with "transductive" after it, or "supervised" for the ceiling."""
    if run["setting"] == "transductive":
        return f"{run['method']} transductive"
    return "supervised" if run["setting"] == "supervised" else run["method"]


def score_bars(runs: list[dict], scores: tuple[str, ...] = ("mIoU_seen", "mIoU_unseen", "hIoU")) -> Figure:
    """Bars of the reported scores a method, in per cent: the mean over its seeds, each seed a dot."""
    kept = [run for run in runs if run.get("reported", True)]
    methods = list(dict.fromkeys(method_name(run) for run in kept))
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    width = 0.8 / len(methods)
    for m, method in enumerate(methods):
        own = [run for run in kept if method_name(run) == method]
        for s, score in enumerate(scores):
            values = [run[score] for run in own if run[score] is not None]
            if not values:
                continue
            x = s + (m - (len(methods) - 1) / 2) * width
            colour = METHOD_COLOURS.get(method, NEUTRAL)
            axes.bar(x, np.mean(values), width * 0.9, color=colour, label=method if s == 0 else None)
            axes.text(x, np.mean(values) + 1, f"{np.mean(values):.0f}", ha="center", fontsize=8)
            if len(values) > 1:
                axes.plot([x] * len(values), values, "k.", markersize=4)
    axes.set_xticks(range(len(scores)), [score.replace("_", " ") for score in scores])
    axes.set_ylabel("per cent")
    axes.set_ylim(0, 100)
    axes.legend(frameon=False, ncols=len(methods), loc="upper center", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
