"""Graphs of patches and their eigenvectors: golden values, slow independent versions, and bad input."""

import numpy as np
import pytest
import scipy.linalg
import timm
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from sptseg_lib.graph import affinity as affinity_module
from sptseg_lib.graph.affinity import colour_affinity, combine, feature_affinity, image_affinity, pixel_affinity
from sptseg_lib.graph.eigen import fix_signs, laplacian_eigenvectors
from sptseg_lib.graph.features import Featurizer, load_featurizer
from sptseg_lib.graph.objects import corloc, largest_component, localise, mask_boxes, mask_iou, object_masks, true_boxes
from sptseg_lib.graph.operators import DenseAffinity, FeatureAffinity


@pytest.fixture(scope="module")
def golden(shared):
    file = np.load(shared / "golden" / "deep_spectral.npz")
    return {key: torch.tensor(file[key]) for key in file.files}


def golden_affinity(golden, colour_weight, storage="auto"):
    h, w, _ = golden["image_lowres"].shape
    image_13hw = golden["image_lowres"].float().permute(2, 0, 1)[None]
    features = feature_affinity(golden["features"].view(1, h, w, -1), storage=storage)
    return combine(features, colour_affinity(image_13hw), colour_weight)


def test_colour_affinity_equals_released_values(golden):
    image_13hw = golden["image_lowres"].float().permute(2, 0, 1)[None]
    assert_close(colour_affinity(image_13hw).dense()[0], golden["knn_affinity"], rtol=0, atol=0)


@pytest.mark.parametrize("colour_weight", [0, 10])
@pytest.mark.parametrize("solver", ["dense", "matrix-free"])
def test_eigenvectors_equal_released_values(golden, colour_weight, solver):
    storage = "dense" if solver == "dense" else "matrix-free"
    eigen = laplacian_eigenvectors(golden_affinity(golden, colour_weight, storage), 5, solver, tolerance=3e-6)
    assert (eigen.values_Bk[0] - golden[f"eigenvalues_color{colour_weight}"]).abs().max() <= 1e-4
    found, wanted = eigen.vectors_BkN[0], golden[f"eigenvectors_color{colour_weight}"]
    # The sign rule leaves the constant vector alone, whichever sign the solver gave it.
    wanted = torch.cat([wanted[:1].abs(), wanted[1:]])
    assert ((found - wanted).abs().amax(1) / wanted.abs().amax(1)).max() <= 1e-3


def random_features(B=2, h=12, w=13, C=8):
    """Smooth features with a few groups: their Laplacian has well separated small eigenvalues."""
    coarse = torch.randn(B, C, 3, 3)
    return (F.interpolate(coarse, (h, w), mode="bilinear") + 0.3 * torch.randn(B, C, h, w)).permute(0, 2, 3, 1)


def test_feature_affinity_is_clipped_cosine_similarity():
    f_BhwC = random_features(1, 3, 4)
    expected = torch.zeros(12, 12)
    vectors = f_BhwC.flatten(1, 2)[0]
    for i in range(12):
        for j in range(12):
            expected[i, j] = max(0.0, float(vectors[i] @ vectors[j] / vectors[i].norm() / vectors[j].norm()))
    assert_close(feature_affinity(f_BhwC).dense()[0], expected)
    assert expected.min() == 0 and feature_affinity(f_BhwC, clipped=False).dense().min() < -0.1


def test_colour_affinity_is_knn_by_loops():
    image_B3hw = torch.rand(2, 3, 5, 6)  # a batch: neighbours must stay within their image
    matrix_BNN = colour_affinity(image_B3hw).dense()
    for image_3hw, matrix_NN in zip(image_B3hw, matrix_BNN):
        expected = torch.zeros(30, 30)
        for k, weight in ((20, 2.0), (10, 0.1)):
            points = [
                torch.tensor([*image_3hw[:, y, x].tolist(), weight * x / 5, weight * y / 4])
                for y in range(5)
                for x in range(6)
            ]
            for i in range(30):
                distance = torch.stack([(points[i] - point).norm() for point in points])
                for j in distance.argsort()[:k]:
                    expected[i, j] += 1
                    expected[j, i] += 1
        assert_close(matrix_NN, expected)


