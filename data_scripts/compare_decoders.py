"""Split against balanced frequencies: SPT-SEG's decoder, the same with a shortcut, and the one with SPANet's mixer.

    python data_scripts/compare_decoders.py --form short

A study of `spt_seg`, `spt_shortcut` and `spt_balanced`: trained alike on ShapeScenes with several seeds, γ of each
chosen on validation scenes. Runs that are under --root already are not trained again. Scores, what the decoders cost
and the transfer functions of prompts and decoder branches, before and after training, go to the results file.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

from sptseg_lib.checkpoint import load_segmenter
from sptseg_lib.clip.load import load_clip
from sptseg_lib.clip.text import class_text
from sptseg_lib.cost.count import count_cost
from sptseg_lib.data import VALIDATION_SEED
from sptseg_lib.decoder import Shortcut
from sptseg_lib.frequency import transfers_inside
from sptseg_lib.model import Segmenter, build_segmenter
from sptseg_lib.results import write_results
from sptseg_lib.scenes.atlas import CLASSES
from sptseg_lib.scenes.render import SceneSettings, render_scenes
from sptseg_lib.settings import TrainSettings, project_root
from sptseg_lib.spectral.hilo import FrequencyAttention
from sptseg_lib.study import FORMS, Variant, run_study

RESULTS = Path(__file__).resolve().parents[1] / "notebooks" / "results" / "balanced_decoder.json"
VARIANTS = [Variant(method, {"method": method}) for method in ("spt_seg", "spt_shortcut", "spt_balanced")]
BINS = 8


def decoder_cost(settings: TrainSettings) -> dict:
    """Parameters and multiply-adds of a method's decoder, for one image."""
    segmenter = build_segmenter(settings.model(), load_clip())
    joint, grid = segmenter.encoder.backbone.joint, settings.model().grid
    cost = count_cost(segmenter.decoder, (1, grid, grid, joint), (1, joint), (len(CLASSES), joint))
    return {
        "trained_parameters": sum(p.numel() for p in segmenter.trainable().values()),
        "decoder_parameters": cost.parameters,
        "decoder_multiply_adds": cost.multiply_adds,
        "decoder_multiply_adds_with_ffts": cost.multiply_adds_with_ffts,
    }


def spectral_parts(segmenter: Segmenter) -> dict[str, nn.Module]:
    """The parts of a segmenter that mix patches by frequency, by name."""
    parts = {f"prompt {i}": prompt for i, prompt in enumerate(segmenter.encoder.spectral, 1)}
    for layer, attention in enumerate(segmenter.decoder.attentions, 1):
        whole = attention.frequencies
        branch = whole.branch if isinstance(whole, Shortcut) else whole
        parts[f"decoder {layer}"] = whole
        if isinstance(branch, FrequencyAttention):
            parts |= {f"decoder {layer} high heads": branch.high, f"decoder {layer} low heads": branch.low}
        else:
            parts[f"decoder {layer} SPAM"] = branch
    return parts


def gains(segmenter: Segmenter, size: int, images: int) -> dict[str, list]:
    """Gain of each part at zero frequency and in each bin, on validation scenes; None: the grid has no such wave."""
    image_B3HW = render_scenes(torch.arange(images), SceneSettings(size=size), VALIDATION_SEED).image_B3HW
    text_KE = class_text(load_clip(), CLASSES)
    found = transfers_inside(segmenter.eval(), spectral_parts(segmenter), image_B3HW, text_KE, bins=BINS)
    return {
        name: [None if gain.isnan() else float(f"{gain:.3g}") for gain in transfer.kept]
        for name, transfer in found.items()
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", choices=list(FORMS), default="short")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=8, help="scenes that layers are measured on")
    parser.add_argument("--workers", type=int, default=0, help="runs at once; 0: as many as fit")
    parser.add_argument("--root", type=Path, default=project_root() / "runs" / "study")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    form, seeds = FORMS[options.form], range(options.seeds)
    study = run_study(VARIANTS, list(seeds), form, options.root, options.workers)
    cost, measured = {}, {}
    for variant in VARIANTS:
        cost[variant.name] = decoder_cost(variant.settings(form, 0))
        measured[variant.name] = []
        for seed, run in zip(seeds, study[variant.name]):
            settings = variant.settings(form, seed)
            torch.manual_seed(seed)
            fresh = build_segmenter(settings.model(), load_clip())
            (folder,) = (options.root / run["key"] / "train").iterdir()
            states = {"untrained": fresh, "trained": load_segmenter(folder)[0]}
            measured[variant.name].append(
                {state: gains(segmenter, settings.size, options.images) for state, segmenter in states.items()}
            )
    write_results(options.results, study, options.form, bins=BINS, cost=cost, gains=measured)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
