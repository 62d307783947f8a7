"""CLIP's weights in every form in which they are given away, and the activation that they were trained with."""

import os
import pickle
import shutil
import warnings
import zipfile

import open_clip
import pytest
import torch
from open_clip import factory, pretrained
from safetensors.torch import save_file

from sptseg_lib.clip import load
from sptseg_lib.clip.backbone import VisionBackbone
from sptseg_lib.clip.load import load_clip
from sptseg_lib.clip.text import class_text
from sptseg_lib.clip.torchscript import is_torchscript, read_torchscript
from sptseg_lib.clip.weights import OPENAI_NUMBERS, read_weights
from sptseg_lib.model import build_segmenter
from sptseg_lib.settings import preset

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 9, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
}
SIZES = {"input_resolution": 32, "context_length": 9, "vocab_size": 49408}
QUICK, PLAIN = "ViT-Nano-quickgelu", "ViT-Nano"


@pytest.fixture(autouse=True)
def nano(monkeypatch):
    """Two more models in open_clip's list, small enough to be written and read in an instant."""
    monkeypatch.setitem(factory._MODEL_CONFIGS, PLAIN, CONFIG)
    monkeypatch.setitem(factory._MODEL_CONFIGS, QUICK, {**CONFIG, "quick_gelu": True})


def network(quick: bool = True) -> open_clip.CLIP:
    return open_clip.CLIP(**CONFIG, quick_gelu=quick).eval()