@pytest.mark.parametrize("colour_weight", [0.0, 3.0])
def test_solvers_agree_with_scipy(colour_weight):
    f_BhwC, image = random_features(), torch.rand(2, 3, 24, 26)
    stored = image_affinity(f_BhwC, image, colour_weight, storage="dense")
    free = image_affinity(f_BhwC, image, colour_weight, storage="matrix-free")
    assert isinstance(getattr(stored, "first", stored), DenseAffinity)
    assert isinstance(getattr(free, "first", free), FeatureAffinity)
    results = [laplacian_eigenvectors(stored, 4, "dense"), laplacian_eigenvectors(free, 4, "matrix-free", 3e-6)]
    for b in range(2):
        w = stored.dense()[b].double().numpy()
        d = np.diag(w.sum(1))
        value, vector = scipy.linalg.eigh(d - w, d, subset_by_index=[0, 3])
        expected = fix_signs(torch.from_numpy(vector.T.copy()))
        expected[0] = expected[0].abs()
        for eigen in results:
            assert_close(eigen.values_Bk[b].double(), torch.from_numpy(value), rtol=0, atol=2e-5)
            assert_close(eigen.vectors_BkN[b].double(), expected, rtol=0, atol=2e-3 * float(expected.abs().max()))


def test_strips_do_not_change_a_product():
    f_BNC = F.normalize(random_features().flatten(1, 2), dim=-1)
    x_BNk = torch.randn(2, 156, 3)
    whole, strips = FeatureAffinity(f_BNC), FeatureAffinity(f_BNC, strip_bytes=10_000)
    assert_close(strips.product(x_BNk), whole.product(x_BNk))
    unclipped = FeatureAffinity(f_BNC, clipped=False)
    assert_close(unclipped.product(x_BNk), f_BNC @ f_BNC.transpose(1, 2) @ x_BNk)


def test_sparse_solver_agrees_with_dense():
    colours = colour_affinity(torch.rand(2, 3, 12, 12))
    sparse, dense = laplacian_eigenvectors(colours, 4, "sparse"), laplacian_eigenvectors(colours, 4, "dense")
    assert_close(sparse.values_Bk, dense.values_Bk, rtol=0, atol=1e-5)
    assert_close(sparse.vectors_BkN, dense.vectors_BkN, rtol=0, atol=1e-3 * float(dense.vectors_BkN.abs().max()))
    with pytest.raises(ValueError, match="factorises a sparse matrix"):
        laplacian_eigenvectors(feature_affinity(random_features()), 4, "sparse")


def test_same_input_gives_same_vectors():
    affinity = feature_affinity(random_features())
    first = laplacian_eigenvectors(affinity, 4, "matrix-free").vectors_BkN
    torch.manual_seed(7)
    assert torch.equal(laplacian_eigenvectors(affinity, 4, "matrix-free").vectors_BkN, first)


