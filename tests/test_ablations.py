"""What the ablations' tables compare, and what is said of the paper's claims."""

import pytest
from scripts import load_script

from sptseg_lib.ablations import (
    ALIKE,
    SCORES,
    Claim,
    ablation_rows,
    claims,
    compare,
    difference,
    judge,
    measured_ablations,
    verdict,
)
from sptseg_lib.spread import Difference


def variant(seeds: dict[int, float], gamma: float = 0.1) -> dict:
    """Results of one variant in which every score of a seed is the same; other shifts score 0."""
    cards = [{str(gamma): dict.fromkeys(SCORES, value), "9.0": dict.fromkeys(SCORES, 0.0)} for value in seeds.values()]
    return {"gamma": gamma, "seeds": list(seeds), "test": cards}


@pytest.mark.parametrize("layers", [6, 12])
def test_claims_compare_rows_that_there_are(layers):
    names = {row.variant.name for row in ablation_rows(layers)}
    for claim in claims(layers):
        assert {claim.better, claim.worse} <= names and claim.score in SCORES
        assert claim.better != claim.worse


def test_a_difference_is_taken_seed_by_seed():
    variants = {"a": variant({0: 10, 1: 20, 2: 35}), "b": variant({2: 30, 0: 8, 7: 99}, gamma=0.3)}
    found = difference(variants, "a", "b", "hIoU")
    assert found.mean == pytest.approx((2 + 5) / 2)  # seeds 0 and 2 are common
    with pytest.raises(ValueError, match="two seeds"):
        difference({"a": variant({0: 1}), "b": variant({0: 2})}, "a", "b", "hIoU")


def interval(low: float, high: float) -> Difference:
    return Difference((low + high) / 2, low, high, 0.5)


def test_a_verdict_is_where_the_interval_lies():
    better = Claim("", "", "", "hIoU")
    cases = {(0.1, 3): "holds", (-3, -0.1): "does not", (-1, 1): "cannot be told", (0, 0): "cannot be told"}
    assert {case: verdict(better, interval(*case)) for case in cases} == cases
    alike = better._replace(alike=True)
    cases = {
        (-ALIKE, 1): "holds",
        (0, 0): "holds",
        (1, ALIKE + 1): "cannot be told",
        (-9, 9): "cannot be told",
        (ALIKE + 1, ALIKE + 2): "does not",
        (-ALIKE - 2, -ALIKE - 1): "does not",
    }
    assert {case: verdict(alike, interval(*case)) for case in cases} == cases


def test_claims_are_judged_as_far_as_they_were_measured():
    names = [f"Table 2 · {row}" for row in ("baseline", "baseline + SPT")]
    variants = {names[0]: variant({0: 10, 1: 20}), names[1]: variant({0: 15, 1: 25.001})}
    (row,) = judge(variants, layers=6)
    assert row["verdict"] == "holds" and row["seeds"] == 2 and row["difference"] == pytest.approx(5.0005)


def test_rows_are_compared_with_the_first_and_p_values_raised_for_their_number():
    rows = ablation_rows(6)[:4]
    base, worse, better, _ = (row.variant.name for row in rows)
    variants = {
        base: variant({0: 50, 1: 52, 2: 51}),
        worse: variant({0: 40, 1: 43, 2: 41}),
        better: variant({0: 50.5, 1: 52.2, 2: 51.9}),
    }
    table = compare(variants, rows)
    assert [row["row"] for row in table] == [row.label for row in rows[:3]]
    assert table[0]["change"] is None and table[0]["hIoU"] == "51.0 ± 1.0"
    assert table[1]["change"].mean == pytest.approx(-29 / 3) and table[1]["change"].clear
    smaller, larger = sorted(row["change"].p for row in table[1:])
    assert {row["p"] for row in table[1:]} == {2 * smaller, max(2 * smaller, larger)}


def test_the_rows_that_claims_are_about_may_have_more_seeds(monkeypatch):
    asked = {}

    def measured(name, form, variants, seeds, *_, **__):
        asked.update({v.name: list(v.seeds or seeds) for v in variants})

    monkeypatch.setattr("sptseg_lib.ablations.measured", measured)
    rows = ablation_rows(6)
    measured_ablations(rows, "long", 3, "cache", "run", claim_seeds=5)
    assert asked["Table 4 · 5 decoder layers"] == asked["Window · 3 × 3"] == [0, 1, 2, 3, 4]
    assert asked["Window · 2 × 2"] == [0, 1, 2] and len(asked) == len(rows)
    measured_ablations(rows, "long", 3, "cache", "run")
    assert all(seeds == [0, 1, 2] for seeds in asked.values())


def test_one_seed_is_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(ValueError, match="1 seed"):
        measured_ablations(ablation_rows(6), "smoke", 1, str(tmp_path), str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_studies_are_run_without_notebooks(monkeypatch, capsys):
    asked, script = [], load_script("run_studies")

    def measured(*given, **options):
        asked.append((given[-4:], options))
        return {"runs": 1, "cpu_hours": 0.0}

    for owner, name in ((script, "measured_ablations"), (script, "measured_peers"), (script.robustness, "measure")):
        monkeypatch.setattr(owner, name, measured)
    assert script.main(["--form", "long", "--seeds", "2", "--claim-seeds", "4", "--split", "half"]) == 0
    where, kept = {"dataset": "", "split": "half"}, ("runs/study", "runs/results")
    assert asked == [
        (("long", 2, *kept), {"claim_seeds": 4, **where}),
        (("long", range(2), *kept), where),
        (("long", range(2), *kept), where),
    ]
    assert capsys.readouterr().out.count("1 runs") == 3
