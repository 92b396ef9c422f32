"""Protocols: by hand, and against slow re-implementations of the published evaluation loops."""

import numpy as np
import pytest

from difftap.bench.pck import within
from difftap.bench.protocols import PROTOCOLS, Protocol, get_protocols
from difftap.bench.scoring import measure, reason_against, score
from difftap.errors import InputError
from tests.bench.pck_cases import prediction, predictions, random_pairs

ALPHAS = (0.01, 0.05, 0.1, 0.15)


def rates(pair, protocol, dataset, alphas=ALPHAS):
    one = measure(pair, PROTOCOLS[protocol], dataset)
    return within(one.distance, one.length, alphas, PROTOCOLS[protocol].strict).mean(axis=0)


# Slow and plain: one keypoint at a time, as the published scripts describe their own arithmetic.


def loop_dift(pair, alphas):
    x1, y1, x2, y2 = pair.target_box
    threshold = max(y2 - y1, x2 - x1)
    result = []
    for alpha in alphas:
        correct = 0
        for (px, py), (tx, ty) in zip(pair.found.tolist(), pair.target_points.tolist(), strict=True):
            distance = ((px - tx) ** 2 + (py - ty) ** 2) ** 0.5
            correct += distance / threshold <= alpha
        result.append(correct / len(pair.found))
    return result


def loop_sd4match(pair, alphas, dataset):
    width, height = pair.target_size

    def square(x, y):
        return (x * 768 / width, y * 768 / height)

    truth = [square(x, y) for x, y in pair.target_points.tolist()]
    if dataset == "spair":
        (x1, y1), (x2, y2) = square(*pair.target_box[:2]), square(*pair.target_box[2:])
        threshold = max(x2 - x1, y2 - y1)
    elif dataset == "pf-pascal":
        threshold = 768
    else:
        threshold = max(max(a) - min(a) for a in zip(*truth, strict=True))

    def bound(v):
        return 1e-4 if v <= 0 else 767 - 1e-4 if v >= 767 else v

    result = []
    for alpha in alphas:
        correct = 0
        for (px, py), (tx, ty) in zip(pair.found.tolist(), truth, strict=True):
            px, py = square(px, py)
            correct += np.hypot(px - bound(tx), py - bound(ty)) <= alpha * threshold
        result.append(correct / len(truth))
    return result


def loop_geoaware(pair, alphas, dataset, side=960):
    width, height = pair.target_size
    scale = side / max(width, height)
    offset = [0, 0]
    if height < width:
        offset[1] = int((side - int(np.around(side * height / width))) / 2)
    elif width < height:
        offset[0] = int((side - int(np.around(side * width / height))) / 2)
    x1, y1, x2, y2 = pair.target_box
    threshold = side if dataset == "pf-pascal" else max(y2 - y1, x2 - x1) * scale
    result = []
    for alpha in alphas:
        correct = 0
        for p, t in zip(pair.found, pair.target_points, strict=True):
            gap = (p * scale + offset) - (t * scale + offset)
            correct += np.sqrt((gap**2).sum()) < alpha * threshold
        result.append(correct / len(pair.found))
    return result


def test_against_published_loops():
    for pair in random_pairs(3, 60):
        np.testing.assert_allclose(rates(pair, "dift", "spair"), loop_dift(pair, ALPHAS), atol=1e-6)
        np.testing.assert_allclose(rates(pair, "distilldift", "spair"), loop_dift(pair, ALPHAS), atol=1e-6)
        for dataset in ("spair", "pf-pascal", "pf-willow"):
            np.testing.assert_allclose(
                rates(pair, "sd4match", dataset), loop_sd4match(pair, ALPHAS, dataset), atol=1e-6
            )
        for dataset in ("spair", "pf-pascal"):
            np.testing.assert_allclose(
                rates(pair, "geoaware", dataset), loop_geoaware(pair, ALPHAS, dataset), atol=1e-6
            )


def test_per_point_and_per_image_of_the_loops():
    pairs = random_pairs(4, 40)
    results = score(predictions(pairs), [PROTOCOLS["dift"]])["protocols"]["dift"]
    per_pair = np.array([loop_dift(pair, (0.1,))[0] for pair in pairs])
    counts = np.array([len(pair.found) for pair in pairs])
    assert results["pck"]["0.1"]["image"]["value"] == pytest.approx(per_pair.mean(), abs=1e-9)
    assert results["pck"]["0.1"]["point"]["value"] == pytest.approx((per_pair * counts).sum() / counts.sum(), abs=1e-9)


