"""One training run at the paper's size on a GPU: images a second, memory, share of the hardware's rate, waiting.

    python data_scripts/benchmark_gpu.py [--iterations 60] [--workers 8] [--compile] [--checkpointing] [--profile]
    python data_scripts/benchmark_gpu.py --device cpu --tiny          # the same steps in miniature

SPT-SEG on ViT-B/16 (random weights: they cost what others do), 512×512 crops of a folder in PASCAL VOC's layout,
batch 16, frozen backbone in bfloat16. The matrix rate is measured first, as products of large bfloat16 matrices. The
share counts the model's own matrix operations, forward and backward; what is recomputed under --checkpointing,
losses and optimiser add time, but no share.
"""

import argparse
import json
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from sptseg_lib.clip.load import load_clip
from sptseg_lib.clip.text import class_text
from sptseg_lib.data import split_for, train_loader
from sptseg_lib.model import Segmenter, build_segmenter
from sptseg_lib.scenes.render import SceneSettings
from sptseg_lib.scenes.voc_layout import write_voc
from sptseg_lib.settings import TrainSettings

BAR = 40  # per cent of the measured matrix rate


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def matrix_rate(device: str, side: int, rounds: int = 20) -> float:
    """Floating-point operations a second of side × side bfloat16 products, the best of three rounds."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for _ in range(4):  # the first one warms up
        synchronise(device)
        start = time.perf_counter()
        for _ in range(rounds):
            a @ b
        synchronise(device)
        best = max(best, rounds * 2 * side**3 / (time.perf_counter() - start))
    return best


def operations(segmenter: Segmenter, image: torch.Tensor, text: torch.Tensor) -> int:
    """Floating-point operations of one forward and backward pass of the model."""
    with FlopCounterMode(display=False) as counter:
        segmenter(image, text).sum().backward()
    segmenter.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def describe(args) -> TrainSettings:
    overrides = {"clip": "ViT-B-16-quickgelu", "weights": "random", "grid": 32}
    if args.tiny:
        overrides = {"decoder_layers": 1, "prompt_tokens": 2, "grid": 4}
    return TrainSettings(
        overrides=overrides, size=32 if args.tiny else 512, batch=args.batch, num_workers=args.workers,
        iterations=args.iterations + args.warmup, precision="bfloat16",
    )  # fmt: skip


def train(settings: TrainSettings, args) -> dict:
    device, split = args.device, split_for(settings.dataset, settings.split)
    clip = load_clip(*settings.model().clip_source)
    segmenter = build_segmenter(settings.model(), clip, torch.bfloat16).to(device).train()
    text = class_text(clip, split.seen).to(device)
    loader = train_loader(settings, split)
    first = next(iter(loader))
    flops = operations(segmenter, first.image_B3HW.to(device), text)
    segmenter.encoder.checkpointing = args.checkpointing
    if args.compile:
        segmenter.compile()
    optimiser = torch.optim.AdamW(segmenter.trainable().values(), lr=2e-4, fused=device == "cuda")
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    waited, started, batches = 0.0, 0.0, iter(loader)
    for step in range(settings.iterations):
        if step == args.warmup:
            synchronise(device)
            waited, started = 0.0, time.perf_counter()
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        image, label = (x.to(device, non_blocking=True) for x in (batch.image_B3HW, batch.label_BHW))
        segmenter.loss(image, label, text)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(segmenter.trainable().values(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    synchronise(device)
    seconds = time.perf_counter() - started
    if args.profile:
        show_profile(segmenter, image, label, text, device)
    return {
        "images_per_second": args.iterations * settings.batch / seconds,
        "peak_gigabytes": torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None,
        "operations_per_second": args.iterations * flops / seconds,
        "waiting_per_cent": 100 * waited / seconds,
    }


def show_profile(segmenter: Segmenter, image, label, text, device: str) -> None:
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profile:
        segmenter.loss(image, label, text)["loss"].backward()
        synchronise(device)
    by = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    print(profile.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=60))


def add_row(path: Path, about: dict, row: dict) -> None:
    """Add a measurement to a results file, which is about one machine, torch and size."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else about | {"rows": []}
    if other := {name: found[name] for name in about if found[name] != about[name]}:
        raise ValueError(f"{path} holds measurements of {other}. Rows could not be compared; name another file.")
    found["rows"].append({name: float(f"{v:.4g}") if isinstance(v, float) else v for name, v in row.items()})
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="the tiny CLIP at 32 pixels: only to see that it runs")
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--warmup", type=int, default=10, help="iterations before the clock starts")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--folder", type=Path, help="a data set in PASCAL VOC's layout instead of ShapeScenes on disk")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--checkpointing", action="store_true", help="compute the backbone's layers twice")
    parser.add_argument("--profile", action="store_true", help="print the costliest operations of one more step")
    parser.add_argument("--results", type=Path, help="a JSON file to which the figures are added")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as made:
        settings = describe(args)
        scenes = SceneSettings(size=40 if args.tiny else 500)
        folder = args.folder or write_voc(Path(made), {"train": args.pictures}, scenes)
        rate = matrix_rate(args.device, 128 if args.tiny else 8192)
        found = train(settings.model_copy(update={"dataset": str(folder)}), args)
    found |= {"matrix_rate": rate, "share_per_cent": 100 * found["operations_per_second"] / rate}
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    memory = "not measured" if found["peak_gigabytes"] is None else f"{found['peak_gigabytes']:.1f} GB"
    print(f"{where}, torch {torch.__version__}, batch {args.batch} at {settings.size} px, {args.iterations} iterations")
    print(f"{found['images_per_second']:.1f} images/s; peak memory {memory}")
    print(
        f"{found['operations_per_second'] / 1e12:.2f} TFLOP/s of {rate / 1e12:.2f} measured for bfloat16 products: "
        f"{found['share_per_cent']:.0f} % (the bar is {BAR} %)"
    )
    print(f"{found['waiting_per_cent']:.1f} % of the time was spent waiting for the loader ({args.workers} workers)")
    if args.results:
        about = {"device": where, "torch": torch.__version__, "day": date.today().isoformat()}
        about |= {"size": settings.size, "batch": args.batch, "iterations": args.iterations}
        add_row(args.results, about, {"checkpointing": args.checkpointing, "compile": args.compile, **found})
    return found


if __name__ == "__main__":
    main()
