"""What is made of eigenvectors: segments, refined masks, classes, self-training, mattes and prompts."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from sptseg_lib.clip.backbone import VisionBackbone
from sptseg_lib.clip.load import load_clip
from sptseg_lib.graph import crf
from sptseg_lib.graph.affinity import feature_affinity
from sptseg_lib.graph.clusters import cluster_segments, embed_segments, match_clusters, paint
from sptseg_lib.graph.eigen import laplacian_eigenvectors
from sptseg_lib.graph.features import load_featurizer
from sptseg_lib.graph.matting import matte, soft_memberships, soft_segments, trimap
from sptseg_lib.graph.prompt import GraphPrompt, image_basis
from sptseg_lib.graph.regions import background_segment, eigengap, segment, segment_masks
from sptseg_lib.graph.selftrain import SmallSegmenter, predict, self_train
from sptseg_lib.model import build_segmenter
from sptseg_lib.settings import preset


def quadrants(h=12, w=16):
    """Three regions as features and as labels: the left half, and the right half cut across."""
    label_hw = torch.zeros(h, w, dtype=torch.int64)
    label_hw[: h // 3, w // 2 :] = 1
    label_hw[h // 3 :, w // 2 :] = 2
    return F.one_hot(label_hw, 3).float()[None] + 0.05, label_hw[None]


def same_partition(a, b):
    pairs = set(zip(a.flatten().tolist(), b.flatten().tolist()))
    return len(pairs) == len(a.unique()) == len(b.unique())


def test_segments_of_three_regions():
    f_BhwC, label = quadrants()
    eigen = laplacian_eigenvectors(feature_affinity(f_BhwC), 6)
    assert eigengap(eigen.values_Bk).tolist() == [3]
    found = segment(eigen.vectors_BkN, (12, 16), eigengap(eigen.values_Bk))
    assert same_partition(found, label)
    assert same_partition(segment(eigen.vectors_BkN, (12, 16), 3, unit_rows=True), label)
    # More segments than different points: as many as there are points.
    assert same_partition(segment(eigen.vectors_BkN[:, :3], (12, 16), 9), label)
    assert torch.equal(segment_masks(label)[0, 2], label[0] == 2)
    assert background_segment(label).tolist() == [0]


def test_unit_rows_keep_an_uneven_object_whole():
    vector = torch.full((1, 24), -0.66)
    vector[0, :4] = torch.tensor([1.5, 1.6, 5.0, 5.2])  # an object whose entries differ more than the groups do
    vectors = torch.stack([torch.ones_like(vector), vector], dim=1)
    sign = (vector > 0).long().view(1, 4, 6)
    assert same_partition(segment(vectors, (4, 6), 2, unit_rows=True), sign)
    assert not same_partition(segment(vectors, (4, 6), 2), sign)


def test_segment_refuses_what_cannot_be_cut():
    with pytest.raises(ValueError, match="no gaps"):
        eigengap(torch.zeros(1, 2))
    for vectors, count in ((torch.zeros(1, 1, 12), 2), (torch.zeros(1, 3, 12), 0), (torch.zeros(1, 3, 12), 13)):
        with pytest.raises(ValueError, match="cannot come from"):
            segment(vectors, (3, 4), count)


def coloured(label_HW, noise=0.03):
    colours = torch.tensor([[0.2, 0.3, 0.8], [0.9, 0.5, 0.1], [0.1, 0.7, 0.3]])
    return (colours[label_HW].permute(2, 0, 1) + noise * torch.randn(3, *label_HW.shape)).clamp(0, 1)


@pytest.mark.parametrize("size", [(48, 48), (40, 56)])
def test_crf_without_library_finds_outlines_and_keeps_segments(size):
    y, x = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    truth = (((y - 20).square() + (x - 22).square()) < 140).long()
    truth[30:36, 38:44] = 2  # a small segment
    coarse = F.avg_pool2d(F.one_hot(truth, 3).permute(2, 0, 1).float(), 8).argmax(0)
    coarse = coarse.repeat_interleave(8, 0).repeat_interleave(8, 1)
    coarse[32:34, 40:42] = 2
    refined = crf.refine(coarse[None], coloured(truth)[None], method="cells")[0]
    assert (refined == truth).float().mean() > 0.985 > (coarse == truth).float().mean()
    assert refined.unique().tolist() == [0, 1, 2]


def test_crf_cells_are_the_kernel_sum():
    """One mean-field step of tiny cells against sums over all pairs of pixels."""
    label, image = torch.randint(0, 2, (6, 7)), torch.rand(3, 6, 7)
    settings = crf.CrfSettings(bilateral_place=3.0, bilateral_colour=60.0, spatial_weight=0.0, iterations=1)
    p_KP = torch.where(F.one_hot(label, 2).permute(2, 0, 1).bool(), 0.7, 0.3).flatten(1)
    y, x = np.mgrid[:6, :7]
    point = np.concatenate([np.stack([y, x]).reshape(2, -1) / 3, image.flatten(1).numpy() * 255 / 60]).T
    kernel = np.exp(-0.5 * ((point[:, None] - point[None]) ** 2).sum(-1))
    root = kernel.sum(1) ** -0.5
    message = np.einsum("ij,kj->ki", root[:, None] * kernel * root, p_KP.numpy())
    expected = (np.log(p_KP.numpy()) + 10 * message).argmax(0).reshape(6, 7)
    assert (crf._with_cells(p_KP.view(2, 6, 7), image, settings).numpy() == expected).mean() > 0.95


def test_crf_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(crf.importlib.util, "find_spec", lambda name: None)
    label, image = torch.zeros(1, 8, 8, dtype=torch.int64), torch.rand(1, 3, 8, 8)
    with pytest.raises(ImportError, match="pydensecrf2"):
        crf.refine(label, image, method="pydensecrf")
    assert torch.equal(crf.refine(label, image), label)  # a single label has no outline
    with pytest.raises(ValueError, match="differ in size"):
        crf.refine(label, image[..., :4])


def test_matching_is_the_best_naming():
    confusion = torch.randint(0, 50, (4, 4))
    either = confusion.sum(1, keepdim=True) + confusion.sum(0, keepdim=True) - confusion
    iou = confusion / either
    best = max(itertools.permutations(range(4)), key=lambda names: sum(iou[k, j] for j, k in enumerate(names)))
    assert match_clusters(confusion).tolist() == list(best)
    assert match_clusters(confusion, fixed=(0,))[0] == 0


def test_clusters_from_segments_to_labels():
    segments = torch.tensor([[[0, 0, 0], [0, 1, 0], [0, 2, 0]], [[1, 1, 1], [1, 0, 1], [1, 1, 1]]])
    images = torch.rand(2, 3, 48, 48)
    images[0, :, 16:32, 16:32] = images[1, :, 16:32, 16:32] = torch.tensor([1.0, 0, 0])[:, None, None]
    found = embed_segments(load_featurizer(), images, segments, erode=0, dilate=0)
    assert found.image_R.tolist() == [0, 0, 1] and found.id_R.tolist() == [1, 2, 0]  # without the background
    expected = load_featurizer().describe(F.interpolate(images[:1, :, 16:32, 16:32], (48, 48), mode="bilinear"))
    assert_close(found.feature_RE[:1], expected, atol=1e-4, rtol=1e-4)
    labels = paint(segments, found, torch.tensor([3, 1, 3]))
    assert labels[0].tolist() == [[0, 0, 0], [0, 4, 0], [0, 2, 0]] and labels[1, 1, 1] == 4 and labels[1, 0, 0] == 0
    # Erosion that leaves nothing is not used; dilation widens the box.
    wide = embed_segments(load_featurizer(), images, segments, erode=2, dilate=1)
    assert len(wide.image_R) == 3 and not torch.allclose(wide.feature_RE[0], found.feature_RE[0], atol=1e-3)
    with pytest.raises(ValueError, match="nothing to cluster"):
        embed_segments(load_featurizer(), images, torch.zeros_like(segments))


def test_clusters_follow_the_features():
    group_R = torch.arange(30) % 3
    feature_RE = F.normalize(torch.eye(3, 8)[group_R] + 0.05 * torch.randn(30, 8), dim=-1)
    assert same_partition(cluster_segments(feature_RE, 3), group_R)
    with pytest.raises(ValueError, match="cannot form 31 clusters"):
        cluster_segments(feature_RE, 31)


def test_self_training_learns_and_is_reproducible():
    label = torch.zeros(8, 16, 24, dtype=torch.int64)
    label[:, 4:12, 6:18] = 1
    image = coloured(label[0])[None].repeat(8, 1, 1, 1)
    noisy = label.clone()
    noisy[torch.rand(label.shape) < 0.2] = 0  # wrong pseudo labels
    known = torch.randn(8, 2, 3, 5)
    first = self_train(image, known, noisy, 2, steps=40, batch=4, seed=3)
    again = self_train(image, known, noisy, 2, steps=40, batch=4, seed=3)
    if not torch.cuda.is_available():  # there gradients are added up in no fixed order
        assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values()))
    assert (predict(first, image, known) == label).float().mean() > 0.97 > (noisy == label).float().mean()
    assert SmallSegmenter(4, 5)(torch.rand(1, 3, 13, 17), known[:1]).shape == (1, 4, 13, 17)
    with pytest.raises(ValueError, match="differ in size"):
        self_train(image, known, noisy[:, :8], 2)
    with pytest.raises(ValueError, match=r"\[1\] are outside the 1 classes"):
        self_train(image, known, noisy, 1)


def test_soft_segments_follow_colours_between_patches():
    label = torch.zeros(24, 32, dtype=torch.int64)
    label[5:19, 7:21] = 1  # outlines inside patches of 8 pixels
    image = coloured(label, noise=0.01)[None]
    f_BhwC = F.avg_pool2d(F.one_hot(label, 2).permute(2, 0, 1).float()[None], 8).permute(0, 2, 3, 1) + 0.01
    eigen = soft_segments(f_BhwC, image, 2, tolerance=1e-4)
    assert eigen.vectors_BkN.shape == (1, 2, 24 * 32)
    assert ((eigen.vectors_BkN[0, 1] > 0).view(24, 32) == label.bool()).float().mean() > 0.97
    member = soft_memberships(eigen.vectors_BkN, label.flatten()[None])
    assert_close(member.sum(1), torch.ones(1, 24 * 32))
    assert ((member[0, 1] > 0.5).view(24, 32) == label.bool()).float().mean() > 0.97


def test_trimap_and_its_limits():
    mask = torch.zeros(20, 20, dtype=torch.bool)
    mask[:, :10] = True
    assert trimap(mask, 2)[7].tolist() == [1.0] * 8 + [0.5] * 4 + [0.0] * 8
    with pytest.raises(ValueError, match="no sure foreground"):
        trimap(torch.zeros(20, 20, dtype=torch.bool), 2)


@pytest.mark.slow
def test_matte_of_a_blended_edge():
    """Slow: PyMatting compiles itself on first import."""
    alpha = ((torch.arange(32) - 12) / 8).clamp(0, 1).expand(24, 32)
    image = (
        alpha * torch.tensor([0.9, 0.2, 0.1])[:, None, None]
        + (1 - alpha) * torch.tensor([0.1, 0.3, 0.8])[:, None, None]
    )
    found, front = matte(image, alpha > 0.5, unsure=6)
    assert (found - alpha).abs().max() < 0.05
    assert (front[:, alpha > 0.9].mean(1) - torch.tensor([0.9, 0.2, 0.1])).abs().max() < 0.05


# The graph spectral prompt.


def test_graph_prompt_filters_each_mode():
    basis = torch.linalg.qr(torch.randn(2, 12, 5))[0].transpose(1, 2)
    patches, cls = torch.randn(2, 3, 4, 6), torch.randn(2, 6)
    prompt = GraphPrompt(5, 6)
    expected = torch.zeros(2, 12, 6)
    for b in range(2):
        for mode in range(5):
            for d in range(6):
                share = (basis[b, mode] * patches[b, ..., d].flatten() * cls[b, d]).sum()
                expected[b, :, d] += basis[b, mode] * share * prompt.weight_mD[mode, d].detach()
    assert_close(prompt(patches, cls, basis).detach(), expected.view(2, 3, 4, 6))
    assert_close(prompt(patches, cls, -basis), prompt(patches, cls, basis))  # signs do not matter


def test_modes_are_orthonormal_eigenvectors_of_the_image():
    backbone = VisionBackbone(load_clip().model.visual)
    tokens, grid = backbone.embed(torch.rand(2, 3, 96, 104))
    basis = image_basis(backbone, tokens, grid, 6)
    assert_close(basis @ basis.transpose(1, 2), torch.eye(6).expand(2, 6, 6), atol=1e-4, rtol=0)
    assert not basis.requires_grad
    with pytest.raises(ValueError, match="eigenvectors of a graph"):
        image_basis(backbone, tokens, grid, 157)


def test_segmenter_with_a_graph_basis():
    model = build_segmenter(preset("spt_seg", prompt_basis="graph", graph_modes=4))
    image, text = torch.rand(1, 3, 64, 72), F.normalize(torch.randn(3, 128), dim=-1)
    names = [name for name in model.trainable() if "spectral" in name and "encoder" in name]
    assert names == ["encoder.spectral.0.weight_mD", "encoder.spectral.1.weight_mD"]
    model.open_gates(image)
    before = model.eval()(image, text)
    model(image, text).square().sum().backward()
    assert all(model.trainable()[name].grad.abs().max() > 0 for name in names)
    with torch.no_grad():
        for name in names:
            model.trainable()[name].zero_()
    assert not torch.allclose(model(image, text), before, atol=1e-6)  # the prompt mattered
    half = build_segmenter(preset("spt_seg", prompt_basis="graph", graph_modes=4), dtype=torch.bfloat16)
    assert half(image, text).isfinite().all()