def test_strict_or_not_exactly_on_the_threshold():
    """A box of 100 x 50: at alpha 0.1 a point 10 pixels away is on the threshold."""
    pair = prediction([[50, 40]] * 3, [[50, 50], [60, 40], [50, 50.01]])
    assert rates(pair, "dift", "spair", [0.1])[0] == pytest.approx(2 / 3)
    assert rates(pair, "distilldift", "spair", [0.1])[0] == pytest.approx(2 / 3)
    assert rates(pair, "geoaware", "spair", [0.1])[0] == 0


def test_square_measures_after_the_warp():
    """200 x 100 to a square: 10 pixels across are 38.4, 10 down are 76.8; the box of 100 x 50 is 384 x 384."""
    across = prediction([[50, 40]], [[60, 40]])
    down = prediction([[50, 40]], [[50, 45.01]])
    one = measure(across, PROTOCOLS["sd4match"], "spair")
    assert one.distance[0] == pytest.approx(38.4)
    assert one.length == pytest.approx(384)
    assert rates(across, "sd4match", "spair", [0.1])[0] == 1  # 38.4 is on the threshold
    assert rates(down, "sd4match", "spair", [0.1])[0] == 0
    assert rates(down, "dift", "spair", [0.1])[0] == 1


@pytest.mark.parametrize(
    ("protocol", "dataset", "length"),
    [
        ("dift", "spair", 100),
        ("dift", "pf-pascal", 200),
        ("dift", "pf-willow", 30),
        ("sd4match", "spair", 384),
        ("sd4match", "pf-pascal", 768),
        ("sd4match", "pf-willow", 30 * 7.68),
        ("geoaware", "spair", 480),
        ("geoaware", "pf-pascal", 960),
        ("geoaware", "pf-willow", 144),
        ("distilldift", "spair", 100),
        ("distilldift", "pf-willow", 30),
        ("distilldift-img", "spair", 200),
    ],
)
def test_bases(protocol, dataset, length):
    """Image 200 x 100, box 100 x 50, keypoints 20 x 30 apart."""
    pair = prediction([[10, 10], [30, 40]], [[10, 10], [30, 40]])
    assert measure(pair, PROTOCOLS[protocol], dataset).length == pytest.approx(length)


def test_box_partly_outside_the_image_counts_whole():
    pair = prediction([[5, 5]], [[5, 25]], box=(-100.0, 0.0, 100.0, 20.0))
    assert measure(pair, PROTOCOLS["dift"], "spair").length == 200
    assert rates(pair, "dift", "spair", [0.1])[0] == 1


def test_keypoints_outside_their_box_count():
    pair = prediction([[150, 90], [20, 20]], [[150, 90], [90, 90]], box=(0.0, 0.0, 40.0, 40.0))
    assert rates(pair, "dift", "spair", [0.1])[0] == 0.5


def test_one_point_pairs_have_no_extent():
    exact, near = prediction([[10, 10]], [[10, 10]]), prediction([[10, 10]], [[10, 11]], index=1)
    assert rates(exact, "dift", "pf-willow", [0.1])[0] == 1
    assert rates(near, "dift", "pf-willow", [0.1])[0] == 0
    results = score(predictions([exact, near], "pf-willow"), [PROTOCOLS["dift"]])
    assert results["protocols"]["dift"]["counts"]["pairs_with_zero_threshold"] == 2


def test_issue_four_figure_on_pf_willow():
    """Per image, extent of the target's keypoints, at most: 40 x 20 apart, so 2 and 4 pixels."""
    pair = prediction([[0, 0], [40, 20], [10, 10]], [[2, 0], [40, 24], [10, 14.1]], box=None)
    results = score(predictions([pair], "pf-willow"), [PROTOCOLS["dift"]])["protocols"]["dift"]["pck"]
    assert results["0.05"]["image"]["value"] == pytest.approx(1 / 3)
    assert results["0.1"]["image"]["value"] == pytest.approx(2 / 3)


def test_target_outside_the_image_is_clipped_by_sd4match_alone():
    pair = prediction([[210, 50]], [[199, 50]])
    assert measure(pair, PROTOCOLS["sd4match"], "spair").distance[0] == pytest.approx(767 - 1e-4 - 199 * 3.84)
    assert measure(pair, PROTOCOLS["dift"], "spair").distance[0] == 11


