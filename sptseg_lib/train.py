"""Training through Lightning: resumable, checked, and the trained parameters alone in the checkpoint."""

import logging
import signal
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader

from .checkpoint import SETTINGS, WEIGHTS, load_trained, read_settings, save_checkpoint, write_settings
from .clip.load import Clip, load_clip
from .clip.text import class_text
from .data import Batch, first_images, split_for, train_loader, training_split
from .disk import check_room
from .distributed import labelled_pixels, present_pairs, same_everywhere
from .model import Segmenter, build_segmenter
from .precision import backbone_dtype, find_device
from .scenes.render import SceneSettings
from .settings import HOW, TrainSettings
from .splits import Split
from .transductive import label_source, label_unseen

RESUME = "last.ckpt"
# Losses that are divided by a count over the batch: (image, present class) pairs, or labelled pixels.
COUNTED = {"focal": present_pairs, "dice": present_pairs, "cross_entropy": labelled_pixels}
# Lightning greets every run with lists of the accelerators that are not there, and of those that are.
for _greeter in ("utilities.rank_zero", "accelerators.cuda"):
    logging.getLogger(f"lightning.pytorch.{_greeter}").setLevel(logging.WARNING)


def learning_rate_factor(step: int, warmup: int, steps: int, power: float = 0.9, floor: float = 1e-6) -> float:
    """Linear warm-up from a ratio of 1e-6, then (1 − t)^0.9 down to 1e-6; 1 is the peak rate."""
    if step < warmup:
        return floor + (1 - floor) * step / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (1 - floor) * (1 - done) ** power


def parameter_groups(segmenter: Segmenter, weight_decay: float, learning_rate: float) -> list[dict]:
    """AdamW's groups: weight decay on all trained parameters but those of norms, a lower rate for the backbone.

    The backbone starts from what it knows: at the rate of what starts from nothing it would lose that first.
    """
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, p in segmenter.trainable().items():
        norm = "norm" in name or ".ln_" in name
        groups.setdefault((name.startswith("encoder.backbone."), norm), []).append(p)
    rates = {False: learning_rate, True: learning_rate * segmenter.settings.backbone_rate}
    return [
        {"params": params, "lr": rates[backbone], "weight_decay": 0.0 if norm else weight_decay}
        for (backbone, norm), params in sorted(groups.items(), key=lambda group: group[0])
    ]


