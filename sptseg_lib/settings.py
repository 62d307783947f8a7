"""Every setting, its default and its reason. Frozen, checked, and the same in notebooks, pipelines and code."""

from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class Settings(BaseModel):
    """Settings refuse names that they do not know: a misspelt one would change nothing, in silence."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSettings(Settings):
    """What the model is. The defaults are the paper's, where it gives them."""

    clip: str = Field("sptseg-tiny", description="open_clip model name, or sptseg-tiny, which is in the package")
    weights: str | None = Field(
        None, description="a path, an open_clip pretrained tag, or 'random'; None: those of sptseg-tiny"
    )
    activation: Literal["gelu", "quickgelu"] | None = Field(
        None, description="what a bare weight file was trained with; tags and OpenAI's files say it themselves"
    )
    normalisation: Literal["model", "imagenet"] = Field(
        "model",
        description="pixel mean and deviation: what CLIP was trained with, or ImageNet's as in the released recipe",
    )
    grid: int = Field(16, ge=1, description="patches along a side of a training image: the spectral weight's own size")
    prompt: str = Field("a photo of a {}", description="text around a class name, or 'ensemble' for the 15 templates")

    prompt_tokens: int = Field(10, ge=0, description="M, learned tokens before every layer; 0 leaves VPT out")
    spectral_layers: tuple[int, ...] = Field((1, 2), description="layers, from 1, whose patches get a spectral prompt")
    spectral_shared: bool = Field(False, description="one spectral weight for all those layers, as released")
    prompt_basis: Literal["fourier", "graph"] = Field(
        "fourier", description="eq. 1's basis: Fourier's, or Laplacian eigenvectors of the image's own patch graph"
    )
    graph_modes: int = Field(16, ge=2, description="eigenvectors of a graph basis, smoothest first")
    class_token_twice: bool = Field(False, description="add the class embedding twice, as the released encoders do")

    train_backbone: bool = Field(False, description="train CLIP's image encoder too, a copy of it, in float32")
    backbone_rate: float = Field(
        0.1, gt=0, description="its share of the learning rate: the published recipe gives ten times to what is new"
    )

    decoder: Literal["spectral", "cross", "balanced", "cosine", "probe", "projection"] = Field(
        "spectral",
        description="SPT-SEG's decoder, ZegCLIP's, or SPT-SEG's with SPANet's mixer for its heads; or none: the cosine "
        "of patch and class text, a linear probe that starts there, or SPNet's projection",
    )
    balance: tuple[float, ...] = Field((0.7, 0.8, 0.9), min_length=1, description="λ of each gate of that mixer")
    shortcut: bool = Field(False, description="add the patches themselves to what heads or mixer make of them")
    balance_radius: float = Field(2, gt=0, description="its radius of low frequencies, in bins of the patch grid")
    decoder_layers: int = Field(3, ge=1)
    heads: int = Field(8, ge=1)
    alpha: float = Field(0.125, ge=0, le=1, description="share of the heads that `alpha_side` names")
    alpha_side: Literal["high", "low"] = Field(
        "high", description="eq. 4 counts high heads; the released code counts low ones"
    )
    window: int = Field(3, ge=1, description="side of the attention windows, in patches")
    gate: bool = Field(True, description="eq. 7")
    high_projection: bool = Field(True, description="project the high heads' output; the released code never does")
    dropout: float = Field(0.1, ge=0, lt=1)

    focal_weight: float = Field(100.0, ge=0)
    ssim_weight: float = Field(1.0, ge=0)
    dice_weight: float = Field(0.0, ge=0)
    cross_entropy_weight: float = Field(0.0, ge=0, description="softmax over classes; unlabelled pixels never count")
    ssim_on: Literal["probabilities", "logits"] = Field("probabilities", description="logits as released")
    ignored: Literal["negative", "left out"] = Field(
        "negative", description="unlabelled pixels count against every class, as released, or do not count"
    )
    scores: Literal["sigmoid", "softmax"] = Field(
        "sigmoid", description="a class's probability: of its own, or its share among all classes asked for"
    )
    seen_shift: float = Field(0.1, description="γ, taken from every seen class's probability when testing")

    @model_validator(mode="after")
    def _can_be_learned(self):
        own = self.focal_weight or self.ssim_weight or self.dice_weight
        if not own and not self.cross_entropy_weight:
            raise ValueError("every loss weight is 0, so nothing would be learned; give one of them a weight")
        if not own and self.scores == "sigmoid":
            raise ValueError(
                "cross-entropy alone knows logits only against each other, so scores='sigmoid' would mean nothing; "
                "choose scores='softmax'"
            )
        return self

    @property
    def clip_source(self) -> tuple[str, str | None, str | None]:
        """What `load_clip` takes: name, weights and activation."""
        return self.clip, self.weights, self.activation

    @property
    def high_heads(self) -> int:
        """Heads of the high-frequency branch; the counted share is cut off to whole heads, as released."""
        counted = int(self.alpha * self.heads)
        return counted if self.alpha_side == "high" else self.heads - counted