def test_image_in_a_batch_is_solved_as_if_alone():
    f_BhwC = random_features(3)
    together = laplacian_eigenvectors(feature_affinity(f_BhwC), 3, tolerance=2e-6)
    for b in range(3):
        alone = laplacian_eigenvectors(feature_affinity(f_BhwC[b : b + 1]), 3, tolerance=2e-6)
        assert_close(together.values_Bk[b], alone.values_Bk[0], rtol=0, atol=1e-5)
        assert_close(together.vectors_BkN[b], alone.vectors_BkN[0], rtol=0, atol=1e-3 * float(alone.vectors_BkN.max()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("storage", ["dense", "matrix-free"])
@pytest.mark.parametrize("colour_weight", [0.0, 3.0])
def test_a_gpu_finds_the_vectors_of_the_cpu(storage, colour_weight):
    f_BhwC, image = random_features(), torch.rand(2, 3, 24, 26)
    on_cpu, on_gpu = (
        laplacian_eigenvectors(image_affinity(f_BhwC.to(place), image.to(place), colour_weight, storage=storage), 3)
        for place in ("cpu", "cuda")
    )
    assert_close(on_gpu.values_Bk.cpu(), on_cpu.values_Bk, rtol=0, atol=1e-4)
    largest = float(on_cpu.vectors_BkN.abs().max())
    assert_close(on_gpu.vectors_BkN.cpu(), on_cpu.vectors_BkN, rtol=0, atol=2e-3 * largest)


def test_a_search_cut_short_says_so():
    with pytest.warns(UserWarning, match="approximate"):
        laplacian_eigenvectors(feature_affinity(random_features()), 3, "matrix-free", tolerance=1e-7, most_products=2)


def test_modes_of_a_grid_are_cosines():
    h, w = 4, 15
    w_NN = torch.zeros(h * w, h * w, dtype=torch.float64)
    for i in range(h):
        for j in range(w):
            for di, dj in ((0, 1), (1, 0)):  # a torus: every node has four neighbours
                other = ((i + di) % h) * w + (j + dj) % w
                w_NN[i * w + j, other] += 1
                w_NN[other, i * w + j] += 1
    eigen = laplacian_eigenvectors(w_NN[None], 3, "dense")
    expected = 1 - (torch.cos(torch.tensor(2 * np.pi / w)) + 1) / 2
    assert_close(eigen.values_Bk[0], torch.tensor([0.0, expected, expected], dtype=torch.float64), atol=1e-6, rtol=0)
    spectrum_hw = torch.fft.fft2(eigen.vectors_BkN[0, 1].view(h, w)).abs()
    assert (spectrum_hw > 1e-6).nonzero().tolist() == [[0, 1], [0, w - 1]]  # one wave along the longer side


def test_sign_rule():
    rows = torch.tensor([[1.0, 1.0, -1.0], [1.0, -1.0, -1.0], [1.0, 1.0, 1.0], [-1.0, -1.0, -1.0], [1.0, -1.0, 0.0]])
    expected = torch.tensor([-1.0, 1, 1, 1, 1])[:, None] * rows
    assert torch.equal(fix_signs(rows), expected)


def test_pixel_affinity_is_interpolated():
    f_BhwC, image = random_features(2, 3, 4), torch.rand(2, 3, 6, 9)
    dense = pixel_affinity(f_BhwC, image, 2.0).dense()
    one_hot = torch.eye(12).view(1, 12, 3, 4)
    up_PN = F.interpolate(one_hot, (6, 9), mode="bilinear", align_corners=False)[0].flatten(1).T
    coarse = feature_affinity(f_BhwC).dense()
    expected = up_PN @ coarse @ up_PN.T + 2 * colour_affinity(image).dense()
    assert_close(dense, expected)


# Bad input: a result or a clear error.


def test_constant_image_gives_a_result():
    f_BhwC = load_featurizer()(torch.full((1, 3, 64, 64), 0.5))
    eigen = laplacian_eigenvectors(image_affinity(f_BhwC, torch.full((1, 3, 64, 64), 0.5), 10.0), 4)
    assert eigen.vectors_BkN.isfinite().all() and eigen.values_Bk[0, 0].abs() < 1e-5
    equal = laplacian_eigenvectors(feature_affinity(torch.ones(1, 12, 12, 4)), 4, "matrix-free")
    assert_close(equal.values_Bk, torch.tensor([[0.0, 1, 1, 1]]), atol=1e-4, rtol=0)


def test_one_patch():
    f_BhwC = load_featurizer()(torch.rand(1, 3, 8, 8))
    affinity = image_affinity(f_BhwC, torch.rand(1, 3, 8, 8), 10.0)
    assert laplacian_eigenvectors(affinity, 1).vectors_BkN.shape == (1, 1, 1)
    with pytest.raises(ValueError, match="2 eigenvectors of a graph with 1 node"):
        laplacian_eigenvectors(affinity, 2)


@pytest.mark.parametrize("count", [0, 13])
def test_more_eigenvectors_than_nodes(count):
    with pytest.raises(ValueError, match="ask for 1 to 12"):
        laplacian_eigenvectors(feature_affinity(random_features(1, 3, 4)), count)
    assert laplacian_eigenvectors(feature_affinity(random_features(1, 3, 4)), 12).vectors_BkN.shape == (1, 12, 12)


def test_nan_is_named():
    f_BhwC = random_features()
    f_BhwC[0, 1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match="1 of 2496 feature values are NaN"):
        feature_affinity(f_BhwC)
    with pytest.raises(ValueError, match="pixel values are NaN"):
        colour_affinity(torch.full((1, 3, 4, 4), torch.nan))
    with pytest.raises(ValueError, match="NaN or infinite"):
        laplacian_eigenvectors(torch.full((1, 4, 4), torch.nan), 2)
    with pytest.raises(ValueError, match="pixel value"):
        load_featurizer()(torch.full((1, 3, 64, 64), torch.nan))


def test_grid_larger_than_memory(monkeypatch):
    monkeypatch.setattr(affinity_module, "free_memory", lambda device: 50_000)
    with pytest.raises(MemoryError, match="storage='matrix-free'"):
        feature_affinity(random_features(), storage="dense")
    assert isinstance(feature_affinity(random_features()), FeatureAffinity)


@pytest.mark.parametrize("solver", ["dense", "matrix-free"])
def test_disconnected_graph(solver):
    w_NN = torch.block_diag(torch.ones(80, 80), torch.ones(90, 90), torch.zeros(1, 1))  # two parts and a lone node
    eigen = laplacian_eigenvectors(w_NN[None], 3, solver)
    assert_close(eigen.values_Bk, torch.tensor([[0.0, 0.0, 1.0]]), atol=1e-4, rtol=0)
    constant, parts = eigen.vectors_BkN[0, :2]
    assert constant[:170].std() < 1e-6 and constant[170] == 0
    assert (parts[:80] > 0).all() and (parts[80:170] < 0).all()  # the smaller part is positive


def test_sparse_solver_on_a_disconnected_graph():
    dark, light = torch.rand(1, 3, 12, 6) * 0.1, torch.rand(1, 3, 12, 6) * 0.1 + 50  # too far apart for any edge
    eigen = laplacian_eigenvectors(colour_affinity(torch.cat([dark, light], dim=3)), 3, "sparse")
    assert eigen.values_Bk[0, :2].abs().max() < 1e-5 < eigen.values_Bk[0, 2]
    assert eigen.vectors_BkN[0, 0].std() < 1e-6


def test_negative_degrees_are_refused():
    f_BhwC = torch.tensor([[1.0, 0.0], [-1.0, 0.1], [-1.0, -0.1]]).view(1, 1, 3, 2)
    with pytest.raises(ValueError, match="Clip the affinity"):
        laplacian_eigenvectors(feature_affinity(f_BhwC, clipped=False), 2)


def test_non_square_images_and_wrong_colours():
    image = torch.rand(1, 3, 32, 72)
    f_BhwC = load_featurizer()(image)
    assert f_BhwC.shape[1:3] == (4, 9)
    located = localise(laplacian_eigenvectors(image_affinity(f_BhwC, image, 5.0), 3).vectors_BkN, (4, 9), 8)
    assert located.mask_Bhw.shape == (1, 4, 9) and (located.box_B4[0, 2:] <= torch.tensor([72, 32])).all()
    with pytest.raises(ValueError, match="multiples of 8"):
        load_featurizer()(torch.rand(1, 3, 32, 70))
    with pytest.raises(ValueError, match="needs the image"):
        image_affinity(f_BhwC, None, 1.0)
    with pytest.raises(ValueError, match="would join other patches"):
        combine(feature_affinity(f_BhwC), colour_affinity(torch.rand(1, 3, 9, 5)), 1.0)
    with pytest.raises(ValueError, match="push like colours apart"):
        combine(feature_affinity(f_BhwC), None, -1.0)


# Features.


def test_open_clip_features_by_hand():
    featurizer, image = load_featurizer(), torch.rand(2, 3, 64, 48)
    caught = []
    block = featurizer.blocks[2]
    hook = block.ln_1.register_forward_hook(lambda module, inputs, output: caught.append(output))
    featurizer.describe(image)
    hook.remove()
    weight, bias = block.attn.in_proj_weight, block.attn.in_proj_bias
    for place, kind in enumerate(("query", "key", "value")):
        rows = slice(128 * place, 128 * (place + 1))
        expected = F.normalize(caught[0][:, 1:] @ weight[rows].T + bias[rows], dim=-1).view(2, 8, 6, 128)
        assert_close(featurizer(image, kind, block=3), expected.detach())


def test_timm_features_by_hand():
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True, depth=2).eval()
    featurizer, image = Featurizer("tiny", vit, 16, (0.5,) * 3, (0.5,) * 3), torch.rand(1, 3, 32, 48)
    tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(2 * image - 1)))
    block = vit.blocks[0]
    expected = (block.attn.qkv(block.norm1(tokens)))[:, 1:, 192:384]
    assert_close(featurizer(image, "key", 1), F.normalize(expected, dim=-1).view(1, 2, 3, 192).detach())
    assert_close(featurizer(image, "token", 1), F.normalize(block(tokens)[:, 1:], dim=-1).view(1, 2, 3, 192).detach())
    assert featurizer.describe(image).shape == (1, 192)