class SegmentationTraining(L.LightningModule):
    """Losses, optimiser and schedule. Text embeddings of the training classes are given, computed once."""

    strict_loading = False  # a frozen backbone is not in checkpoints

    def __init__(
        self, segmenter: Segmenter, class_text_KE: Tensor, settings: TrainSettings, unseen_ids: tuple[int, ...] = ()
    ):
        super().__init__()
        self.segmenter, self.settings = segmenter, settings
        self.unseen_ids = unseen_ids  # whose pixels get pseudo labels; none but in the transductive setting
        self.first_images: Tensor | None = None  # on which the gates are opened; None where they are open
        self.load: Callable[[int, int], DataLoader] | None = None  # batches for (rank, world)
        self.automatic_optimization = False  # Lightning's own accumulation knows nothing of the whole batch
        self.register_buffer("class_text_KE", class_text_KE, persistent=False)

    def train_dataloader(self) -> DataLoader:
        return self.load(self.global_rank, self.trainer.world_size)

    def on_train_start(self) -> None:
        if self.first_images is not None:  # not a run that goes on from a checkpoint
            self.segmenter.eval().open_gates(self.first_images.to(self.device))
            self.segmenter.train()
            self.first_images = None
        same_everywhere(self.segmenter)

    def training_step(self, batch: Batch, _) -> None:
        """One iteration: this device's share of the global batch, in `accumulate` parts.

        Most losses are divided by a count over the whole batch. Each part's own division is undone, so
        that the mean over parts and devices is the loss of the whole batch, and so is its gradient.
        """
        settings, K = self.settings, len(self.class_text_KE)
        # Dropout depends on seed, step and device alone, so that a resumed run draws what an unbroken one would.
        torch.manual_seed(settings.seed * 1_000_003 + self.global_step + 500_009 * self.global_rank)
        label_BHW = batch.label_BHW
        if self.unseen_ids:
            source = label_source(settings.pseudo, self.global_step, settings.iterations)
            label_BHW = label_unseen(
                self.segmenter, batch.image_B3HW, label_BHW, self.class_text_KE, self.unseen_ids, source
            )
        reduce = self.trainer.strategy.reduce
        parts = settings.accumulate * self.trainer.world_size
        mean = {
            count: reduce(count(label_BHW, K), reduce_op="sum").clamp(min=1) / parts
            for count in dict.fromkeys(COUNTED.values())
        }
        total: dict[str, Tensor] = {}
        for part in zip(batch.image_B3HW.chunk(settings.accumulate), label_BHW.chunk(settings.accumulate)):
            losses = self.segmenter.loss(*part, self.class_text_KE)
            del losses["loss"]
            for name in losses.keys() & COUNTED.keys():
                count = COUNTED[name]
                losses[name] = losses[name] * count(part[1], K).clamp(min=1) / mean[count]
            losses["loss"] = sum(losses.values())
            self.manual_backward(losses["loss"] / settings.accumulate)
            for name, value in losses.items():
                total[name] = total.get(name, 0) + value.detach() / settings.accumulate
        logged = dict(zip(total, reduce(torch.stack([*total.values()]), reduce_op="mean")))
        self.check_finite(logged["loss"])
        optimiser = self.optimizers()
        self.log_dict(logged, prog_bar=True)
        self.log("learning_rate", optimiser.param_groups[0]["lr"])
        self.clip_gradients(optimiser, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
        optimiser.step()
        optimiser.zero_grad()
        self.lr_schedulers().step()

    def check_finite(self, loss: Tensor) -> None:
        if torch.isfinite(loss):
            return
        saved = self.settings.folder / "train" / self.settings.name / RESUME
        kept = f"the last good ones are in {RESUME}" if saved.is_file() else "none had been saved yet"
        raise RuntimeError(
            f"The loss is {loss.item()} at iteration {self.global_step}. Training on would destroy the weights; "
            f"{kept}. Start over in another run_dir with a lower learning_rate (now {self.settings.learning_rate})."
        )

    def configure_optimizers(self):
        optimiser = torch.optim.AdamW(
            parameter_groups(self.segmenter, self.settings.weight_decay, self.settings.learning_rate)
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: learning_rate_factor(step, self.settings.warmup, self.settings.iterations)
        )
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        kept = {f"segmenter.{name}" for name in self.segmenter.kept()}
        checkpoint["state_dict"] = {name: t for name, t in checkpoint["state_dict"].items() if name in kept}


def check_run(folder: Path, settings: TrainSettings) -> None:
    """Raises ValueError that names the settings in which a run already in the folder differs."""
    if not (folder / SETTINGS).is_file():
        return
    there, wanted = (x.model_dump(mode="json") for x in (read_settings(folder), settings))
    loose = HOW | {"run_dir"}  # what a resumed run may change
    odd = [f"{k}={there[k]!r}, not {v!r}" for k, v in wanted.items() if k not in loose and there[k] != v]
    if odd:
        raise ValueError(
            f"{folder} holds a run with {'; '.join(odd)}. Resuming would mix two runs; choose another run_dir, "
            "or delete that folder."
        )


def check_start(settings: TrainSettings, split: Split) -> None:
    """Raises FileNotFoundError or ValueError where a transductive run lacks the inductive one to go on from."""
    folder = settings.start_folder
    if not split.unseen:
        raise ValueError(
            f"Split {split.name!r} has no unseen class. Transductive training would label nothing itself; "
            "choose the supervised setting."
        )
    if folder is None:
        return
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
        ("number of seen classes", there.seen_classes, settings.seen_classes),
        ("model", there.model(), settings.model()),
    ):
        if found != wanted:
            raise ValueError(
                f"{folder} was trained with another {name} ({found}, not {wanted}). Its weights would not fit, or know "
                "unseen classes already; choose the inductive run of the same experiment."
            )


