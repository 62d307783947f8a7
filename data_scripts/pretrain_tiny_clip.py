"""Pretrain the tiny CLIP of the workbook from image-caption pairs of ShapeScenes.

    python data_scripts/pretrain_tiny_clip.py --out runs/tiny_clip
    python data_scripts/pretrain_tiny_clip.py --out runs/tiny_clip --start WEIGHTS   # the second cycle alone

Never looks at a mask: each step pairs rendered scenes with captions that name some or all
of what is visible. The loss is a sigmoid over all (image, caption) pairs of the batch,
positive where the caption is true of the image, taken twice: on the class token, and on the
patches pooled by how well they match the caption. Names are learned on one large thing; a
second cosine cycle puts them to use among several. Interrupt it at any time; the same command
goes on where it was.
"""

import argparse
import json
import math
import platform
import time
from pathlib import Path
from typing import NamedTuple

import open_clip
import torch
import torch.nn.functional as F
from open_clip import CLIP
from safetensors.torch import save_file
from torch import Tensor
from torch.func import functional_call
from tqdm.auto import tqdm

from sptseg_lib.clip.backbone import VisionBackbone
from sptseg_lib.clip.tiny import CONFIG_PATH, LEAST_VISIBLE, SIZE, WEIGHTS_PATH, zero_shot_scores
from sptseg_lib.clip.weights import load_weights
from sptseg_lib.scenes.captions import truth, write_captions
from sptseg_lib.scenes.render import SceneSettings, render_scenes

SEED = 2024
SMALL = 64  # pixels along a side of most scenes: they are cheap


class Cycle(NamedTuple):
    """A warm-up and a cosine: its first scene, how many, of what, and the peak learning rate.

    `single`, `several` and what is left, textures alone, are shares of a batch. The last `large` of the scenes have the
    shipped size, with resized positions, so that resizing them again for segmentation is no surprise.
    """

    first: int
    images: int
    rate: float
    single: float
    several: float
    large: float


CYCLES = (
    Cycle(first=0, images=800_000, rate=1e-3, single=0.5, several=0.4, large=0.15),
    Cycle(first=800_000, images=400_000, rate=5e-4, single=0.2, several=0.7, large=0.4),
)


def mixture(cycle: Cycle, size: int) -> tuple[tuple[float, SceneSettings], ...]:
    """What a batch is made of, and how much of each."""
    shrink = SMALL / size  # things keep their size in pixels, so that more of them fit a larger scene
    most, radius = round(3 / shrink**0.75), (0.15 * shrink, 0.34 * shrink**0.5)
    return (
        (cycle.single, SceneSettings(size=size, things=(1, 1), radius=(0.22 * shrink, 0.46), split=0.2)),
        (cycle.several, SceneSettings(size=size, things=(1, most), radius=radius)),
        (1 - cycle.single - cycle.several, SceneSettings(size=size, things=(0, 0), plain=0.0)),
    )


