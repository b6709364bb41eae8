"""The detector as a file and as Python: what is loaded says what was saved, and nothing that a file asks for is run."""

import io
import os
import pickle
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import vae_ood
from tests.conftest import ROOT
from vae_ood import UserError
from vae_ood.data.images import Images, convert
from vae_ood.data.own import sized
from vae_ood.detector import WORDS, Detector
from vae_ood.member import Member
from vae_ood.metrics import benjamini_hochberg, conformal_p_values
from vae_ood.model import VAE
from vae_ood.scores import COMPONENTS, PATCHES, SCORES

SHAPE = (3, 16, 12)
CONFIG = {"data": "x", "shape": list(SHAPE), "alpha": 0.1, "kappa": 4, "seed": 0, "dequantize": False, "range": None,
          "group_by": "none", "images_crc32": 1}


def pictures(n, seed=0):
    """Smooth pictures of a few random colours, uint8 [n, *SHAPE]."""
    rng = np.random.default_rng(seed)
    rows = np.linspace(0, 1, SHAPE[1])[:, None] * np.ones(SHAPE[2])
    base = rng.uniform(40, 200, (n, 3, 1, 1)) + rng.uniform(-40, 40, (n, 3, 1, 1)) * rows
    return torch.from_numpy((base + rng.normal(0, 3, (n, *SHAPE))).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    model = VAE(SHAPE, 0.1, 4, 0.01).eval().requires_grad_(False)
    args = SimpleNamespace(max_images=None, iw_samples=2)
    members = [Member.fit(model, CONFIG, {
        "train": Images("train", pictures(300, seed)), "test": Images("test", pictures(99, 10 + seed), groups=np.arange(
            99) // 2)}, list(SCORES), args) for seed in (0, 1)]
    return Detector.of(CONFIG, members, args)


@pytest.fixture(scope="module")
def saved(detector, tmp_path_factory):
    path = tmp_path_factory.mktemp("detector") / "detector.pt"
    detector.save(path)
    return path


def test_what_is_loaded_says_bit_for_bit_what_was_saved(detector, saved):
    again, new = Detector.load(saved), Images("new", pictures(20, 5))
    for ours, theirs in zip(detector.say(new), again.say(new), strict=True):
        assert list(ours) == list(theirs) and {f"default.{name}" for name in COMPONENTS} <= set(ours)
        for name, values in ours.items():
            np.testing.assert_array_equal(values, theirs[name], name)
    for ours, theirs in zip(detector.compare(new.pixels), again.compare(new.pixels), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(detector.map(new.pixels), again.map(new.pixels))
    assert 0 < detector.map_threshold(0.05) == again.map_threshold(0.05) < detector.map_threshold(0.01) == np.inf
    assert again.things == detector.things == 100 and again.scores == list(SCORES)


def test_other_threads_and_another_place_change_nothing_to_speak_of(detector, saved, tmp_path):
    code = ("import sys, numpy, torch; torch.set_num_threads(2); sys.path.insert(0, sys.argv[1])\n"
            "from vae_ood.detector import Detector\n"
            "found = Detector.load(sys.argv[2]); x = numpy.load(sys.argv[3])\n"
            "numpy.save(sys.argv[4], numpy.stack([found.decision_function(x), found.p_value(x)]))")
    new = pictures(20, 5).numpy()
    np.save(tmp_path / "new.npy", new)
    subprocess.run([sys.executable, "-c", code, ROOT, saved, tmp_path / "new.npy", tmp_path / "out.npy"], check=True,
                   cwd=tmp_path)
    scores, p = np.load(tmp_path / "out.npy")
    np.testing.assert_allclose(scores, detector.decision_function(new), rtol=1e-5)
    assert abs(p - detector.p_value(new)).max() <= 1 / 101 + 1e-9


def test_every_kind_of_images_is_the_same(detector, tmp_path):
    pixels = pictures(6, 7)
    expected, hwc = detector.decision_function(pixels), pixels.permute(0, 2, 3, 1).numpy()
    kept = [Image.fromarray(one) for one in hwc]
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    for path, picture in zip(paths, kept, strict=True):
        picture.save(path)
    for images in (pixels.numpy(), hwc, hwc / 255, torch.from_numpy(hwc), paths, [str(path) for path in paths], kept):
        np.testing.assert_array_equal(detector.decision_function(images), expected)
    large = pictures(6, 7).repeat_interleave(2, 2).repeat_interleave(3, 3)
    np.testing.assert_array_equal(detector.decision_function(large), detector.decision_function(convert(large, SHAPE)))
    for images, words in (([], "no images"), ("a.png", "a list of paths"), (hwc[0], "may be one picture"),
                          (hwc.astype(float), "scale floats"), ([tmp_path / "none.png"], "cannot decode")):
        with pytest.raises(UserError, match=words):
            detector.decision_function(images)


def test_p_values_flags_and_reasons(detector):
    new = torch.cat([pictures(30, 8), torch.randint(256, (10, *SHAPE), dtype=torch.uint8)])
    p, scores = detector.p_value(new), detector.decision_function(new)
    assert (p > 1 / 101 - 1e-9).all() and (p <= 1).all() and scores[30:].min() > scores[:30].max()
    np.testing.assert_array_equal(detector.predict(new, fpr=0.1), p <= 0.1)
    np.testing.assert_array_equal(detector.predict(new, fdr=0.2), benjamini_hochberg(p, 0.2))
    found = detector.explain(new)
    assert {*COMPONENTS, PATCHES} == set(WORDS)
    assert [one["p_value"] for one in found] == p.tolist() and set(found[0]["components"]) == {*COMPONENTS, PATCHES}
    for one in found:
        assert one["reconstruction"].shape == (16, 12, 3) and one["speaks"] in WORDS.values()
        assert one["components"][next(name for name in WORDS if WORDS[name] == one["speaks"])] == min(
            one["components"].values())
    assert detector.explain(pictures(300)[:1])[0]["known"] and not found[-1]["known"]


def refused(path):
    with pytest.raises(UserError) as error:
        Detector.load(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_files_that_are_no_detector_are_refused_by_name(saved, tmp_path):
    def changed(name, change):
        state = torch.load(saved, weights_only=True)
        change(state)
        torch.save(state, tmp_path / name)
        return tmp_path / name

    assert "there is no detector" in refused(tmp_path / "none.pt")
    assert "newer vae-ood" in refused(changed("newer.pt", lambda state: state.update(detector=99)))
    assert "older vae-ood: fit it anew" in refused(changed("older.pt", lambda state: state.update(detector=2)))
    assert "is not a detector" in refused(changed("ckpt.pt", lambda state: state.pop("detector")))
    for change in (lambda s: s.pop("members"), lambda s: s["config"].update(kappa=5), lambda s: s.update(members=[]),
                   lambda s: s["members"][0]["said"]["nll"].fill_(float("nan")),
                   lambda s: s["members"][0]["model"]["log_gamma"].fill_(float("inf")),
                   lambda s: s["members"][0]["scores"]["layout"].pop("density.mean"),
                   lambda s: s["members"][0]["scores"].update(unknown={}),
                   lambda s: s["members"][0]["maps"].pop("mean"),
                   lambda s: s["members"][0]["peaks"].fill_(float("nan")),
                   lambda s: s["members"][0].update(groups=torch.zeros(3))):
        assert "damaged" in refused(changed("damaged.pt", change))
    content = bytearray(saved.read_bytes())
    content[len(content) // 2] ^= 255
    (tmp_path / "bit.pt").write_bytes(content)
    assert "foreign or damaged" in refused(tmp_path / "bit.pt")
    (tmp_path / "cut.pt").write_bytes(saved.read_bytes()[:-1000])
    assert "foreign or damaged" in refused(tmp_path / "cut.pt")


def test_a_file_that_asks_to_run_code_runs_nothing(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"detector": 1, "members": Hostile()}, tmp_path / "hostile.pt")
    assert "asks to run code" in refused(tmp_path / "hostile.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Hostile()))
    refused(tmp_path / "pickle.pt")
    assert not (tmp_path / "ran").exists()


def test_a_detector_of_alpha_1_is_at_most_30_megabytes():
    rng = np.random.default_rng(0)
    train, test = (Images("x", torch.from_numpy(rng.integers(0, 256, (n, 3, 32, 32), np.uint8))) for n in (1000, 100))
    args = SimpleNamespace(max_images=None, iw_samples=1)
    config = CONFIG | {"shape": [3, 32, 32], "alpha": 1.0, "kappa": 32}
    model = VAE((3, 32, 32), 1.0, 32).eval().requires_grad_(False)
    state = Member.fit(model, config, {"train": train, "test": test}, ["default"], args).state()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    # of 50,000 training images, 30,000 of which the scores are fitted to: a sketch and a digest each, ECOD's columns
    grown = 49_000 * (64 * 2 + 8) + 29_000 * 8 * (3 * 0.8 + 5 * 0.2)
    assert buffer.tell() + grown < 30e6


def test_benjamini_hochberg_is_the_step_up_procedure():
    p = np.array([0.001, 0.04, 0.012, 0.9, 0.03, 0.2])
    # sorted: .001 .012 .03 .04 .2 .9 against i 0.06 / 6 = .01 .02 .03 .04 .05 .06: the fourth is within
    assert benjamini_hochberg(p, 0.06).tolist() == [True, True, True, False, True, False]
    assert not benjamini_hochberg(np.array([0.5, 0.6]), 0.1).any() and benjamini_hochberg(np.array([0.05]), 0.05).all()


def test_of_the_flagged_at_most_the_asked_share_is_ordinary():
    """Conformal p-values with the calibration drawn anew each time: 200 new things, 40 of them outliers."""
    rng, fdr, shares = np.random.default_rng(0), 0.2, []
    for _ in range(400):
        calibration = np.sort(rng.standard_normal(199))
        new = np.r_[rng.standard_normal(160), rng.standard_normal(40) + 3]
        p = (1 + len(calibration) - np.searchsorted(calibration, new)) / 200
        flagged = benjamini_hochberg(p, fdr)
        shares.append(flagged[:160].sum() / max(1, flagged.sum()))
    assert 0.5 * fdr < np.mean(shares) < fdr * 0.8 + 3 * np.std(shares) / 20  # proven: at most fdr times 160 / 200


def test_the_example_of_the_page_runs(saved, tmp_path):
    example, = re.findall(r"```python\n(.*?)```", (ROOT / "vae_ood/README.md").read_text(), re.DOTALL)
    saved_here = tmp_path / "detector.pt"
    saved_here.write_bytes(saved.read_bytes())
    np.save(tmp_path / "images.npy", pictures(3, 9).numpy())
    code = f"import numpy, sys\nsys.path.insert(0, {str(ROOT)!r})\nimages = numpy.load('images.npy')\n{example}"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.count("\n") == 3, result.stderr


def test_importing_the_package_imports_no_torch():
    code = "import sys, vae_ood; assert 'torch' not in sys.modules; vae_ood.Detector; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    with pytest.raises(AttributeError, match="nothing"):
        vae_ood.nothing  # noqa: B018


def test_fit_trains_as_the_command_does(tmp_path, capsys):
    found = Detector.fit(pictures(120), alpha=0.05, kappa=3, iters=20, groups=np.arange(120), device="cpu")
    assert capsys.readouterr().out == "" and found.things == 19
    found.save(tmp_path / "d.pt")
    again = Detector.load(tmp_path / "d.pt")
    np.testing.assert_array_equal(again.p_value(pictures(5, 3)), found.p_value(pictures(5, 3)))
    with pytest.raises(UserError, match="three are needed"):
        Detector.fit(pictures(5), groups=[0, 0, 1, 1, 1])


def test_fit_takes_pictures_of_any_size(tmp_path):
    paths = [tmp_path / f"{i}.jpg" for i in range(60)]
    for i, (path, one) in enumerate(zip(paths, pictures(60).permute(0, 2, 3, 1).numpy(), strict=True)):
        Image.fromarray(one).resize((300, 140 + i)).save(path)
    found = Detector.fit(paths, alpha=0.05, kappa=3, iters=2, groups=np.arange(60), device="cpu", size=(16, 12),
                         crop="stretch")
    assert (found.config["size"], found.config["crop"], found.config["shape"]) == ([16, 12], "stretch", [3, 16, 12])
    together = found.images(paths).pixels
    assert torch.equal(torch.cat([found.images([path]).pixels for path in paths[:5]]), together[:5])
    assert found.compare(together)[1].sum() == 35  # all that trained are copies, bit for bit
    array = pictures(3)
    small = [Image.fromarray(one) for one in array.permute(0, 2, 3, 1).numpy()]
    for images, size, shape in ((paths[:3], [64, 64], (64, 64)), (small, None, (16, 12)), (array, None, (16, 12))):
        pixels, rule, _ = sized(images)
        assert (rule, pixels.shape[2:]) == (size, shape)


def test_a_set_that_is_unlike_the_training_data_is_seen(detector):
    assert detector.set_p_value(pictures(40, 21)) > 0.05
    shifted = (pictures(40, 22).float() * 0.9 + 12).byte()
    assert detector.set_p_value(shifted) <= 0.004  # twice the mean of two folds' 1 / 1000, and some
    with pytest.raises(UserError, match="fit the detector with it"):
        Detector(CONFIG | {"max_images": None, "iw_samples": 2}, [
            Member(None, {"nll": None}, {}, [], None, None, 0)]).set_p_value(shifted)


def test_training_images_are_not_compared_as_a_set(detector):
    with pytest.raises(UserError, match="0 things are too few"):
        detector.set_p_value(pictures(300))
    assert 0 < detector.set_p_value(torch.cat([pictures(300), pictures(40, 21)])) <= 1


def test_many_pictures_of_things_of_different_sizes_are_no_drift():
    """Of the new things 2,000 pictures are drawn: large things come in more often, on the known side too."""
    rng, p = np.random.default_rng(0), []

    def things(n):
        sizes = np.where(rng.random(n) < 0.5, 1, 20)
        groups = np.repeat(np.arange(n), sizes)
        return groups, (3.0 * (sizes > 1)[groups] + rng.standard_normal(n)[groups])[:, None] * np.ones((1, 2))
    for _ in range(30):
        (groups, view), (new_groups, new) = things(100), things(1000)
        found = Detector(CONFIG | {"max_images": None, "iw_samples": 2}, [
            Member(None, {"nll": None}, {}, groups, None, None, 0, view[:2000])])
        chosen = rng.permutation(len(new))[:2000]
        p.append(found.p_of_set(new_groups[chosen], [new[chosen]], 2000 / len(new))[0])
    assert np.mean(np.array(p) <= 0.05) < 0.2


def test_a_rate_that_so_few_things_cannot_promise_is_refused(detector):
    with pytest.raises(UserError, match="needs 999 things to calibrate with, and there are 100"):
        detector.predict(pictures(2), fpr=0.001)
    with pytest.raises(UserError, match="2 groups for 3 images"):
        Detector.fit(pictures(3), groups=[0, 1])


def test_many_threads_score_as_one_and_nothing_is_printed(detector, capsys):
    parts = [pictures(30, seed) for seed in range(8)]
    alone = [detector.decision_function(part) for part in parts]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(detector.decision_function, parts))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)
    detector.explain(parts[0])
    detector.set_p_value(parts[0])
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize("size", [1, 3, 6])
def test_a_false_discovery_rate_holds_for_things_of_several_pictures(size):
    """The calibration and the new things drawn anew each time: `size` pictures of each thing, which are much alike."""
    rng, fdr, shares = np.random.default_rng(size), 0.2, []

    def things(n, shift=0.0):
        return (shift + rng.standard_normal((n, 1)) + 0.3 * rng.standard_normal((n, size))).ravel()
    for _ in range(600):
        new = np.concatenate([things(40), things(10, 3.0)])
        p = conformal_p_values((things(199), np.repeat(np.arange(199), size), new))
        flagged = benjamini_hochberg(p, fdr)
        shares.append(flagged[:40 * size].sum() / max(1, flagged.sum()))
    assert 0.3 * fdr < np.mean(shares) < fdr * 0.8 + 3 * np.std(shares) / len(shares) ** 0.5, np.mean(shares)
