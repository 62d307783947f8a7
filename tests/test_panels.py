"""Pictures chosen by a rule, and label maps kept as text."""

import pytest
import torch

from sptseg_lib.panels import QUANTILES, at_quantiles, compare_pictures, decode_labels, encode_labels
from sptseg_lib.splits import make_split

SPLIT = make_split("two", ("a", "b"), ("b",))


def test_label_maps_survive_as_text():
    label_HW = torch.randint(0, 256, (9, 13))
    text = encode_labels(label_HW)
    assert text.isascii() and torch.equal(decode_labels(text), label_HW)
    for odd in (-1, 256):
        with pytest.raises(ValueError, match=f"from {min(0, odd)} to {max(0, odd)} do not fit"):
            encode_labels(torch.tensor([[0, odd]]))


def test_quantiles_are_places_of_sorted_values():
    values = [5.0, -3.0, 0.0, 9.0, 2.0]
    assert at_quantiles(values) == [1, 2, 4, 0, 3]
    assert at_quantiles([1.0, 1.0, 1.0], (0.0, 1.0)) == [0, 2]
    assert at_quantiles([7.0]) == [0] * len(QUANTILES)


def test_rows_run_from_our_worst_to_our_best():
    """Picture i is half right for us in i of 8 rows more than for the baseline."""
    label_BHW = torch.zeros(9, 8, 8, dtype=torch.int64)
    right_BH = torch.arange(9)[:, None] > torch.arange(8)

    def ours(image_B3HW):
        p_B1HW = right_BH[image_B3HW[:, 0, 0, 0].long()].float()[:, None, :, None].expand(-1, 1, 8, 8)
        return torch.cat([p_B1HW, 1 - p_B1HW], dim=1)

    def baseline(image_B3HW):
        return torch.tensor([0.4, 0.6]).view(1, 2, 1, 1).expand(len(image_B3HW), 2, 8, 8)

    images = torch.arange(9.0).view(9, 1, 1, 1).expand(9, 3, 8, 8)
    batches = [(images[i : i + 4], label_BHW[i : i + 4], torch.arange(i, min(9, i + 4)) + 100) for i in (0, 4, 8)]
    found = compare_pictures(ours, baseline, (0.0, 0.0), batches, SPLIT, most=9)
    assert found["differences"] == [12.5 * i for i in range(9)]
    assert [row["picture"] for row in found["rows"]] == [100, 102, 104, 106, 108]
    assert found["rows"][1]["ours"] == 25 and found["rows"][1]["baseline"] == 0
    assert torch.equal(decode_labels(found["rows"][1]["labels"]["ours"])[:, 0], (~right_BH[2]).long())
    assert decode_labels(found["rows"][0]["labels"]["baseline"]).eq(1).all()
    # A shift of 0.3 from class a costs us nothing, and the first five pictures end with the fifth.
    fewer = compare_pictures(ours, baseline, (0.3, 0.0), batches, SPLIT, most=5)
    assert fewer["differences"] == found["differences"][:5]