def write_archive(path, model, numbers=True):
    """As OpenAI wrote its files: traced, half precision, three numbers among the weights."""
    state = {name: value.half() for name, value in model.state_dict().items()}
    for name, value in SIZES.items() if numbers else ():
        if hasattr(model, name):
            delattr(model, name)
        model.register_buffer(name, torch.tensor(value))
    inputs = {"encode_image": torch.zeros(1, 3, 32, 32), "encode_text": torch.zeros(1, 9, dtype=torch.int64)}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # TorchScript is deprecated; OpenAI's files stay what they are
        traced = torch.jit.trace_module(model, inputs, check_trace=False).half()
        torch.jit.save(traced, path)
        read = torch.jit.load(path).state_dict()
    return state, read


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """OpenAI's form: its path, the weights in it, and what torch's own reader makes of it."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("openai") / "ViT-Nano.pt"
    return path, *write_archive(path, network())


def encoded(model):
    """What a model makes of one picture and one text."""
    torch.manual_seed(3)
    with torch.no_grad():
        return model.encode_image(torch.randn(1, 3, 32, 32)), model.encode_text(torch.arange(9)[None])


def assert_computes(clip, state, quick=True):
    """The model is float32 and computes what a network of these weights computes."""
    expected = network(quick)
    expected.load_state_dict(state)
    assert {p.dtype for p in clip.model.parameters()} == {torch.float32} and not clip.model.training
    for actual, wanted in zip(encoded(clip.model), encoded(expected), strict=True):
        torch.testing.assert_close(actual, wanted)


def test_an_archive_is_read_as_torch_reads_it(archive):
    path, state, expected = archive
    actual, classes = read_torchscript(path)
    assert is_torchscript(path) and "QuickGELU" in " ".join(classes)
    assert actual.keys() >= expected.keys() and OPENAI_NUMBERS <= actual.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype and torch.equal(actual[name], value), name
    assert {name: int(actual[name]) for name in SIZES} == SIZES
    assert actual["visual.conv1.weight"].dtype == torch.float16
    tensors, activation = read_weights(path)
    assert activation == "quickgelu" and tensors.keys() >= state.keys() and not OPENAI_NUMBERS & tensors.keys()


def test_openais_archive_becomes_a_float32_model(archive):
    path, state, _ = archive
    clip = load_clip(QUICK, str(path))
    assert_computes(clip, state)
    assert clip.mean == open_clip.OPENAI_DATASET_MEAN
    assert class_text(clip, ("cat", "dog")).shape == (2, 16)


@pytest.mark.parametrize("form", ["plain.pt", "module.pt", "weights.safetensors", "half.safetensors"])
@pytest.mark.parametrize(("name", "stated"), [(QUICK, "quickgelu"), (PLAIN, "gelu")])
def test_state_dicts_need_their_activation_stated(tmp_path, form, name, stated):
    path, state = tmp_path / form, network().state_dict()
    if form == "module.pt":  # as open_clip's training writes it from several GPUs
        wrapped = {f"module.{key}": value for key, value in state.items()}
        torch.save({"epoch": 3, "name": "run", "state_dict": wrapped}, path)
    elif form == "plain.pt":
        torch.save(state, path)
    else:
        state = {key: value.half() if form.startswith("half") else value for key, value in state.items()}
        save_file(state, path)
    with pytest.raises(ValueError, match=f"{form} does not say which activation.*state it: activation='quickgelu'"):
        load_clip(name, str(path))
    assert_computes(load_clip(name, str(path), stated), state, quick=name == QUICK)
    other = {"gelu": "quickgelu", "quickgelu": "gelu"}[stated]
    with pytest.raises(ValueError, match=f"{name} computes .*GELU, but {form} was trained with .*choose ViT-Nano"):
        load_clip(name, str(path), other)


def test_a_runs_settings_state_the_activation(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(network().state_dict(), path)
    bare = {"clip": QUICK, "weights": str(path), "grid": 2}
    with pytest.raises(ValueError, match="weights.safetensors does not say which activation"):
        build_segmenter(preset("spt_seg", **bare))
    assert build_segmenter(preset("spt_seg", **bare, activation="quickgelu")).patch == 16
    with pytest.raises(ValueError, match="activation='relu'"):
        preset("spt_seg", **bare, activation="relu")


def test_openais_weights_are_refused_by_a_model_that_computes_gelu(archive):
    path, _, _ = archive
    expected = "ViT-Nano computes GELU, but ViT-Nano.pt was trained with QuickGELU.*choose ViT-Nano-quickgelu"
    with pytest.raises(ValueError, match=expected):
        load_clip(PLAIN, str(path))
    with pytest.raises(ValueError, match="activation='gelu' contradicts ViT-Nano.pt, .*QuickGELU"):
        load_clip(QUICK, str(path), "gelu")


def test_openais_numbers_tell_the_activation_of_a_state_dict(tmp_path, archive):
    path = tmp_path / "openai_state_dict.pt"
    torch.save(archive[2], path)
    assert_computes(load_clip(QUICK, str(path)), archive[1])
    with pytest.raises(ValueError, match="computes GELU, but openai_state_dict.pt was trained with QuickGELU"):
        load_clip(PLAIN, str(path))


@pytest.mark.parametrize("quick", [True, False])
def test_an_archive_names_its_activation_by_its_classes(tmp_path, quick):
    path = tmp_path / "traced.pt"
    write_archive(path, network(quick), numbers=False)
    assert read_weights(path).activation == ("quickgelu" if quick else "gelu")


def test_the_config_beside_a_file_is_believed(tmp_path):
    path, state = tmp_path / "open_clip_model.safetensors", network().state_dict()
    save_file(state, path)
    config = tmp_path / "open_clip_config.json"
    config.write_text(
        '{"model_cfg": {"quick_gelu": true}, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}}'
    )
    clip = load_clip(QUICK, str(path))
    assert_computes(clip, state)
    assert clip.mean == (0.1, 0.2, 0.3) and clip.std == (1, 1, 1)
    with pytest.raises(ValueError, match="ViT-Nano computes GELU, but open_clip_model.safetensors was trained with Qu"):
        load_clip(PLAIN, str(path))
    config.write_text('{"model')
    with pytest.raises(ValueError, match="open_clip_config.json is damaged"):
        load_clip(QUICK, str(path), "quickgelu")


@pytest.fixture
def tagged(monkeypatch, archive):
    """The tag openai, whose file needs no download, listed as open_clip lists it."""
    entry = {"file": str(archive[0]), "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2), "quick_gelu": True}
    monkeypatch.setitem(pretrained._PRETRAINED, QUICK, {"openai": entry})


def test_a_tag_is_loaded_with_its_pixel_statistics(tagged, archive):
    clip = load_clip(QUICK, "openai")
    assert_computes(clip, archive[1])
    assert clip.mean == (0.5, 0.5, 0.5) and clip.std == (0.2, 0.2, 0.2)


def test_a_tag_of_the_other_activation_is_refused_before_any_download(tagged, monkeypatch):
    monkeypatch.setattr(load, "download_pretrained", lambda entry: pytest.fail("downloaded first"))
    with pytest.raises(ValueError, match="ViT-Nano computes GELU, but 'openai' was trained with QuickGELU.*Nano-qu"):
        load_clip(PLAIN, "openai")
    # The same of models that exist.
    with pytest.raises(ValueError, match="ViT-B-16 computes GELU, but 'openai' was trained with QuickGELU"):
        load_clip("ViT-B-16", "openai")
    with pytest.raises(ValueError, match="ViT-B-16-quickgelu computes QuickGELU, but 'laion2b_s34b_b88k' .* GELU"):
        load_clip("ViT-B-16-quickgelu", "laion2b_s34b_b88k")


def test_a_download_that_fails_says_what_to_do_instead(tagged, monkeypatch):
    def fail(entry):
        raise FileNotFoundError("no route to the hub")

    monkeypatch.setattr(load, "download_pretrained", fail)
    load._load.cache_clear()
    with pytest.raises(ConnectionError, match="of ViT-Nano-quickgelu cannot be downloaded: no route.*its path"):
        load_clip(QUICK, "openai")


def test_a_model_without_weights_must_be_asked_for():
    with pytest.raises(ValueError, match="ViT-B-16-quickgelu without weights is a random network.*openai.*'random'"):
        load_clip("ViT-B-16-quickgelu")
    with pytest.raises(ValueError, match="ViT-Nano without weights .*it has none.*'random'"):
        load_clip(PLAIN)


def test_random_weights_are_the_same_every_time_and_disturb_no_other_numbers():
    before = torch.get_rng_state()
    first = load_clip(QUICK, "random").model.state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)
    load._load.cache_clear()
    again = load_clip(QUICK, "random").model.state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


def repacked(path, target, changes, compression=zipfile.ZIP_STORED):
    """A copy of an archive with records replaced (bytes) or left out (None), by the ends of their names."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            content = next((c for end, c in changes.items() if name.endswith(end)), old.read(name))
            if content is not None:
                new.writestr(name, content)
    return target


