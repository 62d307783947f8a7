"""The rows of the ablation tables: the paper's tables 2 to 4, what it leaves out, and where its code departs.

And the paper's claims about them, each a comparison of two rows that can come out against it.
"""

from typing import NamedTuple

from .results import at_gamma, measured
from .spread import Difference, holm, paired_difference, told
from .study import Variant

SCORES = ("mIoU_seen", "mIoU_unseen", "hIoU")
ALIKE = 2.0  # points of mIoU within which two rows are called alike


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


def measured_ablations(
    rows: list[Row], form: str, seeds: int, cache: str, run_dir: str, claim_seeds: int = 0, **shared
) -> dict:
    """`results.measured` for these rows, each with the seeds 0, 1, ...

    claim_seeds: how many for tables 2 to 4, which the paper's claims are about; 0: as many as for the others.
    Raises: ValueError for fewer than two seeds, before anything is trained.
    """
    if seeds < 2:
        raise ValueError(
            f"{seeds} seed(s) make no paired comparison. After all the training no difference could be told from "
            "noise; use two seeds or more, three if you can."
        )
    more = tuple(range(max(seeds, claim_seeds)))
    # SPT-SEG itself stands in every table: with the same seeds everywhere.
    variants = [
        row.variant._replace(seeds=more if row.table.startswith("Table") or not row.changes else ()) for row in rows
    ]
    return measured("ablations", form, variants, range(seeds), cache, run_dir, **shared)


class Claim(NamedTuple):
    """A sentence of the paper: `better` against `worse`, each the name of a row's variant, in one score.

    With `alike`, the claim is that the two differ by no more than ALIKE points.
    """

    text: str
    better: str
    worse: str
    score: str
    alike: bool = False


def claims(layers: int) -> list[Claim]:
    """What the paper says of tables 2 to 4, for a backbone of this many layers."""
    half, table_2, table_3, table_4 = layers // 2, "Table 2 · ", "Table 3 · ", "Table 4 · "
    base, spt, sgd, both = (
        table_2 + row for row in ("baseline", "baseline + SPT", "baseline + SGD", "baseline + SPT + SGD")
    )
    first, early, late, last, every = (
        f"{table_3}layers {a}-{b}" for a, b in ((1, 2), (1, half), (half, layers), (layers - 1, layers), (1, layers))
    )
    return [
        Claim("SPT enhances the baseline on unseen classes", spt, base, "mIoU_unseen"),
        Claim("SGD enhances the baseline", sgd, base, "hIoU"),
        Claim("SPT and SGD together beat the baseline", both, base, "hIoU"),
        Claim("SPT adds to SGD, above all on unseen classes", both, sgd, "mIoU_unseen"),
        Claim("SGD adds to SPT", both, spt, "hIoU"),
        Claim("Spectral prompts in the first two layers beat the last two", first, last, "hIoU"),
        Claim("The first half of the layers beats the last", early, late, "hIoU"),
        Claim("All layers do about as well as the first two", every, first, "hIoU", alike=True),
        Claim("Three decoder layers beat one", table_4 + "3 decoder layers", table_4 + "1 decoder layer", "hIoU"),
        Claim("Three decoder layers beat five", table_4 + "3 decoder layers", table_4 + "5 decoder layers", "hIoU"),
    ]


def difference(variants: dict[str, dict], one: str, other: str, score: str) -> Difference:
    """One variant's score less another's, over the seeds that both have; `variants` as `results.summarise` gives them.

    Raises: ValueError for fewer than two common seeds.
    """
    seeds = [seed for seed in variants[one]["seeds"] if seed in variants[other]["seeds"]]
    values = []
    for name in (one, other):
        of_seed = dict(zip(variants[name]["seeds"], at_gamma(variants[name], score)))
        values.append([of_seed[seed] for seed in seeds])
    return paired_difference(*values)


def verdict(claim: Claim, found: Difference) -> str:
    """ "holds", "does not" or "cannot be told": where the confidence interval of better − worse lies."""
    least, most = (-ALIKE, ALIKE) if claim.alike else (0, float("inf"))
    if least <= found.low and found.high <= most and (claim.alike or found.clear):
        return "holds"
    return "does not" if found.high < least or found.low > most else "cannot be told"


def judge(variants: dict[str, dict], layers: int) -> list[dict]:
    """Every claim that can be compared: text, score, mean difference, interval, seeds and verdict."""
    rows = []
    for claim in claims(layers):
        if claim.better in variants and claim.worse in variants:
            found = difference(variants, claim.better, claim.worse, claim.score)
            seeds = len(set(variants[claim.better]["seeds"]) & set(variants[claim.worse]["seeds"]))
            rows.append({
                "claim": claim.text, "score": claim.score, "difference": found.mean, "low": found.low,
                "high": found.high, "seeds": seeds, "verdict": verdict(claim, found),
            })  # fmt: skip
    return rows


def compare(variants: dict[str, dict], rows: list[Row], score: str = "hIoU") -> list[dict]:
    """The tables' rows that were measured, in order: scores with spread, and what each changes against the first row.

    The baseline of all differences is the first row. p-values are raised for the number of different rows (Holm).
    """
    base = rows[0].variant.name
    found = []
    for row in rows:
        name = row.variant.name
        if name not in variants:
            continue
        own = variants[name]
        change = None if own["test"] == variants[base]["test"] else difference(variants, name, base, score)
        found.append({
            "table": row.table, "row": row.label, "published": row.published, "γ": own["gamma"],
            "seeds": len(own["seeds"]), **{s: told(at_gamma(own, s)) for s in SCORES}, "change": change, "p": None,
        })  # fmt: skip
    changed = [row for row in found if row["change"]]
    for row, p in zip(changed, holm([row["change"].p for row in changed])):
        row["p"] = p
    return found