def test_protocol_without_its_box_is_refused_with_the_reason():
    pairs = [prediction([[1, 1]], [[1, 1]], box=None)]
    assert "box" in reason_against(pairs, PROTOCOLS["dift"], "spair")
    results = score(predictions(pairs), get_protocols(["dift", "distilldift-img"]))
    assert set(results["protocols"]) == {"distilldift-img"}
    assert "box" in results["not_applied"]["dift"]


def test_dagger_by_hand():
    """Found 6 pixels from its own keypoint and 4 from another: right, but not by PCK-dagger."""
    near_other = prediction([[50, 40]], [[56, 40]], visible=[[60, 40]])
    between = prediction([[50, 40]], [[55, 40]], visible=[[60, 40]], index=1)  # a tie does not count against it
    results = score(predictions([near_other, between]), [PROTOCOLS["dift"]])["protocols"]["dift"]
    assert results["pck"]["0.1"]["image"]["value"] == 1
    assert results["pck_dagger"]["0.1"]["image"]["value"] == 0.5


def test_dagger_is_judged_in_the_protocols_frame():
    """Across counts half as much as down once 200 x 100 is stretched to a square."""
    pair = prediction([[50, 40]], [[56, 40]], visible=[[56, 44]])
    assert measure(pair, PROTOCOLS["sd4match"], "spair").dagger().tolist() == [True]
    assert measure(pair, PROTOCOLS["dift"], "spair").dagger().tolist() == [False]


def test_nothing_found_is_a_miss_and_counted():
    pair = prediction([[5, 5], [9, 9]], [[5, 5], [np.nan, np.nan]])
    results = score(predictions([pair]), [PROTOCOLS["dift"]])
    assert results["protocols"]["dift"]["pck"]["0.1"]["image"]["value"] == 0.5
    assert results["counts"]["points_unmatched"] == 1


def test_failed_and_empty_pairs_are_counted_and_take_no_part():
    pairs = [
        prediction([[5, 5]], [[5, 5]]),
        prediction([], [], index=1),
        prediction([[5, 5]], [[np.nan, np.nan]], index=2, error="no image at 'x.jpg'"),
    ]
    results = score(predictions(pairs), [PROTOCOLS["dift"]])
    assert results["protocols"]["dift"]["pck"]["0.1"]["image"]["value"] == 1
    counts = results["counts"]
    assert (counts["pairs_scored"], counts["pairs_failed"], counts["pairs_without_points"]) == (1, 1, 1)
    assert counts["failures"] == [{"pair": "pair-2", "error": "no image at 'x.jpg'"}]


def test_cuts_add_up():
    pairs = random_pairs(5, 30)
    result = score(predictions(pairs), [PROTOCOLS["dift"]])["protocols"]["dift"]
    whole = result["pck"]["0.1"]["image"]["value"]
    for cuts in (result["by_class"], result["by_flag"]["occlusion"]):
        total = sum(cut["pairs"] * cut["0.1"]["image"]["value"] for cut in cuts.values())
        assert total / sum(cut["pairs"] for cut in cuts.values()) == pytest.approx(whole)
    assert result["curve"]["image"] == sorted(result["curve"]["image"])
    assert result["curve"]["image"][19] == pytest.approx(whole)  # alpha 0.1
    low, high = result["pck"]["0.1"]["image"]["low"], result["pck"]["0.1"]["image"]["high"]
    assert low < whole < high


def test_order_of_keypoints_has_no_say():
    pairs = random_pairs(6, 10)
    turned = [
        prediction(
            p.target_points[::-1],
            p.found[::-1],
            size=p.target_size,
            box=p.target_box,
            index=p.index,
            category=p.category,
            visible=p.target_visible[len(p.target_points) :],
        )
        for p in pairs
    ]
    for name in ("dift", "sd4match", "geoaware"):
        values = [
            score(predictions(one), [PROTOCOLS[name]])["protocols"][name]["pck_dagger"] for one in (pairs, turned)
        ]
        assert values[0] == values[1]


def test_bad_protocols():
    with pytest.raises(InputError, match="no protocol 'dfit'; allowed: dift"):
        get_protocols(["dfit"])
    good = {"origin": "", "side": 0, "bases": {}, "strict": False, "headline": "image", "alphas": (0.1,)}
    for change, message in (
        ({"frame": "circle"}, "frame is 'circle'"),
        ({"frame": "square"}, "side is 0"),
        ({"frame": "original", "headline": "mean"}, "headline is 'mean'"),
        ({"frame": "original", "bases": {"x": "area"}}, "basis is 'area'"),
        ({"frame": "original", "alphas": ()}, "alphas are"),
    ):
        with pytest.raises(InputError, match=message):
            Protocol("p", **{**good, **change})
