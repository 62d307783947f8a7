"""Training through Lightning: resumable, checked, and the trained parameters alone in the checkpoint."""

import logging
import signal
import warnings
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from .checkpoint import SETTINGS, WEIGHTS, load_trained, read_settings, save_checkpoint, write_settings
from .clip.load import Clip, load_clip
from .clip.text import class_text
from .data import Batch, split_for, train_loader
from .disk import check_room
from .model import Segmenter, build_segmenter
from .precision import backbone_dtype, find_device
from .scenes.render import SceneSettings
from .settings import TrainSettings
from .splits import Split
from .transductive import label_unseen

RESUME = "last.ckpt"
# Lightning greets every run with a list of the accelerators that are not there.
logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)


def learning_rate_factor(step: int, warmup: int, steps: int, power: float = 0.9, floor: float = 1e-6) -> float:
    """Linear warm-up from a ratio of 1e-6, then (1 − t)^0.9 down to 1e-6; 1 is the peak rate."""
    if step < warmup:
        return floor + (1 - floor) * step / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (1 - floor) * (1 - done) ** power


def parameter_groups(segmenter: Segmenter, weight_decay: float) -> list[dict]:
    """AdamW's groups: weight decay on all trained parameters but those of norms."""
    named = segmenter.trainable()
    norms = {name for name in named if "norm" in name}
    return [
        {"params": [p for name, p in named.items() if name not in norms], "weight_decay": weight_decay},
        {"params": [p for name, p in named.items() if name in norms], "weight_decay": 0.0},
    ]


class SegmentationTraining(L.LightningModule):
    """Losses, optimiser and schedule. Text embeddings of the training classes are given, computed once."""

    strict_loading = False  # the backbone is not in checkpoints

    def __init__(
        self, segmenter: Segmenter, class_text_KE: Tensor, settings: TrainSettings, unseen_ids: tuple[int, ...] = ()
    ):
        super().__init__()
        self.segmenter, self.settings = segmenter, settings
        self.unseen_ids = unseen_ids  # whose pixels get pseudo labels; none but in the transductive setting
        self.register_buffer("class_text_KE", class_text_KE, persistent=False)

    def training_step(self, batch: Batch, _) -> Tensor:
        # Dropout depends on seed and step alone, so that a resumed run draws what an unbroken one would.
        torch.manual_seed(self.settings.seed * 1_000_003 + self.global_step)
        label_BHW = batch.label_BHW
        if self.unseen_ids:
            label_BHW = label_unseen(self.segmenter, batch.image_B3HW, label_BHW, self.class_text_KE, self.unseen_ids)
        losses = self.segmenter.loss(batch.image_B3HW, label_BHW, self.class_text_KE)
        loss = losses["loss"]
        if not torch.isfinite(loss):
            saved = self.settings.folder / "train" / self.settings.name / RESUME
            kept = f"the last good ones are in {RESUME}" if saved.is_file() else "none had been saved yet"
            raise RuntimeError(
                f"The loss is {loss.item()} at iteration {self.global_step}. Training on would destroy the weights; "
                f"{kept}. Start over in another run_dir with a lower learning_rate (now {self.settings.learning_rate})."
            )
        self.log_dict({name: value.detach() for name, value in losses.items()}, prog_bar=True)
        self.log("learning_rate", self.optimizers().param_groups[0]["lr"])
        return loss

    def configure_optimizers(self):
        groups = parameter_groups(self.segmenter, self.settings.weight_decay)
        optimiser = torch.optim.AdamW(groups, lr=self.settings.learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: learning_rate_factor(step, self.settings.warmup, self.settings.iterations)
        )
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        kept = {f"segmenter.{name}" for name in self.segmenter.trainable()}
        checkpoint["state_dict"] = {name: t for name, t in checkpoint["state_dict"].items() if name in kept}


def check_run(folder: Path, settings: TrainSettings) -> None:
    """Raises ValueError that names the settings in which a run already in the folder differs."""
    if not (folder / SETTINGS).is_file():
        return
    there, wanted = (x.model_dump(mode="json") for x in (read_settings(folder), settings))
    loose = {"devices", "save_every", "run_dir"}  # what a resumed run may change
    odd = [f"{k}={there[k]!r}, not {v!r}" for k, v in wanted.items() if k not in loose and there[k] != v]
    if odd:
        raise ValueError(
            f"{folder} holds a run with {'; '.join(odd)}. Resuming would mix two runs; choose another run_dir, "
            "or delete that folder."
        )