# The differences between the paper and the released code, each a setting of its own.
_RELEASED = {
    "spectral_shared": True,
    "class_token_twice": True,
    "alpha": 0.9,
    "alpha_side": "low",
    "high_projection": False,
    "ssim_on": "logits",
    "normalisation": "imagenet",
}
_ZEGCLIP = {"spectral_layers": (), "decoder": "cross", "ssim_weight": 0.0, "dice_weight": 1.0}
# No decoder, and ZegCLIP's losses: what is left of it when only the encoder is adapted.
_COSINE = {**_ZEGCLIP, "decoder": "cosine"}
_NO_PROMPTS = {"prompt_tokens": 0, "spectral_layers": ()}
_SOFTMAX = {
    "focal_weight": 0.0, "ssim_weight": 0.0, "dice_weight": 0.0, "cross_entropy_weight": 1.0, "scores": "softmax",
}  # fmt: skip

PRESETS: dict[str, dict] = {
    "spt_seg": {},
    "spt_seg_released": _RELEASED,
    "zegclip": _ZEGCLIP,
    # Table 2: the baseline with one ingredient at a time.
    "zegclip_spt": {**_ZEGCLIP, "spectral_layers": (1, 2)},
    "zegclip_sgd": {"spectral_layers": ()},
    # Frequencies balanced instead of split, with SPANet's shortcut; and that shortcut alone, beside the heads.
    "spt_balanced": {"decoder": "balanced", "shortcut": True},
    "spt_shortcut": {"shortcut": True},
    # Ways to adapt CLIP that the paper weighs against: prompts alone, a classifier alone, everything.
    "vpt": _COSINE,
    "linear_probe": {**_COSINE, **_NO_PROMPTS, "decoder": "probe"},
    "full_fine_tuning": {**_COSINE, **_NO_PROMPTS, "train_backbone": True},
    # Earlier peers: SPNet on frozen features (with pseudo="consistent": STRICT), MaskCLIP+ (with pseudo="clip").
    "spnet": {**_NO_PROMPTS, **_SOFTMAX, "decoder": "projection"},
    "maskclip_plus": {**_COSINE, **_SOFTMAX},
}


def one_of(kind: str, name: str, known) -> str:
    """Check a name against those that exist; raises ValueError that lists them and the nearest one."""
    if name not in known:
        near = get_close_matches(name, list(known), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"There is no {kind} {name!r}; nothing would run under that name.{hint} Known: {', '.join(known)}."
        )
    return name


def explain(error: ValidationError) -> str:
    """A pydantic error in one sentence a fault: the name, the value and what is wrong with it."""
    faults = []
    for fault in error.errors():
        name = ".".join(map(str, fault["loc"])) or "settings"
        if fault["type"] == "extra_forbidden":
            faults.append(f"there is no setting {name!r}")
        elif not fault["loc"]:  # of several settings together: the message names them
            faults.append(fault["msg"].removeprefix("Value error, ").removesuffix("."))
        else:
            faults.append(f"{name}={fault['input']!r}: {fault['msg']}")
    return "; ".join(faults)


def preset(name: str, **changes) -> ModelSettings:
    """The model settings of a preset, with changes: `preset("spt_seg", window=2)`.

    Raises: ValueError for an unknown preset, an unknown setting or a value of the wrong type.
    """
    one_of("preset", name, PRESETS)
    for change in changes:
        one_of("model setting", change, ModelSettings.model_fields)
    try:
        return ModelSettings(**{**PRESETS[name], **changes})
    except ValidationError as error:
        raise ValueError(f"These settings cannot be used: {explain(error)}. Correct them before training.") from None


Gammas = Annotated[list[float], Field(min_length=1)]


# How a run is computed, not what: a resumed run may change these, and its results stay comparable.
HOW = frozenset("devices num_nodes strategy num_workers accumulate activation_checkpointing compile save_every".split())


def project_root() -> Path:
    """The checkout: the nearest folder at or above the current one that holds notebooks/pipelines, or the current one.

    Notebooks start in their own folder and pipelines elsewhere; relative paths mean the same in both.
    """
    here = Path.cwd()
    return next((p for p in (here, *here.parents) if (p / "notebooks" / "pipelines").is_dir()), here)


class RunSettings(Settings):
    """What 05_train and 06_evaluate share."""

    run_dir: str = "runs/notebook"
    dataset: str = Field("shapescenes", description="shapescenes, or the folder of a data set in PASCAL VOC's layout")
    split: str = Field("default", description="a name in sptseg_lib.splits.SPLITS")
    size: int = Field(128, ge=8, description="side of an image, or of a sliding window, in pixels")
    batch: int = Field(16, ge=1, description="images of a training iteration, over all devices; at once when testing")
    devices: int = Field(1, ge=1, description="processes on each machine: one a GPU, or CPU processes where none is")
    num_nodes: int = Field(1, ge=1, description="machines")
    strategy: Literal["auto", "ddp", "ddp_notebook"] = Field(
        "auto", description="how processes start; auto: forked in a notebook, from the command line elsewhere"
    )
    num_workers: int = Field(2, ge=0, description="processes a device that read pictures; ShapeScenes need none")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the frozen backbone; auto: bfloat16 where the hardware computes in it"
    )
    seed: int = Field(0, ge=0)

    @property
    def folder(self) -> Path:
        """run_dir, relative paths counted from the checkout."""
        return project_root() / self.run_dir