def test_unknown_features_are_named():
    with pytest.raises(ValueError, match="no kind 'keys'"):
        load_featurizer()(torch.rand(1, 3, 16, 16), "keys")
    with pytest.raises(ValueError, match="block 7"):
        load_featurizer()(torch.rand(1, 3, 16, 16), block=7)
    with pytest.raises(ValueError, match="no ViT 'dino'"):
        load_featurizer("dino")
    with pytest.raises(ValueError, match="no plain ViT"):
        load_featurizer("timm/resnet18", "random")


def test_weights_that_cannot_be_fetched(monkeypatch):
    def offline(*arguments, **named):
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ConnectionError, match="pass weights=PATH"):
        load_featurizer("dino_vits16")


# Objects.


def test_largest_component_and_its_box():
    mask = torch.zeros(3, 4, 5, dtype=torch.bool)
    mask[0, 0, 0] = mask[0, 2:, 3:] = mask[1, :, 4] = True  # the last column of image 0 touches nothing of image 1
    kept = largest_component(mask)
    assert kept[0].sum() == 4 and not kept[0, 0, 0] and torch.equal(kept[1], mask[1]) and not kept[2].any()
    assert mask_boxes(kept, 8).tolist() == [[24, 16, 40, 32], [32, 0, 40, 32], [0, 0, 0, 0]]


