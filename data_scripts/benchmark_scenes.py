"""How many ShapeScenes this machine renders a second.

    python data_scripts/benchmark_scenes.py

Sizes and batches take turns within each round; medians are printed.
"""

import statistics
import time

import torch

from sptseg_lib.scenes.render import SceneSettings, render_scenes

CASES = ((64, 64, (1, 3)), (64, 256, (1, 3)), (128, 16, (1, 4)), (128, 64, (1, 4)))
ROUNDS = 15


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rates = {case: [] for case in CASES}
    for step in range(ROUNDS):
        for size, batch, things in CASES:
            settings = SceneSettings(size=size, things=things)
            index = torch.arange(step * batch, (step + 1) * batch, device=device)
            start = time.perf_counter()
            render_scenes(index, settings)
            if device == "cuda":
                torch.cuda.synchronize()
            rates[size, batch, things].append(batch / (time.perf_counter() - start))
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{where}, torch {torch.__version__}; medians of {ROUNDS} rounds")
    for (size, batch, things), values in rates.items():
        rate = statistics.median(values)
        print(f"{size} px, batches of {batch}, {things[0]} to {things[1]} things: {rate:,.0f} scenes/s")


if __name__ == "__main__":
    main()
