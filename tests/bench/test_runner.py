"""The runner: each image once per prompt, bounded memory, kill and resume, failures counted; and the whole way."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image as PIL

from difftap.bench.predictions import Prediction, load_predictions
from difftap.bench.protocols import get_protocols
from difftap.bench.report import dump_results
from difftap.bench.runner import count_passes, digest, finished, order_of, predict, subset
from difftap.bench.scoring import Resampling, score
from difftap.coords import Geometry
from difftap.errors import ArtifactError, ImageError, InputError, OutputError
from difftap.featuremap import FeatureMap
from difftap.features.keeper import ImageMaps, MapKeeper, View, load_view
from difftap.images import load_image
from difftap.matching.rule import MatchRule, PreparedImage
from difftap.recipe import Learned, Matcher
from tests.bench.pck_cases import prompt_file, samples
from tests.harness import FakePipeline, fake_recipe
from tests.matching.test_rule import loop_sd4match

DATASET = {"name": "spair", "split": "test"}


@pytest.fixture(autouse=True)
def _forget():
    FakePipeline.opened.clear()


def run(pairs, output, recipe=None, opener=FakePipeline, rule=None, batch=1, **more):
    recipe = recipe or fake_recipe()
    with opener(recipe) as pipeline:
        pipeline.batch = batch
        return predict(pipeline, pairs, recipe, output, dataset=DATASET, rule=rule or MatchRule.of(recipe), **more)


def results(file):
    return dump_results(score(load_predictions(file), get_protocols()))


def the_map(image, recipe):
    """The one map that a recipe of one branch gives of an image."""
    (features,) = FakePipeline(recipe).features([image])
    return features.branches[0]["up1"]


def images_of(pairs):
    return len({(p.source, False) for p in pairs} | {(p.target, p.mirrored) for p in pairs})


def test_every_image_once(tmp_path):
    pairs = samples(tmp_path / "data")
    done = run(pairs, tmp_path / "p.jsonl")
    assert (done.written, done.failed, done.skipped) == (6, 0, 0)
    assert (
        done.images
        == images_of(pairs)
        == sum(p.seen.total() for p in FakePipeline.opened)
        == done.passes
        == count_passes(pairs, fake_recipe())
    )
    assert len(FakePipeline.opened) == 1
    found = load_predictions(tmp_path / "p.jsonl")
    assert [p.name for p in found.pairs] == [p.name for p in pairs]
    for prediction, pair in zip(found.pairs, pairs, strict=True):
        np.testing.assert_array_equal(prediction.target_points, pair.target_points)
        assert np.isfinite(prediction.found).all()
        assert np.isfinite(prediction.cycle_error).all()
        assert prediction.target_box == pair.target_box
    assert found.conditions["recipe_key"] == fake_recipe().key()
    assert found.conditions["matching"] == {"combine": "concat", "reading": "centres", "confidence": True}


def test_prompt_per_class(tmp_path):
    """One pipeline, each image once per prompt, and the prompts are filled in."""
    pairs = samples(tmp_path / "data", 8)
    mixed = [pairs[i] for i in (0, 4, 1, 5, 2, 6, 3, 7)]
    recipe = fake_recipe(("a photo of a {category}",))
    assert order_of(mixed, recipe) == [0, 2, 4, 6, 1, 3, 5, 7]
    done = run(mixed, tmp_path / "p.jsonl", recipe)
    (pipeline,) = FakePipeline.opened
    assert {prompt for _, _, prompt in pipeline.asked} == {"a photo of a cat", "a photo of a dog"}
    assert len(pipeline.asked) == len(set(pipeline.asked)) == done.passes == count_passes(mixed, recipe)
    found = load_predictions(tmp_path / "p.jsonl")
    assert [p.name for p in found.pairs] == [p.name for p in mixed]  # sorted back
    assert found.conditions["recipe"]["branches"][0]["prompt"] == "a photo of a {category}"
    lines = [json.loads(line)["category"] for line in (tmp_path / "p.jsonl").read_text().splitlines()[1:]]
    assert lines == ["cat"] * 4 + ["dog"] * 4
    cats = [pair for pair in mixed if pair.category == "cat"]
    run(cats, tmp_path / "cats.jsonl", fake_recipe(("a photo of a cat",)))
    for a, b in zip(
        load_predictions(tmp_path / "cats.jsonl").pairs, [p for p in found.pairs if p.category == "cat"], strict=True
    ):
        np.testing.assert_array_equal(a.found, b.found)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize(("batch", "memory"), [(1, 1), (3, 1 << 30)])
def test_a_branch_without_category_is_extracted_once_for_all_classes(tmp_path, batch, memory, kept):
    """An image that stands for two classes: twice through the branch that names them, once through the other."""
    pairs = samples(tmp_path / "data", 6, classes=("cat",))
    pairs += [dataclasses.replace(pair, name=f"dog-{pair.name}", category="dog") for pair in pairs]
    recipe = fake_recipe(("a {category}", "plain"))

    def opener(asked):
        return FakePipeline(asked, ((12, 6, 6), (8, 12, 12)))

    more = {"features": tmp_path / "kept"} if kept else {}
    done = run(pairs, tmp_path / "p.jsonl", recipe, opener, batch=batch, memory=memory, **more)
    (pipeline,) = FakePipeline.opened
    views = images_of(pairs)
    assert len(pipeline.asked) == len(set(pipeline.asked)) == done.passes == 3 * views
    assert sum(prompt == "plain" for _, _, prompt in pipeline.asked) == views
    filled = fake_recipe(("a dog", "plain"))
    run(pairs[6:], tmp_path / "dogs.jsonl", filled, opener)
    for a, b in zip(
        load_predictions(tmp_path / "p.jsonl").pairs[6:], load_predictions(tmp_path / "dogs.jsonl").pairs, strict=True
    ):
        np.testing.assert_array_equal(a.found, b.found)


def test_failed_pairs_are_tried_again_and_the_last_record_counts(tmp_path):
    pairs = samples(tmp_path / "data")
    run(pairs, tmp_path / "whole.jsonl")
    image = pairs[0].source
    away = image.with_name("away")
    image.rename(away)
    broken = [k for k, p in enumerate(pairs) if image in (p.source, p.target)]
    first = run(pairs, tmp_path / "p.jsonl")
    assert (first.written, first.failed, first.skipped) == (6, len(broken), 0)
    again = run(pairs, tmp_path / "p.jsonl")  # it is still not there
    assert (again.written, again.failed, again.skipped) == (len(broken), len(broken), 6 - len(broken))
    assert score(load_predictions(tmp_path / "p.jsonl"), get_protocols())["counts"]["pairs_failed"] == len(broken)
    away.rename(image)
    last = run(pairs, tmp_path / "p.jsonl")
    assert (last.written, last.failed, last.skipped) == (len(broken), 0, 6 - len(broken))
    assert results(tmp_path / "p.jsonl") == results(tmp_path / "whole.jsonl")
    assert run(pairs, tmp_path / "p.jsonl").written == 0


def test_finished():
    records = [{"index": 3, "error": "x"}, {"index": 4, "error": None}, {"index": 3}, {"index": 4, "error": "late"}]
    assert finished(records) == {3}


def test_whatever_scoring_reads_is_in_the_digest(tmp_path):
    pair = samples(tmp_path / "data", 1)[0]
    count = len(pair.keypoint_ids)
    changes = [
        {"keypoint_ids": tuple(f"k{k}" for k in range(count))},
        {"target_ids": tuple(f"k{k}" for k in range(count))},
        {"flags": {"occlusion": 1}},
        {"target_size": (9, 9)},
        {"source_size": (9, 9)},
        {"target_box": None},
    ]
    digests = {digest([dataclasses.replace(pair, **change)]) for change in ({}, *changes)}
    assert len(digests) == len(changes) + 1


def test_an_image_that_cannot_be_made_is_a_failed_pair(tmp_path):
    pairs = samples(tmp_path / "data", 4, classes=("cat",))
    target = tmp_path / "made" / "target.png"
    made = dataclasses.replace(pairs[0], target=target, target_size=pairs[0].source_size, mirrored=False)
    calls = []

    def make():
        calls.append(1)
        if len(calls) == 1:
            raise ImageError("the source of 'target.png' is damaged")
        target.parent.mkdir()
        shutil.copy(pairs[0].source, target)

    done = run([made, pairs[1]], tmp_path / "p.jsonl", generators={target: make})
    assert done.failed == 1
    assert "is damaged" in load_predictions(tmp_path / "p.jsonl").pairs[0].error
    assert run([made, pairs[1]], tmp_path / "p.jsonl", generators={target: make}).failed == 0
    assert len(calls) == 2


def test_kill_and_resume_gives_the_same_bytes(tmp_path):
    """Though pairs are matched class by class and not in the list's order."""
    pairs, recipe = samples(tmp_path / "data", 7), fake_recipe(("a {category}",))
    whole = tmp_path / "whole.jsonl"
    run(pairs, whole, recipe)
    text = whole.read_bytes()
    for cut in (0, 10, len(text) // 3, len(text) // 2, len(text) - 1, len(text)):
        part = tmp_path / f"part{cut}.jsonl"
        part.write_bytes(text[:cut])
        done = run(pairs, part, recipe)
        assert part.read_bytes() == text
        assert done.written + done.skipped == 7
        assert results(part) == results(whole)


def test_killed_in_the_middle(tmp_path):
    pairs = samples(tmp_path / "data")
    run(pairs, tmp_path / "whole.jsonl")

    class Stopped(Exception):
        pass

    def stop(count, seen=[0]):  # noqa: B006
        seen[0] += count
        if seen[0] == 3:
            raise Stopped

    with pytest.raises(Stopped):
        run(pairs, tmp_path / "p.jsonl", progress=stop)
    partial = score(load_predictions(tmp_path / "p.jsonl"), get_protocols(["dift"]))
    assert partial["counts"]["pairs_pending"] == 3
    assert run(pairs, tmp_path / "p.jsonl").skipped == 3
    assert results(tmp_path / "p.jsonl") == results(tmp_path / "whole.jsonl")


def test_memory_limit_changes_nothing_but_memory(tmp_path):
    pairs = samples(tmp_path / "data", 12)
    run(pairs, tmp_path / "all.jsonl")
    for batch in (1, 3):
        done = run(pairs, tmp_path / f"tight{batch}.jsonl", memory=1, batch=batch)
        assert done.images == images_of(pairs)  # spilled, not made again
        assert (tmp_path / f"tight{batch}.jsonl").read_bytes() == (tmp_path / "all.jsonl").read_bytes()


def test_another_run_is_refused(tmp_path):
    pairs = samples(tmp_path / "data")
    run(pairs, tmp_path / "p.jsonl")
    for other, recipe in ((pairs[:5], None), (pairs, fake_recipe(seed=3)), (pairs, fake_recipe(matcher="nn"))):
        with pytest.raises(OutputError, match="begun under other conditions"):
            run(other, tmp_path / "p.jsonl", recipe)
    moved = [dataclasses.replace(pairs[0], target_points=pairs[0].target_points + 1), *pairs[1:]]
    with pytest.raises(OutputError, match="pairs_sha256"):
        run(moved, tmp_path / "p.jsonl")
    assert run(pairs[:5], tmp_path / "p.jsonl", overwrite=True).written == 5
    with pytest.raises(OutputError, match="folder does not exist"):
        run(pairs, tmp_path / "nowhere" / "p.jsonl")
    with pytest.raises(InputError, match="holds no pair"):
        run([], tmp_path / "e.jsonl")


def test_missing_and_misfitting_images_are_recorded(tmp_path):
    pairs = samples(tmp_path / "data", 6)
    gone = pairs[0].source
    gone.unlink()
    pairs[5] = dataclasses.replace(pairs[5], target_size=(7, 7))
    done = run(pairs, tmp_path / "p.jsonl")
    broken = [p for p in pairs if gone in (p.source, p.target)]
    assert done.failed == len(broken) + 1
    data = score(load_predictions(tmp_path / "p.jsonl"), get_protocols(["dift"]))
    assert data["counts"]["pairs_failed"] == done.failed
    assert data["counts"]["pairs_scored"] == 6 - done.failed
    said = {one["pair"]: one["error"] for one in data["counts"]["failures"]}
    assert "no image at" in said["000"]
    assert "its annotation says 7 x 7" in said["005"]


def test_mirrored_target_is_flipped(tmp_path):
    pairs = samples(tmp_path / "data")
    flipped = load_view(View(pairs[3].target, True))
    np.testing.assert_array_equal(flipped.pixels, load_image(pairs[3].target).pixels[:, ::-1])
    run([pairs[3], dataclasses.replace(pairs[3], name="plain", mirrored=False)], tmp_path / "p.jsonl")
    mirrored, plain = load_predictions(tmp_path / "p.jsonl").pairs
    assert (mirrored.found != plain.found).any()
    # A copy that was flipped beforehand is the same.
    copy = tmp_path / "data" / "flipped.png"
    PIL.fromarray(flipped.pixels).save(copy)
    run([dataclasses.replace(pairs[3], target=copy, mirrored=False)], tmp_path / "q.jsonl")
    (again,) = load_predictions(tmp_path / "q.jsonl").pairs
    np.testing.assert_array_equal(again.found, mirrored.found)


def test_fused_recipes_run_and_match_the_joined_ones(tmp_path):
    pairs = samples(tmp_path / "data")
    recipe = fake_recipe(("", ""))

    def opener(filled):
        return FakePipeline(filled, ((12, 6, 6), (8, 12, 12)))

    for combine in ("concat", "score-sum", "score-product"):
        run(pairs, tmp_path / f"{combine}.jsonl", recipe, opener, MatchRule.of(recipe, combine))
    joined, fused, product = (
        load_predictions(tmp_path / f"{c}.jsonl") for c in ("concat", "score-sum", "score-product")
    )
    for a, b in zip(joined.pairs, fused.pairs, strict=True):
        np.testing.assert_allclose(a.found, b.found, atol=1e-3)
        np.testing.assert_allclose(a.score, b.score, atol=2e-6)
    assert any((a.found != b.found).any() for a, b in zip(joined.pairs, product.pairs, strict=True))


def test_prediction_survives_json(tmp_path):
    pairs = samples(tmp_path / "data", 2)
    run(pairs, tmp_path / "p.jsonl", confidence=False)
    (first, _) = load_predictions(tmp_path / "p.jsonl").pairs
    assert np.isnan(first.margin).all()
    again = Prediction.from_dict(json.loads(json.dumps(first.to_dict())))
    for field in dataclasses.fields(Prediction):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(first, field.name))
    with pytest.raises(InputError, match="lacks or misstates"):
        Prediction.from_dict({})


