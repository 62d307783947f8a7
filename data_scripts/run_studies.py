"""Train and score the studies behind lessons 08, 09 and 13, where there is no Jupyter: on a GPU node, say.

    python data_scripts/run_studies.py --form long                          # all three; it goes on where it was stopped
    python data_scripts/run_studies.py --form long --study ablations --claim-seeds 5

Runs are kept in --cache, as the notebooks keep them, and <study>_<form>.json is written to --results. That file goes
to notebooks/results, where the lessons read it. As many runs are trained at once as the machine has room for.
"""

import argparse
import time

from sptseg_lib import robustness
from sptseg_lib.ablations import ablation_rows, measured_ablations
from sptseg_lib.clip.load import TINY, image_layers
from sptseg_lib.peer_study import measured_peers
from sptseg_lib.study import FORMS

STUDIES = ("ablations", "peers", "robustness")


def run(name: str, options: argparse.Namespace) -> dict:
    where = {"dataset": options.dataset, "split": options.split}
    form, seeds, kept = options.form, range(options.seeds), (options.cache, options.results)
    if name == "ablations":
        rows = ablation_rows(image_layers(FORMS[form].train["overrides"].get("clip", TINY)))
        return measured_ablations(rows, form, options.seeds, *kept, claim_seeds=options.claim_seeds, **where)
    if name == "peers":
        return measured_peers(form, seeds, *kept, **where)
    return robustness.measure(form, seeds, *kept, **where)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=STUDIES, nargs="*", default=STUDIES)
    parser.add_argument("--form", choices=tuple(FORMS), default="short")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--claim-seeds", type=int, default=0, help="of tables 2 to 4 (default: as many as --seeds)")
    parser.add_argument("--dataset", default="", help="a prepared folder, where it is not the form's own")
    parser.add_argument("--split", default="")
    parser.add_argument("--cache", default="runs/study")
    parser.add_argument("--results", default="runs/results")
    options = parser.parse_args(arguments)
    for name in options.study:
        begun = time.perf_counter()
        found = run(name, options)
        took = time.perf_counter() - begun
        print(f"{name}: {found['runs']} runs, {found['cpu_hours']} core hours; {took:.0f} s by the clock", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
