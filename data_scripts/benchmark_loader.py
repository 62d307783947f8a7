"""How many augmented training crops one core reads a second, from 500×375 JPEGs in PASCAL VOC's layout.

    python data_scripts/benchmark_loader.py [--pictures 64] [--crops 300] [--workers 0] [--folder FOLDER]

Counts the processor's seconds, so that other work on the machine does not lower the figure, in rounds that read all
crops; the median is printed, and under a profiler the costliest functions. With --workers, crops a second by the
clock through a DataLoader as training uses it. --folder: a prepared data set instead of ShapeScenes.
"""

import argparse
import cProfile
import pstats
import statistics
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

from sptseg_lib.data import VocData, split_for, train_loader
from sptseg_lib.scenes.render import SceneSettings
from sptseg_lib.scenes.voc_layout import write_voc
from sptseg_lib.settings import TrainSettings

WIDTH, HEIGHT, BAR, ROUNDS = 500, 375, 60, 3


def write_pictures(folder: Path, count: int) -> Path:
    """ShapeScenes as photographs of VOC's usual size: rendered at 500 × 500 pixels and cut to 500 × 375."""
    write_voc(folder, {"train": count}, SceneSettings(size=WIDTH, noise=0.02))
    for path in [*folder.glob("JPEGImages/*"), *folder.glob("SegmentationClass/*")]:
        with Image.open(path) as image:
            cut = image.crop((0, 0, WIDTH, HEIGHT))
        cut.save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))
    return folder


def crops_per_cpu_second(data: VocData, crops: int) -> float:
    start = time.process_time()
    for index in range(crops):
        data[index]
    return crops / (time.process_time() - start)


def costliest(data: VocData, crops: int, rows: int = 10) -> list[tuple[str, float]]:
    """Functions by their own share of the time, in per cent."""
    profile = cProfile.Profile()
    profile.runcall(crops_per_cpu_second, data, crops)
    stats = pstats.Stats(profile)
    own = sorted(((seconds, name) for (_, _, name), (_, _, seconds, _, _) in stats.stats.items()), reverse=True)
    return [(name, 100 * seconds / stats.total_tt) for seconds, name in own[:rows]]


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--crops", type=int, default=300, help="in each of three rounds")
    parser.add_argument("--size", type=int, default=512, help="side of a crop")
    parser.add_argument("--workers", type=int, default=0, help="also time a DataLoader with so many")
    parser.add_argument("--folder", type=Path, help="a data set in PASCAL VOC's layout instead of ShapeScenes")
    parser.add_argument("--split", default="default")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        folder = args.folder or write_pictures(Path(made), args.pictures)
        settings = TrainSettings(
            dataset=str(folder), split=args.split, size=args.size, batch=16, num_workers=args.workers,
            iterations=max(1, ROUNDS * args.crops // 16),
        )  # fmt: skip
        loader = train_loader(settings, split_for(str(folder), args.split))
        data = loader.dataset
        data[0]  # imports and the first pass's order
        rates = [crops_per_cpu_second(data, args.crops) for _ in range(ROUNDS)]
        rate = statistics.median(rates)
        print(f"{rate:.0f} augmented {args.size}×{args.size} crops a second and core (rounds: ", end="")
        print(", ".join(f"{one:.0f}" for one in rates) + f"); the bar is {BAR}: {'met' if rate >= BAR else 'missed'}")
        for name, share in costliest(data, args.crops):
            print(f"  {share:4.0f} %  {name}")
        if args.workers:
            start, count = time.perf_counter(), 0
            for batch in loader:
                count += len(batch.image_B3HW)
            print(f"{count / (time.perf_counter() - start):.0f} crops/s by the clock with {args.workers} workers")
    return rate


if __name__ == "__main__":
    main()