def draw_batch(first: int, batch: int, cycle: Cycle, size: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Scenes `first` to `first + batch` of the training stream: image, present classes, index."""
    images, present, indices = [], [], []
    start, share_so_far = first, 0.0
    for share, settings in mixture(cycle, size):
        share_so_far += share
        stop = first + round(share_so_far * batch)
        index = torch.arange(start, stop, device=device)
        scenes = render_scenes(index, settings, seed=SEED)
        images.append(scenes.image_B3HW)
        present.append(scenes.visible_BK(LEAST_VISIBLE))
        indices.append(index)
        start = stop
    return torch.cat(images), torch.cat(present), torch.cat(indices)


def sine_positions(grid: tuple[int, int], width: int) -> Tensor:
    """Where positions start: sines and cosines of both coordinates, (h·w, D).

    Random positions of the usual size are a tenth of a patch's colour, and shapes, unlike
    textures, cannot be told without knowing where their edges are.
    """
    row, column = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in grid), indexing="ij")
    rate = torch.pi / max(grid) * 2 ** torch.linspace(0, math.log2(max(grid)), width // 4)
    phase = torch.stack([row.flatten(), column.flatten()], dim=1)[..., None] * rate
    return torch.cat([phase.sin(), phase.cos()], dim=-1).flatten(1) * 0.7


def pair_loss(logit_BC: Tensor, true_BC: Tensor) -> Tensor:
    """Sigmoid loss over all pairs, so that every caption true of an image counts as positive."""
    return F.binary_cross_entropy_with_logits(logit_BC, true_BC.float()) * 10


def pooled_similarity(patch_BNE: Tensor, text_CE: Tensor, scale: Tensor) -> Tensor:
    """Similarity of captions to the patches that match them best: (B, N, E), (C, E) -> (B, C).

    A softmax over the patches weighs each by its own similarity, at half the scale, so that
    all patches of a thing count and the background does not.
    """
    match_BNC = patch_BNE @ text_CE.T * scale
    return ((match_BNC * 0.5).softmax(1) * match_BNC).sum(1)


class Trainer:
    """One cycle, from `start` (weights of the shipped size) or, without it, from random weights."""

    def __init__(self, out: Path, cycle: Cycle, batch: int, device: str, start: Path | None = None):
        torch.manual_seed(SEED)
        self.out, self.cycle, self.batch, self.device = out, cycle, batch, device
        self.config = json.loads(CONFIG_PATH.read_text())
        if start is None:
            self.config["vision_cfg"]["image_size"] = SMALL
        self.model = CLIP(**self.config).to(device)
        self.vision = VisionBackbone(self.model.visual)
        if start is None:
            self.model.visual.positional_embedding.data[1:] = sine_positions(self.vision.grid, self.vision.width)
        else:
            load_weights(self.model, start, "the tiny CLIP")
        self.tokenize = open_clip.SimpleTokenizer(context_length=self.model.context_length)
        self.tokens: dict[str, Tensor] = {}
        self.local_bias = torch.nn.Parameter(torch.tensor(-5.0, device=device))
        decay = [p for p in self.model.parameters() if p.ndim >= 2]
        other = [p for p in self.model.parameters() if p.ndim < 2] + [self.local_bias]
        groups = [{"params": decay, "weight_decay": 0.05}, {"params": other, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=cycle.rate, betas=(0.9, 0.98), fused=True)
        self.seen, self.seconds = 0, 0.0
        if (out / "resume.pt").exists():
            state = torch.load(out / "resume.pt", map_location=device, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.local_bias.data.copy_(state["local_bias"])
            self.seen, self.seconds = state["seen"], state["seconds"]

    def save(self) -> None:
        state = {"model": self.model.state_dict(), "optimiser": self.optimiser.state_dict(), "seen": self.seen}
        state |= {"local_bias": self.local_bias.detach(), "seconds": self.seconds}
        partial = self.out / "resume.part"
        torch.save(state, partial)
        partial.replace(self.out / "resume.pt")

    def encode_captions(self, captions: list[str]) -> Tensor:
        """Unit text embeddings of B captions: (B, E); each distinct caption is encoded once."""
        unseen = list({c: None for c in captions if c not in self.tokens})
        if unseen:
            self.tokens.update(zip(unseen, self.tokenize(unseen)))
        distinct = {c: i for i, c in enumerate(dict.fromkeys(captions))}
        tokens = torch.stack([self.tokens[c] for c in distinct]).to(self.device)
        text_CE = self.model.encode_text(tokens, normalize=True)
        return text_CE[torch.tensor([distinct[c] for c in captions], device=self.device)]

    def step(self) -> float:
        done = self.seen / self.cycle.images
        warm = min(1.0, done / 0.02)
        for group in self.optimiser.param_groups:
            group["lr"] = self.cycle.rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        size = SMALL if done < 1 - self.cycle.large else SIZE
        image, present, index = draw_batch(self.cycle.first + self.seen, self.batch, self.cycle, size, self.device)
        single, single_names, full, full_names = write_captions(present, index, SEED)
        # bfloat16 copies of the weights do the work; gradients arrive at the float32 ones.
        weights = {name: p.to(torch.bfloat16) for name, p in self.vision.named_parameters()}
        tokens = functional_call(self.vision, weights, ((image - 0.5) / 0.25,))
        tokens = F.normalize(tokens.float(), dim=-1)
        text = self.encode_captions(single + full)
        scale, bias = self.model.logit_scale.exp(), self.model.logit_bias
        global_true = truth(torch.cat([single_names, full_names]), present)
        loss = pair_loss(tokens[:, 0] @ text.T * scale + bias, global_true)
        local = pooled_similarity(tokens[:, 1:], text[: self.batch], scale) + self.local_bias
        loss = loss + pair_loss(local, global_true[:, : self.batch])
        self.optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.model.logit_scale.data.clamp_(max=math.log(100))
        self.seen += self.batch
        return float(loss.detach())

    def export(self) -> dict:
        """Write float16 weights, their positions resized to the shipped size, and their measured card figures."""
        state = {name: t for name, t in self.model.state_dict().items() if name != "attn_mask"}
        with torch.no_grad():
            state["visual.positional_embedding"] = self.vision.positions((SIZE // self.vision.patch,) * 2)
        weights = {name: t.half().contiguous() for name, t in state.items()}
        save_file(weights, self.out / WEIGHTS_PATH.name)
        scores = zero_shot_scores(self.model, self.tokenize, self.device)
        hardware = torch.cuda.get_device_name() if self.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
        facts = {"images": self.seen, "batch": self.batch, "steps": self.seen // self.batch, "seconds": self.seconds}
        facts |= {"hardware": hardware, "machine": platform.machine(), "torch": torch.__version__, "scores": scores}
        (self.out / "card.json").write_text(json.dumps(facts, indent=2))
        return facts

    def fit(self, save_every: int = 120, score_every: int = 50_000) -> None:
        """Train to the end; an interruption is saved, so that nothing is lost."""
        try:
            self._loop(save_every, score_every)
        finally:
            self.save()

    def _loop(self, save_every: int, score_every: int) -> None:
        clock = saved = time.monotonic()
        log = self.out / "log.csv"
        with tqdm(total=self.cycle.images, initial=self.seen, unit="image", unit_scale=True, mininterval=5) as bar:
            while self.seen < self.cycle.images:
                loss = self.step()
                bar.update(self.batch)
                now = time.monotonic()
                self.seconds, clock = self.seconds + now - clock, now
                if not math.isfinite(loss):  # before the step, so what is saved is still good
                    raise RuntimeError(
                        f"The loss is {loss} after {self.seen} images; start again with a lower peak rate (CYCLES)."
                    )
                if now - saved > save_every:
                    self.save()
                    saved = now
                if self.seen % score_every < self.batch:
                    scores = zero_shot_scores(self.model, self.tokenize, self.device, scenes=512)
                    with log.open("a") as file:
                        file.write(f"{self.seen},{loss:.4f},{json.dumps(scores)}\n")
                    bar.set_postfix(loss=f"{loss:.3f}", things=f"{scores['things']:.1f}", map=f"{scores['map']:.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the weights, the log and what resuming needs"
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--start", type=Path, help="weights of the first cycle, to run the second one alone")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    start = args.start
    for number, cycle in enumerate(CYCLES, start=1):
        if start is not None and number == 1:
            continue
        folder = args.out / f"cycle{number}"
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / WEIGHTS_PATH.name).exists():
            trainer = Trainer(folder, cycle, args.batch, args.device, start)
            trainer.fit()
            print(json.dumps(trainer.export(), indent=2))
        start = folder / WEIGHTS_PATH.name
