"""The rows of the ablation tables: the paper's tables 2 to 4, what it leaves out, and where its code departs."""

from typing import NamedTuple

from .study import Variant


class Row(NamedTuple):
    """A table's row: what it changes in SPT-SEG, and the paper's mIoU(S), mIoU(U), hIoU on VOC where it has them."""

    table: str
    label: str
    changes: dict
    published: tuple[float, float, float] | None = None

    @property
    def variant(self) -> Variant:
        return Variant(f"{self.table} · {self.label}", self.changes)


def _model(**overrides) -> dict:
    return {"overrides": overrides}


def ablation_rows(layers: int) -> list[Row]:
    """All rows, for a backbone of this many layers (tiny CLIP 6, ViT-B/16 12). The first is the baseline of all others.

    Depths are shares of the backbone: the paper's 1-6, 6-12 and 11-12 of 12 layers are 1-3, 3-6 and 5-6 of 6.
    """
    half = layers // 2

    def depth(first: int, last: int) -> dict:
        return _model(spectral_layers=list(range(first, last + 1)))

    ours = (92.9, 87.4, 90.1)
    return [
        Row("Table 2", "baseline + SPT + SGD", {}, ours),
        Row("Table 2", "baseline", {"method": "zegclip"}, (91.9, 77.8, 84.3)),
        Row("Table 2", "baseline + SPT", {"method": "zegclip_spt"}, (92.6, 86.7, 89.6)),
        Row("Table 2", "baseline + SGD", {"method": "zegclip_sgd"}, (92.0, 79.9, 85.5)),
        Row("Table 3", "layers 1-2", {}, ours),
        Row("Table 3", f"layers 1-{half}", depth(1, half), (92.5, 86.4, 89.3)),
        Row("Table 3", f"layers {half}-{layers}", depth(half, layers), (92.1, 80.9, 86.1)),
        Row("Table 3", f"layers 1-{layers}", depth(1, layers), (92.6, 86.5, 89.4)),
        Row("Table 3", f"layers {layers - 1}-{layers}", depth(layers - 1, layers), (92.0, 78.3, 84.6)),
        Row("Table 4", "1 decoder layer", _model(decoder_layers=1), (91.9, 82.8, 87.1)),
        Row("Table 4", "3 decoder layers", {}, ours),
        Row("Table 4", "5 decoder layers", _model(decoder_layers=5), (92.2, 83.7, 87.7)),
        *(Row("Prompt tokens", f"M = {m}", _model(prompt_tokens=m) if m != 10 else {}) for m in (0, 5, 10, 20)),
        *(
            Row("High heads", f"{round(8 * a)} of 8 high", _model(alpha=a) if a != 0.125 else {})
            for a in (0.0, 0.125, 0.5, 1.0)
        ),
        *(Row("Window", f"{w} × {w}", _model(window=w) if w != 3 else {}) for w in (2, 3, 6)),
        Row("Filters", "one per layer", {}),
        Row("Filters", "one shared", _model(spectral_shared=True)),
        Row("Gate", "on", {}),
        Row("Gate", "off", _model(gate=False)),
        Row("Loss", "focal", _model(ssim_weight=0.0)),
        Row("Loss", "focal + SSIM", {}),
        Row("Loss", "focal + dice", _model(ssim_weight=0.0, dice_weight=1.0)),
        Row("Loss", "focal + SSIM + dice", _model(dice_weight=1.0)),
        Row("As released", "as in the paper", {}),
        Row("As released", "α counts low heads", _model(alpha_side="low")),
        Row("As released", "SSIM on logits", _model(ssim_on="logits")),
        Row("As released", "class embedding twice", _model(class_token_twice=True)),
        Row("As released", "no high projection", _model(high_projection=False)),
        Row("As released", "ImageNet normalisation", _model(normalisation="imagenet")),
        Row("As released", "all of these", {"method": "spt_seg_released"}),
        Row("Ignored pixels", "negatives (as released)", {}),
        Row("Ignored pixels", "left out", _model(ignored="left out")),
    ]