class TrainSettings(RunSettings):
    """One training run: the parameters of 05_train."""

    method: str = Field("spt_seg", description="a preset")
    setting: Literal["inductive", "transductive", "supervised"] = Field(
        "inductive", description="labels of seen classes only; then also the model's own on unseen pixels; or of all"
    )
    start: str = Field(
        "", description="run folder where transductive training starts; empty: run_dir's inductive run of this seed"
    )
    pseudo: Literal["own", "consistent", "clip"] = Field(
        "own",
        description="labels of unseen pixels in the transductive setting: the model's own; those that it gives in "
        "several views too (STRICT); or training-free CLIP's at the start (MaskCLIP+), from fresh weights",
    )
    overrides: dict = Field(default_factory=dict, description="model settings that differ from the preset's")
    iterations: int = Field(200, ge=1)
    images: int = Field(0, ge=0, description="different training pictures, repeated in new order; 0: all there are")
    seen_classes: int = Field(
        0, ge=0, description="seen classes that keep their labels, drawn by the seed; the others are unseen; 0: all"
    )
    learning_rate: float = Field(2e-3, gt=0, description="peak rate of prompts and decoder; the paper's ViT-B/16: 2e-4")
    warmup: int = Field(50, ge=0, description="iterations of linear warm-up")
    weight_decay: float = Field(0.01, ge=0)
    save_every: int = Field(100, ge=1, description="iterations between checkpoints to resume from")
    accumulate: int = Field(1, ge=1, description="parts in which each device takes its share of the batch")
    activation_checkpointing: bool = Field(False, description="compute layers twice, to keep less in memory")
    compile: bool = Field(False, description="torch.compile the model: minutes at the start, then faster on a GPU")

    @model_validator(mode="after")
    def _model_exists(self):
        model = preset(self.method, **self.overrides)
        if self.pseudo != "own" and self.setting != "transductive":
            raise ValueError(
                f"pseudo={self.pseudo!r} has no meaning in the {self.setting} setting: no pixel gets a pseudo label. "
                "Leave it at 'own', or choose setting 'transductive'."
            )
        if self.seen_classes and self.setting == "supervised":
            raise ValueError(
                f"seen_classes={self.seen_classes} has no meaning in the supervised setting: every class is labelled. "
                "Leave it at 0, or choose setting 'inductive'."
            )
        if self.pseudo == "clip" and model.train_backbone:
            raise ValueError(
                "pseudo='clip' asks CLIP itself for labels, and train_backbone changes it: they would drift with the "
                "model. Choose pseudo='own', or a method that leaves the backbone frozen."
            )
        if self.start and self.setting != "transductive":
            raise ValueError(
                f"start={self.start!r} has no meaning in the {self.setting} setting: it begins with fresh weights. "
                "Leave it empty, or choose setting 'transductive'."
            )
        if self.batch % (self.devices * self.num_nodes * self.accumulate):
            raise ValueError(
                f"batch={self.batch} cannot be shared out among {self.devices} devices on {self.num_nodes} machines in "
                f"{self.accumulate} parts. The global batch would change; choose a multiple of "
                f"{self.devices * self.num_nodes * self.accumulate}."
            )
        return self

    def model(self) -> ModelSettings:
        return preset(self.method, **self.overrides)

    @property
    def name(self) -> str:
        """The run's folder: method, setting and seed."""
        return f"{self.method}-{self.setting}-seed{self.seed}"

    @property
    def start_folder(self) -> Path | None:
        """Where a transductive run finds the inductive one that it goes on from; None: it starts afresh."""
        if self.setting != "transductive" or (self.pseudo == "clip" and not self.start):
            return None
        own = self.folder / "train" / f"{self.method}-inductive-seed{self.seed}"
        return project_root() / self.start if self.start else own


class EvaluateSettings(RunSettings):
    """One evaluation: the parameters of 06_evaluate."""

    scenes: int = Field(100, ge=1, description="held-out ShapeScenes to score")
    gammas: Gammas = Field([0.0, 0.05, 0.1, 0.2, 0.3], description="seen-class shifts of the reported sweep")
    gamma: float = Field(
        0.2, description="the shift whose scores are reported; ShapeScenes: chosen on validation scenes; the paper: 0.1"
    )
    part: Literal["test", "validation"] = Field(
        "test", description="which ShapeScenes; settings are chosen on the latter"
    )
    transfer: dict[str, str] = Field(
        default_factory=dict, description="other data sets to score the same runs on: split name to folder"
    )
    stride: int = Field(0, ge=0, description="pixels between sliding windows; 0: five sixths of a window")
    short_side: int = Field(
        0, ge=0, description="pixels to which a picture's shorter side is resized for testing; 0: as it is"
    )