class Intruder:
    """Unpickling it would make a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_an_archive_is_not_run(tmp_path, archive):
    content = pickle.dumps(Intruder(tmp_path / "hacked"))
    path = repacked(archive[0], tmp_path / "bad.pt", {"/data.pkl": content})
    with pytest.raises(ValueError, match="bad.pt .* cannot be read: it asks for (posix|nt).mkdir"):
        load_clip(QUICK, str(path))
    assert not (tmp_path / "hacked").exists()


def test_programs_of_an_archive_are_not_even_read(tmp_path, archive):
    """torch's own reader compiles code/; this one does not notice that it is gone."""
    with zipfile.ZipFile(archive[0]) as old:
        programs = {name: None for name in old.namelist() if "/code/" in name}
    assert programs
    assert_computes(load_clip(QUICK, str(repacked(archive[0], tmp_path / "no_code.pt", programs))), archive[1])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"/data/0": None}, "data/0"),
        ({"/data/0": b"xx"}, "out of bounds|setStorage|storage"),
        ({"/data.pkl": None}, "data.pkl"),
        ({"/data.pkl": b""}, "Ran out of input"),
        ({"/data.pkl": pickle.dumps([1, 2])}, "attributes"),
    ],
    ids=["no storage", "short storage", "no tree", "empty tree", "a list"],
)
def test_a_damaged_archive_is_refused(tmp_path, archive, changes, named):
    with pytest.raises(ValueError, match=f"bad.pt .* cannot be read: .*({named}).*truncated or damaged"):
        read_weights(repacked(archive[0], tmp_path / "bad.pt", changes))


def test_truncated_changed_and_bursting_archives_are_refused(tmp_path, archive):
    whole = archive[0].read_bytes()
    path = tmp_path / "bad.pt"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="bad.pt .* cannot be read"):
        read_weights(path)
    with zipfile.ZipFile(archive[0]) as old:
        start = max(old.infolist(), key=lambda record: record.file_size).header_offset
    path.write_bytes(whole[: start + 5000] + b"\xff" + whole[start + 5001 :])
    with pytest.raises(ValueError, match="bad.pt .* cannot be read: Bad CRC-32"):
        read_weights(path)
    packed = repacked(archive[0], tmp_path / "packed.pt", {"/data/0": bytes(20_000_000)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="packed.pt .* cannot be read: data/0 unpacks to more bytes than the whole"):
        read_weights(packed)


def test_weights_of_another_architecture_are_refused(monkeypatch, tmp_path, archive):
    wider = {**CONFIG, "quick_gelu": True, "vision_cfg": {**CONFIG["vision_cfg"], "patch_size": 8}}
    monkeypatch.setitem(factory._MODEL_CONFIGS, "ViT-Other-quickgelu", wider)
    path = shutil.copy(archive[0], tmp_path / "nano.pt")
    with pytest.raises(ValueError, match="nano.pt holds another architecture than ViT-Other-quickgelu .*visual"):
        load_clip("ViT-Other-quickgelu", str(path))


@pytest.mark.parametrize(("name", "width", "joint"), [("ViT-B-32", 768, 512), ("ViT-L-14", 1024, 768)])
def test_other_vits_work_at_random(monkeypatch, name, width, joint):
    """Real widths, heads and patches, with two layers of each tower kept."""
    config = open_clip.get_model_config(name)
    for tower in ("vision_cfg", "text_cfg"):
        config[tower] |= {"layers": 2}
    monkeypatch.setitem(factory._MODEL_CONFIGS, f"shallow-{name}", config)
    clip = load_clip(f"shallow-{name}", "random")
    backbone = VisionBackbone(clip.model.visual).eval()
    assert (backbone.width, backbone.joint) == (width, joint)
    side = clip.model.visual.image_size[0]
    with torch.no_grad():
        image = torch.randn(1, 3, side, side)
        torch.testing.assert_close(backbone(image)[:, 0], clip.model.encode_image(image), atol=1e-4, rtol=1e-4)
    segmenter = build_segmenter(preset("spt_seg", grid=4, prompt_tokens=3), clip).eval()
    text_KE = class_text(clip, ("cat", "dog", "grass"))
    with torch.no_grad():
        logits = segmenter(torch.rand(2, 3, 4 * backbone.patch, 5 * backbone.patch), text_KE)
    assert logits.shape == (2, 3, 4, 5) and logits.isfinite().all()


def test_a_model_that_is_no_plain_vit_is_refused():
    with pytest.raises(ValueError, match="not a plain ViT"):
        load_clip("RN50", "random")