def check_start(settings: TrainSettings, split: Split) -> None:
    """Raises FileNotFoundError or ValueError where a transductive run has no inductive one to go on from."""
    folder = settings.start_folder
    if not split.unseen:
        raise ValueError(
            f"Split {split.name!r} has no unseen class. Transductive training would label nothing itself; "
            "choose the supervised setting."
        )
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(
            f"Transductive training starts from a finished inductive run, and {folder} holds none. Its first pseudo "
            "labels would be random; train with setting 'inductive' first, or name its folder with start."
        )
    there = read_settings(folder)
    for name, found, wanted in (
        ("setting", there.setting, "inductive"),
        ("dataset", there.dataset, settings.dataset),
        ("split", there.split, settings.split),
        ("model", there.model(), settings.model()),
    ):
        if found != wanted:
            raise ValueError(
                f"{folder} was trained with another {name} ({found}, not {wanted}). Its weights would not fit, or know "
                "unseen classes already; choose the inductive run of the same experiment."
            )


def fit(
    settings: TrainSettings, clip: Clip | None = None, scenes: SceneSettings | None = None, progress: bool = True
) -> Path:
    """Train one run and return its folder, `<run_dir>/train/<method>-<setting>-seed<seed>`.

    A run that is already finished is not repeated; an interrupted one goes on from its last
    checkpoint. Writes checkpoint.safetensors (trained parameters), settings.json, log/metrics.csv and
    last.ckpt (for resuming). Raises: ValueError for settings that cannot be; RuntimeError for a loss
    that is not finite.
    """
    folder = settings.folder / "train" / settings.name
    split = split_for(settings.dataset, settings.split)
    loader = train_loader(settings, split, scenes)
    check_run(folder, settings)
    if (folder / WEIGHTS).is_file():
        return folder
    if settings.setting == "transductive":
        check_start(settings, split)
    check_room(folder, 200_000_000)
    model = settings.model()
    clip = clip or load_clip(*model.clip_source)
    device = find_device()
    # After load_clip, which draws random numbers in its first call in a process and in no later one.
    L.seed_everything(settings.seed, verbose=False)
    segmenter = build_segmenter(model, clip, backbone_dtype(settings.precision, device))
    names = split.seen if settings.setting == "inductive" else split.classes
    write_settings(folder, settings)  # only now that nothing about them is wrong
    unseen_ids = split.unseen_ids if settings.setting == "transductive" else ()
    training = SegmentationTraining(segmenter, class_text(clip, names, model.prompt), settings, unseen_ids)
    callbacks = [ModelCheckpoint(folder, save_last=True, save_top_k=0, every_n_train_steps=settings.save_every)]
    if progress:
        callbacks.append(TQDMProgressBar(refresh_rate=10))
    trainer = L.Trainer(
        accelerator=device if device == "cpu" else "gpu",
        devices=settings.devices,
        max_epochs=1,
        gradient_clip_val=1.0,
        logger=CSVLogger(folder, name="", version="log"),
        log_every_n_steps=min(10, settings.iterations),
        callbacks=callbacks,
        enable_progress_bar=progress,
        enable_model_summary=False,
        use_distributed_sampler=True,
    )
    resume = folder / RESUME
    if resume.is_file():
        done = torch.load(resume, map_location="cpu", weights_only=True)["global_step"]
        loader.dataset.first = done * settings.batch  # Lightning would start the data anew
    elif settings.setting == "transductive":
        load_trained(segmenter, settings.start_folder / WEIGHTS)
    else:
        segmenter.eval().open_gates(next(iter(loader)).image_B3HW)
    training.train()
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        with warnings.catch_warnings():
            # Lightning's own use of a torch function that torch is retiring: nothing that a user could change.
            warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
            trainer.fit(training, loader, ckpt_path=resume if resume.is_file() else None, weights_only=True)
    except SystemExit:  # Lightning turns Ctrl+C into an exit, and leaves further ones ignored
        signal.signal(signal.SIGINT, on_interrupt)
        raise KeyboardInterrupt from None
    save_checkpoint(folder, segmenter, settings)
    resume.unlink(missing_ok=True)
    return folder