def test_corloc_by_hand():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 10]])
    truth = [torch.tensor([[0.0, 0, 10, 20]]), torch.tensor([[0.0, 0, 10, 21], [50, 50, 60, 60]]), torch.zeros(0, 4)]
    assert corloc(boxes, truth) == 0.5  # IoU 1/2 counts, 10/21 does not, and an empty image is left out
    with pytest.raises(ValueError, match="CorLoc is not defined"):
        corloc(boxes[:1], [torch.zeros(0, 4)])


def test_true_boxes_of_a_label_map():
    label = torch.full((2, 20, 30), 12, dtype=torch.uint8)
    label[0, 2:5, 3:9] = 4
    label[0, 10:14, 3:9] = 4
    label[0, 10:14, 9:12] = 5  # another class beside it
    label[0, 0, 0] = 3  # too small to count
    boxes = true_boxes(label, range(10))
    assert sorted(boxes[0].tolist()) == [[3, 2, 9, 5], [3, 10, 9, 14], [9, 10, 12, 14]]
    assert len(boxes[1]) == 0


def test_object_of_two_groups_of_features():
    f_BhwC = torch.zeros(1, 6, 8, 2) + torch.tensor([1.0, 0.1])
    f_BhwC[0, 1:4, 2:5] = torch.tensor([0.1, 1.0])
    eigen = laplacian_eigenvectors(feature_affinity(f_BhwC), 2)
    located = localise(eigen.vectors_BkN, (6, 8), 8)
    assert located.box_B4.tolist() == [[16, 8, 40, 32]]
    truth = torch.zeros(1, 48, 64, dtype=torch.bool)
    truth[0, 8:32, 16:40] = True
    masks = object_masks(eigen.vectors_BkN, (6, 8), (48, 64))
    assert mask_iou(masks, truth) == 1
    assert mask_iou(truth[:, :1], truth[:, :1]) == 1 and mask_iou(truth, ~truth) == 0
    with pytest.raises(ValueError, match="do not fit a grid"):
        localise(eigen.vectors_BkN, (6, 7), 8)
