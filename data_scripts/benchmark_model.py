"""Time and memory of SPT-SEG at ViT-B/16, 512 × 512, beside a model that computes the released way.

    python data_scripts/benchmark_model.py [--rounds 3] [--device cpu] [--batch 2]

The released code cannot be shipped, so its way is rebuilt here from what is known of it: open_clip's own
layers in float32, a spectral prompt computed at all twelve layers and thrown away after the second, the
last decoder layer's update computed and thrown away, gradients for the backbone's weights too, a focal
loss that loops over images and classes, and structural similarity by 11 × 11 convolutions. All sides run
in turn within each round; medians are printed. Peak memory is that of a training step in a process of its
own.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss

from sptseg_lib.clip.load import Clip
from sptseg_lib.losses import one_hot_masks
from sptseg_lib.model import build_segmenter
from sptseg_lib.settings import preset

CLASSES, SEEN, SIZE = 20, 15, 512
SIDES = ("released way", "float32", "bfloat16")


def ssim_by_convolution(mask, target):
    """1 − SSIM with a two-dimensional Gaussian window, a convolution for each of its five means."""
    offset = torch.arange(11.0, device=mask.device) - 5
    weight = torch.exp(-(offset**2) / (2 * 1.5**2))
    weight = torch.outer(weight, weight) / weight.sum() ** 2
    weight = weight.expand(mask.shape[1], 1, 11, 11).contiguous()

    def mean(x):
        return F.conv2d(x, weight, padding=5, groups=len(weight))

    x, y = mean(mask), mean(target)
    xx, yy, xy = mean(mask * mask) - x**2, mean(target * target) - y**2, mean(mask * target) - x * y
    similarity = (2 * x * y + 0.01**2) * (2 * xy + 0.03**2)
    return 1 - (similarity / ((x**2 + y**2 + 0.01**2) * (xx + yy + 0.03**2))).mean()


class ReleasedWay(torch.nn.Module):
    """Our modules, run as the released code runs its own."""

    def __init__(self, segmenter):
        super().__init__()
        self.inner = segmenter.requires_grad_(True)
        joint = segmenter.encoder.backbone.joint
        self.last_update = torch.nn.Sequential(
            torch.nn.Linear(joint, 4 * joint), torch.nn.ReLU(), torch.nn.Linear(4 * joint, joint)
        )

    def forward(self, image, text):
        encoder, decoder = self.inner.encoder, self.inner.decoder
        tokens, (h, w) = encoder.backbone.embed((image - self.inner.mean_311) / self.inner.std_311, True)
        prompts = encoder.project_tokens(encoder.tokens_LMD)
        for layer, block in enumerate(encoder.backbone.blocks):
            cls, patches = tokens[:, :1], tokens[:, -h * w :]
            spectral = encoder.spectral[0](patches.unflatten(1, (h, w)), cls[:, 0]).flatten(1, 2)
            if layer in encoder.spectral_index:
                patches = patches + spectral
            tokens = block(torch.cat([cls, prompts[layer].expand(len(tokens), -1, -1), patches], dim=1))
        joint = F.normalize(encoder.backbone.project(encoder.norm(tokens)), dim=-1)
        patches = joint[:, -h * w :].unflatten(1, (h, w))
        logits = decoder(patches, joint[:, 0], text)
        z = decoder.attentions[-1].gate(decoder.attentions[-1].frequencies(patches).flatten(1, 2))
        self.last_update(logits.flatten(2).softmax(-1) @ z)
        return logits

    def loss(self, image, label, text):
        logits = F.interpolate(self(image, text), size=label.shape[-2:], mode="bilinear")
        target = one_hot_masks(label, len(text))
        focal, pairs = 0.0, 0
        for i in range(len(logits)):
            for k in range(len(text)):
                focal = focal + sigmoid_focal_loss(logits[i, k], target[i, k], reduction="mean")
                pairs += int(target[i, k].any())
        return {"loss": 100 * focal / max(pairs, 1) + ssim_by_convolution(logits, target)}


def build(side: str, device: str):
    model = open_clip.create_model("ViT-B-16-quickgelu")
    clip = Clip("ViT-B-16-quickgelu", model, None, (0.5,) * 3, (0.25,) * 3)
    settings = preset("spt_seg_released", grid=SIZE // 16, normalisation="model")
    torch.manual_seed(0)
    dtype = torch.bfloat16 if side == "bfloat16" else torch.float32
    segmenter = build_segmenter(settings, clip, dtype)
    return (ReleasedWay(segmenter) if side == "released way" else segmenter).to(device)


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def inference(model, image, text, device) -> float:
    model.eval()
    start = time.perf_counter()
    with torch.inference_mode():
        model(image[:1], text)
    synchronise(device)
    return time.perf_counter() - start


def training_step(model, image, label, text, device) -> float:
    model.train()
    start = time.perf_counter()
    model.loss(image, label, text)["loss"].backward()
    synchronise(device)
    model.zero_grad(set_to_none=True)
    return time.perf_counter() - start


def inputs(batch: int, device: str):
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(batch, 3, SIZE, SIZE, generator=generator)
    label = torch.randint(0, SEEN, (batch, SIZE // 64, SIZE // 64), generator=generator)
    label = label.repeat_interleave(64, 1).repeat_interleave(64, 2)
    text = F.normalize(torch.randn(CLASSES, 512, generator=generator), dim=-1)
    return image.to(device), label.to(device), text.to(device)


def peak_megabytes(side: str, batch: int, device: str) -> float:
    """Peak memory that a training step adds, in a process of its own."""
    command = [sys.executable, __file__, "--memory", side, "--batch", str(batch), "--device", device]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def report_memory(side: str, batch: int, device: str) -> None:
    model = build(side, device)
    image, label, text = inputs(batch, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        training_step(model, image, label, text[:SEEN], device)
        print(json.dumps(torch.cuda.max_memory_allocated() / 1e6))
    else:
        training_step(model, image, label, text[:SEEN], device)
        # Not getrusage: a new process inherits its parent's peak there.
        status = Path("/proc/self/status").read_text()
        print(json.dumps(int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1e3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=2, help="images of a training step; inference takes one")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        return report_memory(args.memory, args.batch, args.device)
    image, label, text = inputs(args.batch, args.device)
    models = {side: build(side, args.device) for side in SIDES}
    times = {(job, side): [] for job in ("inference", "training step") for side in SIDES}
    for _ in range(args.rounds + 1):  # the first round warms up
        for side, model in models.items():
            times["inference", side].append(inference(model, image, text, args.device))
            times["training step", side].append(training_step(model, image, label, text[:SEEN], args.device))
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{where}, torch {torch.__version__}, ViT-B/16 at {SIZE} px, medians of {args.rounds} interleaved rounds")
    for job in ("inference", "training step"):
        base = statistics.median(times[job, SIDES[0]][1:])
        for side in SIDES:
            median = statistics.median(times[job, side][1:])
            print(f"{job:14s} {side:13s} {median:7.3f} s  {median / base:5.2f} of the released way")
    base = None
    for side in SIDES:
        peak = peak_megabytes(side, args.batch, args.device)
        base = base or peak
        print(f"{'peak memory':14s} {side:13s} {peak:7.0f} MB {peak / base:5.2f} of the released way")


if __name__ == "__main__":
    main()