def _loader_from(first: int, settings: TrainSettings, split: Split, scenes, rank: int, world: int) -> DataLoader:
    loader = train_loader(settings, split, scenes, rank, world)
    loader.dataset.first = first
    return loader


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
    if split.name != settings.split:
        raise ValueError(
            f"{settings.dataset} holds the classes of another data set than split {settings.split!r}, which can be "
            "tested on it, not trained. Most of its classes would count as unseen; train with its own split."
        )
    split = training_split(settings)
    loader = train_loader(settings, split, scenes)
    check_run(folder, settings)
    if (folder / WEIGHTS).is_file():
        return folder
    if settings.setting == "transductive":
        check_start(settings, split)
    model = settings.model()
    clip = clip or load_clip(*model.clip_source)
    device = find_device()
    # After load_clip, which draws random numbers in its first call in a process and in no later one.
    L.seed_everything(settings.seed, verbose=False)
    segmenter = build_segmenter(model, clip, backbone_dtype(settings.precision, device))
    # Weights to resume from with AdamW's two moments, the one before, and the result: floats of 4 bytes.
    check_room(folder, max(200_000_000, 28 * sum(p.numel() for p in segmenter.trainable().values())))
    names = split.seen if settings.setting == "inductive" else split.classes
    segmenter.encoder.checkpointing = settings.activation_checkpointing
    if settings.compile:
        segmenter.compile()
    text_KE = class_text(clip, names, model.prompt)
    rank_zero_only(write_settings)(folder, settings)  # only now that nothing about them is wrong
    unseen_ids = split.unseen_ids if settings.setting == "transductive" else ()
    training = SegmentationTraining(segmenter, text_KE, settings, unseen_ids)
    callbacks = [ModelCheckpoint(folder, save_last=True, save_top_k=0, every_n_train_steps=settings.save_every)]
    if progress:
        callbacks.append(TQDMProgressBar(refresh_rate=10))
    trainer = L.Trainer(
        accelerator=device if device == "cpu" else "gpu",
        devices=settings.devices,
        num_nodes=settings.num_nodes,
        strategy=settings.strategy if settings.devices * settings.num_nodes > 1 else "auto",
        max_epochs=1,
        logger=CSVLogger(folder, name="", version="log"),
        log_every_n_steps=1 if settings.iterations < 100 else 10,
        callbacks=callbacks,
        enable_progress_bar=progress,
        enable_model_summary=False,
        use_distributed_sampler=False,  # it would shuffle
    )
    resume, first, start = folder / RESUME, 0, settings.start_folder
    if resume.is_file():
        done = torch.load(resume, map_location="cpu", weights_only=True)["global_step"]
        first = done * settings.batch  # Lightning would start the data anew
    elif start is not None:
        load_trained(segmenter, start / WEIGHTS)
    else:
        training.first_images = first_images(loader, settings.batch)
    segmenter.remember(text_KE)
    training.load = partial(_loader_from, first, settings, split, scenes)
    training.train()
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        with warnings.catch_warnings():
            # Lightning's own use of a torch function that torch is retiring: nothing that a user could change.
            warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
            # Scenes are rendered a whole batch at a time: processes would only carry them to and fro.
            warnings.filterwarnings("ignore", message=".*does not have many workers")
            # That last.ckpt holds the weights after an iteration: that is what a run goes on from.
            warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")
            trainer.fit(training, ckpt_path=resume if resume.is_file() else None, weights_only=True)
    except SystemExit:  # Lightning turns Ctrl+C into an exit, and leaves further ones ignored
        signal.signal(signal.SIGINT, on_interrupt)
        raise KeyboardInterrupt from None
    if trainer.is_global_zero:
        save_checkpoint(folder, segmenter, settings)
        resume.unlink(missing_ok=True)
    trainer.strategy.barrier()  # so that every process finds the weights
    return folder
