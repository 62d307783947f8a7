"""Figures for notebooks and reports. Nothing else in the library imports this module."""

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_rgb
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


def spread_curves(axes: Axes, x: Tensor, curves: dict[str, Tensor]) -> None:
    """One line a name, the mean of its curves (S, n) over S seeds, and a band from the lowest to the highest.

    x: (n,). Values that are nan are left out of means and bands; a name keeps its colour and mark in every figure
    of as many names.
    """
    for (name, curve_Sn), colour, mark in zip(curves.items(), _BASE, "os^Dv*PX"):
        known = ~curve_Sn.isnan().all(0)
        points, kept_Sn = x[known].numpy(), curve_Sn[:, known].detach().float()
        axes.plot(points, kept_Sn.nanmean(0).numpy(), color=colour, marker=mark, markersize=4, label=name)
        if len(kept_Sn) > 1:
            low, high = (np.nanquantile(kept_Sn.numpy(), q, axis=0) for q in (0, 1))
            axes.fill_between(points, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


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
    axes.set_ylim(0, 110)  # room for the legend
    axes.legend(frameon=False, ncols=min(4, len(methods)), loc="upper center", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def segmentation_figure(
    image_3HW: Tensor,
    label_HW: Tensor,
    names: tuple[str, ...],
    seen: tuple[str, ...] = (),
    columns: int = 2,
    most: int = 15,
) -> Figure:
    """A picture, and its label map laid over it; the largest `most` classes are named with their share in per cent.

    Shapes: image (3, H, W) in [0, 1], labels (H, W) indices into names. Names outside `seen` are marked with *.
    columns: 1 for narrow screens.
    """
    image_3HW, label_HW = _for_screen(image_3HW, label_HW)
    share_K = torch.bincount(label_HW.flatten(), minlength=len(names)) * (100 / label_HW.numel())
    largest = share_K.argsort(descending=True, stable=True)
    named = [k for k in largest.tolist() if share_K[k] > 0][:most]
    # Up to 16 names each keeps its colour from picture to picture; of more, the largest get one each.
    colours = class_colours(16)
    colour = {k: colours[k if len(names) <= 16 else i] for i, k in enumerate(named)}
    table = np.tile(to_rgb("#FFFFFF"), (len(names), 1))
    table[list(colour)] = [to_rgb(c) for c in colour.values()]
    H, W = label_HW.shape
    columns = columns if W <= 1.6 * H else 1
    width = 7.6 if columns == 2 else 4.6
    height = width / columns * min(1.6, H / W) * (2 / columns)
    legend_rows = -(-(len(named) + 1) // (2 * columns))
    size = (width, height + 0.6 / columns + 0.2 * legend_rows + 0.1)
    figure, axes = plt.subplots(2 // columns, columns, figsize=size, layout="constrained")
    # Enlarged, pixels stay squares.
    interpolation = "nearest" if max(H, W) < 300 else "antialiased"
    axes[0].imshow(image_3HW.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation=interpolation)
    axes[0].set_axis_off()
    axes[0].set_title("picture")
    grey_HW1 = image_3HW.mean(0)[..., None].numpy()  # the picture's own colours would change those of the classes
    shade = 0.35 * grey_HW1 + 0.65 * table[label_HW.numpy()]
    axes[1].imshow(shade.clip(0, 1), interpolation=interpolation)
    axes[1].set_axis_off()
    axes[1].set_title(f"{int((share_K > 0).sum())} of {len(names)} classes found")
    handles = [Patch(color=colour[k], label=f"{_short(names[k], names[k] in seen)} {share_K[k]:.0f} %") for k in named]
    if rest := 100 - float(share_K[named].sum()):
        if rest >= 0.5:
            handles.append(Patch(facecolor="white", edgecolor="grey", label=f"others {rest:.0f} %"))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(2 * columns, len(handles)), fontsize=8, frameon=False
    )
    plt.close(figure)  # a notebook then shows it once, as the value of its cell
    return figure


def heat_figure(image_3HW: Tensor, heat_Khw: Tensor, names: list[str], columns: int = 3) -> Figure:
    """One map of probabilities a class, (K, h, w), all in one colour scale from 0 to the highest."""
    H, W = image_3HW.shape[1:]
    columns = min(len(names), columns if W <= 2 * H else 1)
    rows = -(-len(names) // columns)
    width = 2.2 if columns > 1 else 4.0
    figure, axes = plt.subplots(
        rows, columns, figsize=(width * columns + 0.8, (width * min(1.8, H / W) + 0.3) * rows), layout="constrained",
        squeeze=False,
    )  # fmt: skip
    top = max(float(heat_Khw.max()), 1e-3)
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, heat_hw, name in zip(axes.flat, heat_Khw, names):
        drawn = ax.imshow(heat_hw.numpy(), vmin=0, vmax=top, cmap="viridis", extent=(0, W, H, 0))
        ax.set_title(f"{_short(name, True)}: up to {float(heat_hw.max()):.2f}", fontsize=9)
    figure.colorbar(drawn, ax=axes, label="probability", fraction=0.04, pad=0.02)
    plt.close(figure)
    return figure


def _short(name: str, seen: bool, most: int = 24) -> str:
    return (name if len(name) <= most else name[: most - 1] + "…") + ("" if seen else "*")


def _for_screen(image_3HW: Tensor, label_HW: Tensor, longest: int = 1200) -> tuple[Tensor, Tensor]:
    """Every n-th pixel of pictures that no screen shows whole."""
    step = -(-max(label_HW.shape) // longest)
    return image_3HW[:, ::step, ::step], label_HW[::step, ::step]


def difference_rows(axes: Axes, rows: list[tuple[str, tuple | None]], colour: str = SEEN_COLOUR) -> None:
    """One line a row: a paired difference's mean and interval (spread.Difference), filled where it leaves out zero.

    Rows without a difference are the baseline: a mark on zero.
    """
    axes.axvline(0, color=NEUTRAL, linewidth=1)
    for y, (_, change) in enumerate(rows):
        if change is None:
            axes.plot(0, y, "|", color="black", markersize=12)
            continue
        axes.plot([change.low, change.high], [y, y], color=colour, linewidth=1.5)
        axes.plot(change.mean, y, "o", color=colour, markersize=6, markerfacecolor=colour if change.clear else "white")
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.spines[["top", "right"]].set_visible(False)