def test_damaged_predictions_are_refused(tmp_path):
    (tmp_path / "p.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="cannot be read"):
        load_predictions(tmp_path / "p.jsonl")
    (tmp_path / "p.jsonl").write_text('{"type":"run","schema":"other/9"}\n')
    with pytest.raises(InputError, match="schema 'other/9'"):
        load_predictions(tmp_path / "p.jsonl")


def test_subset(tmp_path):
    pairs = samples(tmp_path / "data", 10)
    assert [p.name for p in subset(pairs, 3)] == ["000", "001", "002"]
    assert [p.name for p in subset(pairs, None, 2)] == ["000", "002", "005", "007"]
    assert len(subset(pairs, None, 99)) == 10
    assert [p.name for p in subset(pairs, 3, 2)] == ["000", "002", "005"]


class Weighing(PreparedImage):
    """Stands for norms that take a lot of memory."""

    nbytes = 1000


def test_what_was_made_ready_counts_against_the_budget(tmp_path):
    views = [View(tmp_path / name) for name in "abcd"]
    keeper, made = keeper_over(tmp_path, [*views, *views], 4 * 128 + 500)
    for first, second in (views[:2], views[2:], views[:2]):
        keeper.prepared(first), keeper.prepared(second)
        keeper.done(first, second)
        assert sum(keeper.holds(view) for view in views) <= 2
    assert len(made) == 4
    roomy, _ = keeper_over(tmp_path, [*views, *views], 4 * 128 + 4000)
    for view in views:
        roomy.prepared(view)
    roomy.done(*views)
    assert all(map(roomy.holds, views))


def keeper_over(tmp_path, order, budget, faults=()):
    made = []

    def make(views):
        for view in views:
            made.append(view)
            if view in faults:
                yield ImageError(f"no {view.path}")
            else:
                yield ImageMaps(
                    (FeatureMap(np.full((2, 4, 4), len(made), np.float32), Geometry.stretch((4, 4), (8, 8))),), (4, 4)
                )

    return MapKeeper(make, lambda maps: Weighing(maps, MatchRule(Matcher("nn"))), order, budget, tmp_path), made


def test_shelf_evicts_what_is_needed_last(tmp_path):
    a, b, c, d = (View(tmp_path / name) for name in "abcd")
    order = [a, b, a, c, a, d, b, a]
    keeper, made = keeper_over(tmp_path, order, 3 * 128)
    for first, second in ((a, b), (a, c)):
        keeper.get(first), keeper.get(second)
        keeper.done(first, second)
    assert not keeper.holds(c)  # no use left
    keeper.get(a), keeper.get(d)
    assert keeper.holds(b)
    keeper.done(a, d)
    keeper.get(b), keeper.get(a)
    assert made == [a, b, c, d]
    keeper.done(b, a)
    assert not keeper.holds(a)
    assert not keeper.holds(b)
    assert not list(tmp_path.glob("*.npy"))


def test_shelf_spills_and_reads_back(tmp_path):
    views = [View(tmp_path / str(k)) for k in range(4)]
    order = [*views, *views]
    keeper, made = keeper_over(tmp_path, order, 1)
    values = {}
    for first, second in (order[i : i + 2] for i in range(0, 8, 2)):
        for view in (first, second):
            value = float(keeper.get(view).maps[0].data[0, 0, 0])
            assert values.setdefault(view, value) == value
        assert sum(keeper.holds(view) for view in views) <= 2
        keeper.done(first, second)
    assert len(made) == 4
    assert not list(tmp_path.glob("*.npy"))


def test_shelf_remembers_faults(tmp_path):
    a, b = View(tmp_path / "a"), View(tmp_path / "b")
    keeper, made = keeper_over(tmp_path, [a, b, a, b], 1 << 20, faults=(a,))
    for _ in range(2):
        with pytest.raises(ImageError, match="no "):
            keeper.get(a)
    assert made == [a]


def test_end_to_end_with_the_embedded_model(tmp_path):
    from difftap.pipeline.environment import Runtime
    from difftap.pipeline.pipeline import Pipeline
    from difftap.recipe import Branch, Recipe

    pairs = samples(tmp_path / "data", 4)
    recipe = Recipe((Branch(("up1",), 20, "a photo of a {category}"),), "pocket", (128, 128), ensemble=1)

    def opener(filled):
        return Pipeline.open(filled, Runtime(threads=1))

    run(pairs, tmp_path / "p.jsonl", recipe, opener)
    text = (tmp_path / "p.jsonl").read_bytes()
    shutil.copy(tmp_path / "p.jsonl", tmp_path / "q.jsonl")
    (tmp_path / "q.jsonl").write_bytes(text[: len(text) * 2 // 3])
    run(pairs, tmp_path / "q.jsonl", recipe, opener)
    assert results(tmp_path / "q.jsonl") == results(tmp_path / "p.jsonl")
    data = json.loads(results(tmp_path / "p.jsonl"))
    assert data["counts"]["pairs_scored"] == 4
    assert data["conditions"]["model"]["name"] == "pocket"


def test_features_are_kept_with_their_provenance(tmp_path):
    pairs = samples(tmp_path / "data")
    recipe = fake_recipe(("a {category}", ""))

    def opener(filled):
        return FakePipeline(filled, ((12, 6, 6), (8, 12, 12)))

    def extracted():
        return sum(len(pipeline.asked) for pipeline in FakePipeline.opened)

    kept = tmp_path / "kept"
    first = run(pairs, tmp_path / "a.jsonl", recipe, opener, features=kept)
    whole = extracted()
    assert whole == first.passes
    notes = {folder: json.loads((folder / "provenance.json").read_text()) for folder in kept.iterdir()}
    asked = {(note["branch"]["taps"][0], note["branch"]["prompt"]) for note in notes.values()}
    assert asked == {("up1", "a cat"), ("up1", "a dog"), ("up2", "")}
    for note in notes.values():
        assert note["model"] == {"name": "fake", "key": "0" * 16}
        assert note["difftap"] == "0"
        assert note["backend"]["name"] == "fake"
    # Another joining and matcher, the same features: nothing is extracted again.
    other = dataclasses.replace(recipe, matcher=Matcher("nn"))
    run(pairs, tmp_path / "b.jsonl", other, opener, MatchRule.of(other, "score-sum"), features=kept)
    assert extracted() == whole
    run(pairs, tmp_path / "c.jsonl", recipe, opener, features=kept)
    assert (tmp_path / "c.jsonl").read_bytes() == (tmp_path / "a.jsonl").read_bytes()
    # A recipe of one of the branches shares that branch's.
    run(pairs, tmp_path / "one.jsonl", fake_recipe(("a {category}",)), features=kept)
    assert extracted() == whole
    # Another seed is another provenance; a damaged file is made again.
    run(pairs, tmp_path / "d.jsonl", fake_recipe(("a {category}", ""), seed=5), opener, features=kept)
    assert extracted() == 2 * whole
    folder = next(folder for folder in notes if notes[folder]["branch"]["prompt"] == "a cat")
    damaged = next(folder.glob("*.npz"))
    damaged.write_bytes(damaged.read_bytes()[:-200])
    run(pairs, tmp_path / "e.jsonl", recipe, opener, features=kept)
    assert extracted() == 2 * whole + 1
    assert (tmp_path / "e.jsonl").read_bytes() == (tmp_path / "a.jsonl").read_bytes()
    (folder / "provenance.json").write_text("{}")
    with pytest.raises(ArtifactError, match="another provenance"):
        run(pairs, tmp_path / "f.jsonl", recipe, opener, features=kept)


def test_pck_per_pair_against_difts_loop_on_the_same_maps(tmp_path):
    """The whole way, image files to PCK, against one plain loop: enlarge both maps, argmax, count."""
    pairs = samples(tmp_path / "data", 8, seed=3)
    run(pairs, tmp_path / "p.jsonl", confidence=False)
    alphas = (0.05, 0.1, 0.15, 0.5)  # random maps are seldom right: the last one makes sure that some are
    data = score(load_predictions(tmp_path / "p.jsonl"), get_protocols(["dift"]), Resampling(alphas=alphas))["pairs"]
    assert 0 < sum(data["hits"]["dift"]["0.5"]) < sum(data["points"])
    for k, pair in enumerate(pairs):
        maps = []
        for path, flip in ((pair.source, False), (pair.target, pair.mirrored)):
            image = load_view(View(path, flip))
            maps.append((the_map(image, fake_recipe()).data, image.size))
        (source, (sw, sh)), (target, (tw, th)) = maps
        up_source, up_target = enlarged(source, sw, sh), enlarged(target, tw, th)
        x1, y1, x2, y2 = pair.target_box
        for alpha in alphas:
            correct = 0
            for (sx, sy), (tx, ty) in zip(pair.source_points.astype(int), pair.target_points, strict=True):
                query = up_source[:, sy, sx] / np.linalg.norm(up_source[:, sy, sx])
                cosine = np.tensordot(query, up_target / np.linalg.norm(up_target, axis=0), 1)
                py, px = np.unravel_index(cosine.argmax(), cosine.shape)
                correct += ((px - tx) ** 2 + (py - ty) ** 2) ** 0.5 / max(y2 - y1, x2 - x1) <= alpha
            ours = data["hits"]["dift"][f"{alpha:g}"][k] / data["points"][k]
            assert ours == pytest.approx(correct / len(pair.source_points), abs=1e-6)


@pytest.mark.parametrize("matcher", ["nn", "kernel-softargmax"])
def test_pck_per_pair_against_sd4matchs_loop_on_the_same_maps(tmp_path, matcher):
    """The whole way again, by corners and in the 768 square, clipped ground truth and warped box included."""
    pairs = samples(tmp_path / "data", 8, seed=5)
    outside = pairs[0].target_points + np.array([300.0, 0.0])
    pairs[0] = dataclasses.replace(pairs[0], target_points=outside)
    recipe = fake_recipe(matcher=matcher, size=(768, 768))
    run(pairs, tmp_path / "p.jsonl", recipe, rule=MatchRule.of(recipe, reading="corners"), confidence=False)
    alphas = (0.05, 0.1, 0.15, 0.5)  # random maps are seldom right: the last one makes sure that some are
    data = score(load_predictions(tmp_path / "p.jsonl"), get_protocols(["sd4match"]), Resampling(alphas=alphas))[
        "pairs"
    ]
    some = 0
    for k, pair in enumerate(pairs):
        maps = []
        for path, flip in ((pair.source, False), (pair.target, pair.mirrored)):
            image = load_view(View(path, flip))
            maps.append(the_map(image, recipe))
        to_square = 768 / np.array(pair.target_size)
        places = loop_sd4match(*maps, pair.source_points, matcher, 768) * to_square
        truth = np.clip(pair.target_points * to_square, 1e-4, 767 - 1e-4)
        x1, y1, x2, y2 = pair.target_box
        longest = max((x2 - x1) * to_square[0], (y2 - y1) * to_square[1])
        far = [np.hypot(px - tx, py - ty) for (px, py), (tx, ty) in zip(places, truth, strict=True)]
        for alpha in alphas:
            assert min(abs(np.array(far) - alpha * longest)) > 1e-2  # no ties, where rounding would decide
            correct = sum(one <= alpha * longest for one in far)
            some += correct
            ours = data["hits"]["sd4match"][f"{alpha:g}"][k] / data["points"][k]
            assert ours == pytest.approx(correct / len(far), abs=1e-6)
    assert some > 0


def test_a_prompt_file_that_was_changed_serves_no_stale_features(tmp_path):
    pairs = samples(tmp_path / "data", 2)
    kept, plain = tmp_path / "kept", fake_recipe()
    recipe = dataclasses.replace(plain, learned=Learned(str(tmp_path / "prompt"), "single"))
    prompt_file(tmp_path / "prompt", "single", plain, 1.0)
    first = run(pairs, tmp_path / "a.jsonl", recipe, features=kept)
    assert run(pairs, tmp_path / "b.jsonl", recipe, features=kept).passes == 0
    prompt_file(tmp_path / "prompt", "single", plain, 2.0)
    again = run(pairs, tmp_path / "c.jsonl", recipe, features=kept)
    assert again.passes == first.passes
    run(pairs, tmp_path / "d.jsonl", recipe)
    assert (tmp_path / "c.jsonl").read_bytes() == (tmp_path / "d.jsonl").read_bytes()
    assert (tmp_path / "c.jsonl").read_bytes() != (tmp_path / "a.jsonl").read_bytes()
    with pytest.raises(OutputError, match=r"prompts\.sha256 is"):
        run(pairs, tmp_path / "a.jsonl", recipe, features=kept)


def test_maps_under_prompts_made_of_images_are_not_kept(tmp_path):
    pairs = samples(tmp_path / "data", 2)
    plain = fake_recipe()
    recipe = dataclasses.replace(plain, learned=Learned(str(prompt_file(tmp_path / "prompt", "cpm", plain)), "cpm"))
    with pytest.raises(InputError, match="leave --features out"):
        run(pairs, tmp_path / "p.jsonl", recipe, features=tmp_path / "kept")
    assert not (tmp_path / "p.jsonl").exists()
    assert run(pairs, tmp_path / "p.jsonl", recipe).passes == count_passes(pairs, recipe)
    by_class = dataclasses.replace(recipe, learned=dataclasses.replace(recipe.learned, mode="class"))
    assert run(pairs, tmp_path / "c.jsonl", by_class, features=tmp_path / "kept").failed == 0


def test_a_class_without_a_prompt_is_refused_before_anything_is_written(tmp_path):
    pairs = samples(tmp_path / "data", 2, classes=("horse",))
    plain = fake_recipe()
    recipe = dataclasses.replace(plain, learned=Learned(str(prompt_file(tmp_path / "prompt", "class", plain)), "class"))
    with pytest.raises(InputError, match="no prompt for class 'horse'"):
        run(pairs, tmp_path / "p.jsonl", recipe)
    assert not (tmp_path / "p.jsonl").exists()


def enlarged(data, width, height):
    """Bilinear, half-pixel centres, borders repeated: one pixel at a time."""
    _, h, w = data.shape
    large = np.empty((len(data), height, width))
    for y in range(height):
        for x in range(width):
            gx, gy = max(0.0, (x + 0.5) * w / width - 0.5), max(0.0, (y + 0.5) * h / height - 0.5)
            x0, y0 = min(int(gx), w - 1), min(int(gy), h - 1)
            x1, y1 = min(x0 + 1, w - 1), min(y0 + 1, h - 1)
            fx, fy = gx - x0, gy - y0
            large[:, y, x] = (1 - fy) * ((1 - fx) * data[:, y0, x0] + fx * data[:, y0, x1]) + fy * (
                (1 - fx) * data[:, y1, x0] + fx * data[:, y1, x1]
            )
    return large
