import json
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PIL

from difftap.commands.data import data as data_command
from difftap.datasets import coco, davis, objects, voc
from difftap.datasets.check import check_objects
from difftap.datasets.layout import DatasetError
from difftap.datasets.objects import read_listing
from difftap.errors import InputError
from difftap.images import read_labels
from difftap.prototypes import ObjectFilter
from tests.datasets.builders import block, write_coco, write_davis, write_folder, write_labels, write_voc
from tests.harness import invoke, write_picture

WRITERS = {"coco": write_coco, "davis": write_davis, "folder": write_folder, "voc": write_voc}
ALL = ObjectFilter(min_area=0.0)


def load(name, root, **options):
    if name == "coco":
        pytest.importorskip("pycocotools")
    return objects.load(name, root, **options)


def described(source):
    scenes = [source.read(key) for key in source.keys]
    return {scene.key: [(one.instance, one.category) for one in scene.objects] for scene in scenes}


def test_an_unknown_data_set_lists_those_there_are(tmp_path):
    with pytest.raises(InputError, match="no data set of objects 'ade'; allowed: coco, davis, folder, voc"):
        objects.load("ade", tmp_path)
    with pytest.raises(InputError, match="data set 'voc' has no option --crowds"):
        objects.load("voc", tmp_path, crowds="include")


@pytest.mark.parametrize("name", objects.NAMES)
def test_a_missing_root_draws_the_expected_tree(name, tmp_path):
    with pytest.raises(DatasetError) as caught:
        objects.load(name, tmp_path / "gone")
    assert caught.value.detail.startswith(f"expected:\n{tmp_path / 'gone'}/")
    assert caught.value.detail.count("[not found]") == len(objects.loader(name).TREE)
    (tmp_path / "some").mkdir()
    with pytest.raises(DatasetError, match="lacks"):
        objects.load(name, tmp_path / "some")


@pytest.mark.parametrize("name", objects.NAMES)
def test_every_loader_gives_masks_as_large_as_the_image(name, tmp_path):
    source = load(name, WRITERS[name](tmp_path), wanted=ALL)
    assert len(source) >= 2
    for key in source.keys:
        scene = source.read(key)
        assert scene.masks.shape == (len(scene.objects), 30, 40)
        for one, mask in zip(scene.objects, scene.masks, strict=True):
            assert one.area == pytest.approx(mask.sum() / 1200)
    instances = [one.instance for key in source.keys for one in source.read(key).objects]
    assert name == "davis" or len(set(instances)) == len(instances)


@pytest.mark.parametrize("name", objects.NAMES)
def test_objects_must_cover_more_than_the_area(name, tmp_path):
    source = load(name, WRITERS[name](tmp_path), wanted=ALL)
    areas = sorted({one.area for key in source.keys for one in source.read(key).objects})
    some = load(name, tmp_path, wanted=ObjectFilter(min_area=areas[0]))
    kept = [one.area for key in some.keys for one in some.read(key).objects]
    assert kept
    assert min(kept) > areas[0]  # "over", not "from"
    assert sum(some.read(key).left_out.get("too small an area", 0) for key in some.keys) >= 1


def test_voc_objects_have_classes_and_no_void(tmp_path):
    source = load("voc", write_voc(tmp_path))
    assert described(source) == {
        "a": [("a/1", "cat"), ("a/2", "cat"), ("a/3", "person")],
        "b": [("b/1", "cat"), ("b/2", "dog")],
    }
    labels = read_labels(tmp_path / "SegmentationObject/a.png")
    scene = source.read("a")
    assert (labels == 255).any()
    assert not scene.masks[:, labels == 255].any()
    assert [int((labels == k).sum()) for k in (1, 2, 3)] == scene.masks.sum(axis=(1, 2)).tolist()


@pytest.mark.parametrize("inside", ["VOC2012", "VOCdevkit/VOC2012"])
def test_voc_may_lie_below_the_root(tmp_path, inside):
    write_voc(tmp_path / inside)
    assert list(load("voc", tmp_path).keys) == ["a", "b"]


def test_voc_splits_and_lists(tmp_path):
    write_voc(tmp_path, split="val")
    assert load("voc", tmp_path).about["split"] == "val"
    assert list(load("voc", tmp_path, listing=["b.jpg"]).keys) == ["b"]
    with pytest.raises(DatasetError, match=r"lacks 'ImageSets/Segmentation/train.txt'"):
        load("voc", tmp_path, split="train")
    with pytest.raises(InputError, match="split 'nope' does not exist; allowed: trainval, train, val"):
        load("voc", tmp_path, split="nope")
    with pytest.raises(InputError, match="VOC has no class 'unicorn'; allowed: aeroplane"):
        load("voc", tmp_path, wanted=ObjectFilter(classes=("unicorn",)))
    source = load("voc", tmp_path, wanted=ObjectFilter(classes=("dog",)))
    assert described(source) == {"a": [], "b": [("b/2", "dog")]}
    assert source.read("a").left_out == {"class not wanted": 3}


def test_voc_files_that_are_missing_or_wrong(tmp_path):
    write_voc(tmp_path)
    with pytest.raises(DatasetError, match="1 of 2 images of 'voc'") as caught:
        load("voc", tmp_path, listing=["a", "z"])
    assert caught.value.problems[0].kind == "missing-image"
    source = load("voc", tmp_path, listing=["a", "z"], allow_missing=True)
    assert (list(source.keys), source.about["missing"]) == (["a"], 1)
    write_labels(tmp_path / "SegmentationObject/a.png", block((40, 20), _1=(0, 0, 9, 9)))
    with pytest.raises(InputError, match="masks of 'a' are"):
        source.read("a")
    PIL.fromarray(np.zeros((30, 40, 3), np.uint8)).save(tmp_path / "SegmentationObject/a.png")
    with pytest.raises(InputError, match="holds colours"):
        source.read("a")
    write_labels(tmp_path / "SegmentationObject/a.png", block(_9=(25, 16, 30, 19)))  # background in SegmentationClass
    with pytest.raises(InputError, match="object 9 of 'a' has no class"):
        source.read("a")


def test_coco_polygons_run_lengths_and_crowds(tmp_path):
    source = load("coco", write_coco(tmp_path))
    assert described(source) == {
        "val2017/000000000001": [("val2017/000000000001/100", "person"), ("val2017/000000000001/101", "potted plant")],
        "val2017/000000000002": [("val2017/000000000002/103", "car")],
    }
    first = source.read("val2017/000000000001")
    assert first.left_out == {"crowd": 1}
    assert first.masks.sum(axis=(1, 2)).tolist() == [200, 400]  # both parts of the person
    second = source.read("val2017/000000000002")
    assert second.left_out == {"too small an area": 1}
    assert second.masks[0, :, :10].all()
    assert second.masks[0].sum() == 300  # run lengths go down the columns
    crowded = load("coco", tmp_path, crowds="include").read("val2017/000000000001")
    assert [one.category for one in crowded.objects] == ["person", "potted plant", "person"]
    assert crowded.masks[2, :, 20:30].all()
    with pytest.raises(InputError, match="crowds 'count' does not exist; allowed: exclude, include"):
        load("coco", tmp_path, crowds="count")


def test_coco_compressed_run_lengths(tmp_path):
    pytest.importorskip("pycocotools")
    from pycocotools import mask as encoder

    drawn = np.zeros((30, 40), np.uint8, order="F")
    drawn[5:20, 3:33] = 1
    packed = encoder.encode(drawn)
    segmentation = {"counts": packed["counts"].decode(), "size": [30, 40]}
    write_coco(tmp_path, [{"image_id": 1, "category_id": 1, "iscrowd": 0, "segmentation": segmentation}])
    assert np.array_equal(load("coco", tmp_path).read("val2017/000000000001").masks[0], drawn.astype(bool))


def test_coco_says_nothing_on_stdout(tmp_path, capsys):
    load("coco", write_coco(tmp_path))
    assert capsys.readouterr().out == ""


def test_coco_lists_look_in_both_splits(tmp_path):
    write_coco(tmp_path)
    write_coco(tmp_path, split="train2017")
    source = load("coco", tmp_path, listing=["000000000002.jpg"])
    assert list(source.keys) == ["val2017/000000000002"]
    assert list(load("coco", tmp_path, listing=["train2017/000000000002"]).keys) == ["train2017/000000000002"]
    with pytest.raises(DatasetError, match="1 of 2 images of 'coco'"):
        load("coco", tmp_path, listing=["000000000002.jpg", "000000000099.jpg"])


def test_a_part_of_coco_need_not_have_all_of_vocs_classes(tmp_path):
    from difftap.datasets.chosen_objects import classes_of

    write_coco(tmp_path)
    source = load("coco", tmp_path, wanted=ObjectFilter(classes=classes_of("voc", "coco")))
    found = [one.category for key in source.keys for one in source.read(key).objects]
    assert sorted(found) == ["car", "person", "potted plant"]
    with pytest.raises(InputError, match="COCO has no class 'airplane'; allowed: car, person"):
        load("coco", tmp_path, wanted=ObjectFilter(classes=("airplane",)))


def test_coco_annotations_that_cannot_be_used(tmp_path):
    write_coco(tmp_path, [{"image_id": 1, "category_id": 1, "iscrowd": 0, "segmentation": [[0, 0, 1]]}])
    with pytest.raises(InputError, match="has no usable mask"):
        load("coco", tmp_path).read("val2017/000000000001")
    write_picture(tmp_path / "val2017/000000000002.jpg", (20, 30))
    with pytest.raises(InputError, match="is 20x30, but annotated as 40x30"):
        load("coco", tmp_path).read("val2017/000000000002")
    with pytest.raises(InputError, match="COCO has no class 'unicorn'"):
        load("coco", tmp_path, wanted=ObjectFilter(classes=("unicorn",)))
    (tmp_path / "annotations/instances_val2017.json").write_text("{")
    with pytest.raises(DatasetError, match="cannot be read as COCO annotations"):
        load("coco", tmp_path)


def test_davis_objects_are_the_same_in_every_frame(tmp_path):
    source = load("davis", write_davis(tmp_path))
    assert described(source) == {
        "bear/00000": [("bear/1", "object")],
        **{f"walking/0000{k}": [("walking/1", "person"), ("walking/2", "person")] for k in range(3)},
    }
    assert source.about["semantics"] == "built in"
    (tmp_path / "davis_semantics.json").write_text(json.dumps({"bear": {"1": "bear"}, "walking": {"1": "person"}}))
    named = described(load("davis", tmp_path, split="val"))
    assert named["bear/00000"] == [("bear/1", "bear")]
    assert named["walking/00001"] == [("walking/1", "person"), ("walking/2", "object")]
    (tmp_path / "davis_semantics.json").write_text("[1]")
    with pytest.raises(DatasetError, match="cannot be read as classes"):
        load("davis", tmp_path)


def test_davis_frames_without_masks_are_no_scenes(tmp_path):
    write_davis(tmp_path)
    (tmp_path / "Annotations/480p/walking/00001.png").unlink()
    assert [key for key in load("davis", tmp_path).keys if "walking" in key] == ["walking/00000", "walking/00002"]
    (tmp_path / "JPEGImages/480p/walking/00002.jpg").unlink()
    with pytest.raises(DatasetError, match="1 of 3 images of 'davis'"):
        load("davis", tmp_path)
    with pytest.raises(DatasetError, match="none is left to use"):
        load("davis", tmp_path, listing=["judo"], allow_missing=True)


def test_davis_people_of_the_study():
    assert len(davis.STUDY_CLIPS) == 8
    assert all(len(davis.PEOPLE[clip]) >= 2 for clip in davis.STUDY_CLIPS)


def test_a_folder_takes_classes_from_folders_or_a_list(tmp_path):
    write_folder(tmp_path)
    source = load("folder", tmp_path)
    assert described(source) == {"b": [("b/1", "object")], "cup/a": [("cup/a/1", "cup"), ("cup/a/2", "cup")]}
    assert not source.read("b").masks[0, :, 30:].any()
    (tmp_path / "objects.csv").write_text("image,object,class,instance\ncup/a.png,2,mug,blue mug\nb.jpg,1,hat,\n")
    assert described(load("folder", tmp_path)) == {
        "b": [("b/1", "hat")],
        "cup/a": [("cup/a/1", "cup"), ("blue mug", "mug")],
    }
    assert list(load("folder", tmp_path, listing=["cup/a.png"]).keys) == ["cup/a"]
    (tmp_path / "objects.csv").write_text("image,number\n")
    assert described(load("folder", tmp_path))  # no rows, nothing named
    (tmp_path / "objects.csv").write_text("image,number\na,1\n")
    with pytest.raises(DatasetError, match=r"objects\.csv' cannot be read"):
        load("folder", tmp_path)


def test_a_folder_with_sixteen_bits_knows_no_void(tmp_path):
    write_folder(tmp_path)
    labels = np.zeros((30, 40), np.uint16)
    labels[:10], labels[10:20], labels[20:] = 255, 300, 1000
    PIL.fromarray(labels).save(tmp_path / "masks/b.png")
    assert [one.instance for one in load("folder", tmp_path).read("b").objects] == ["b/255", "b/300", "b/1000"]


def test_pictures_without_a_mask(tmp_path):
    write_folder(tmp_path)
    write_picture(tmp_path / "images/lonely.png")
    with pytest.raises(DatasetError, match="1 of 3 images of 'folder'"):
        load("folder", tmp_path)
    assert len(load("folder", tmp_path, allow_missing=True)) == 2


def test_lists(tmp_path):
    file = tmp_path / "list.csv"
    file.write_text("src,dataset\na.jpg,pascal\n1.jpg,coco\njudo,davis\na.jpg,pascal\n")
    assert read_listing(file, "voc") == ("a.jpg",)
    assert read_listing(file, "davis") == ("judo",)
    with pytest.raises(InputError, match="names nothing of the data set 'folder'"):
        read_listing(file, "folder")
    file.write_text("a\nb\n")
    assert read_listing(file, "folder") == ("a", "b")
    file.write_text("src,dataset\na.jpg\n")
    with pytest.raises(InputError, match=r"line 2 of .* has 1 cells; allowed: 2"):
        read_listing(file, "voc")
    with pytest.raises(InputError, match="cannot be read as a list"):
        read_listing(tmp_path, "voc")


def test_voc_names_are_cocos():
    assert set(coco.VOC_NAMES) <= set(voc.CLASSES)
    assert len(voc.CLASSES) == 20


@pytest.mark.parametrize("area", [-0.1, 1.0, float("nan")])
def test_areas_that_are_no_fraction(area):
    with pytest.raises(InputError, match="min-area is"):
        ObjectFilter(min_area=area)


def run_check(*arguments):
    return invoke(["check", *map(str, arguments)], command=data_command)


@pytest.mark.parametrize("name", objects.NAMES)
def test_data_check_covers_objects(name, tmp_path):
    if name == "coco":
        pytest.importorskip("pycocotools")
    root = WRITERS[name](tmp_path)
    result = run_check(name, root)
    assert result.exit_code == 0, result.output
    assert f"{name} in {root}: all is well" in result.output
    report = json.loads(run_check(name, root, "--json").output)
    assert report["ok"]
    assert report["parts"][0]["objects"] == sum(c["objects"] for c in report["parts"][0]["classes"].values())


def test_data_check_says_what_is_broken(tmp_path):
    root = write_voc(tmp_path)
    (root / "SegmentationClass/a.png").write_bytes(b"no picture")
    (root / "SegmentationObject/b.png").unlink()
    result = run_check("voc", root)
    assert result.exit_code == 1
    assert "trainval: 2 images, 0 usable, 0 objects" in result.output
    assert "broken: 1 images, missing-annotation" in result.output
    assert "broken: 1 images, unreadable" in result.output
    assert run_check("voc", root, "--json").exit_code == 1
    (root / "SegmentationObject/a.png").unlink()
    (part,) = check_objects("voc", root).parts
    assert (part.images, part.usable, len(part.problems)) == (2, 0, 2)
    assert isinstance(run_check("sofa", root).exception, InputError)


@pytest.mark.dataset
@pytest.mark.parametrize(
    ("name", "folder", "counts"),
    [
        ("voc", "voc-mini", [("val", 3, 10)]),
        ("coco", "coco-mini", [("val2017", 6, 50), ("train2017", 32, 96)]),
        ("davis", "davis-mini", [("val", 60, 87)]),
    ],
)
def test_the_real_data_is_sound(real, name, folder, counts):
    report = check_objects(name, real(folder))
    assert report.ok
    assert [(part.split, part.usable, part.objects) for part in report.parts] == counts


# ---- nothing is dropped in silence, and no number of a file reaches C code unchecked


def annotated(segmentation, **more):
    return [{"image_id": 1, "category_id": 1, "iscrowd": 0, "segmentation": segmentation, **more}]


@pytest.mark.parametrize(
    ("segmentation", "words"),
    [
        ([[0, 0, 10, 0, float("nan"), 10]], "no finite number"),
        ([[0, 0, 10, 0, float("inf"), 10]], "no finite number"),
        ([[0, 0, 10, 0, 1e9, 10]], "far outside the image of 40 x 30"),
        ([[0, 0, 10, -500, 10, 10]], "far outside"),
        ([[0, 0, 10, 0]], "no list of three or more"),
        ([[0, 0, 10, 0, 10, 10, 3]], "no list of three or more"),
        ([[0, 0, "ten", 0, 10, 10]], "no finite number"),
        ([7], "no list of three or more"),
        ("text", "segmentation is a str"),
        ({"counts": [600, 300], "size": [30, 40]}, "run lengths sum to 900; allowed: the image's 1200 pixels"),
        ({"counts": [600, -300, 900], "size": [30, 40]}, "no list of whole numbers"),
        ({"counts": [1200.0], "size": [30, 40]}, "no list of whole numbers"),
        ({"counts": [1200], "size": [40, 30]}, r"of size \[40, 30\]; allowed: the image's, \[30, 40\]"),
        ({"counts": [3600000000], "size": [60000, 60000]}, "of size"),
        ({"counts": "\x7f", "size": [30, 40]}, "none of theirs"),
        ({"counts": "P", "size": [30, 40]}, "end within a number"),
        ({"size": [30, 40]}, "no list of whole numbers"),
    ],
)
def test_coco_numbers_are_checked_before_they_are_drawn(tmp_path, segmentation, words):
    good = {"image_id": 2, "category_id": 3, "iscrowd": 0, "segmentation": [[0, 0, 20, 0, 20, 20, 0, 20]]}
    source = load("coco", write_coco(tmp_path, [*annotated(segmentation), good]))
    with pytest.raises(InputError, match=f"annotation 100 of .* has no usable mask .*{words}"):
        source.read("val2017/000000000001")
    assert len(source.read("val2017/000000000002").objects) == 1  # the others go on


@given(st.lists(st.integers(0, 60), min_size=1, max_size=40))
@settings(max_examples=50, deadline=None)
def test_runs_are_drawn_as_pycocotools_draws_them(counts):
    coder = pytest.importorskip("pycocotools.mask")
    height, width = 7, max(1, -(-sum(counts) // 7))
    counts = [*counts, height * width - sum(counts)]
    packed = coder.frPyObjects({"counts": counts, "size": [height, width]}, height, width)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        want = np.asarray(coder.decode(packed), bool)
    for form in (counts, packed["counts"], packed["counts"].decode()):
        got = coco._draw({"counts": form, "size": [height, width]}, (width, height))
        assert (got == want).all()


def test_coco_entries_that_refer_to_nothing(tmp_path):
    square = [[0, 0, 9, 0, 9, 9]]
    write_coco(tmp_path, [*annotated(square, category_id=5), *annotated(square, image_id=77)])
    source = load("coco", tmp_path)
    with pytest.raises(InputError, match="annotation 100 has category_id 5, which the file's categories do not list"):
        source.read("val2017/000000000001")
    assert source.read("val2017/000000000002").objects == ()
    assert "1 annotations are of images that" in source.unused[0]
    assert "77" in source.unused[0]


def test_coco_ids_that_stand_there_twice(tmp_path):
    square = [[0, 0, 20, 0, 20, 20, 0, 20]]
    write_coco(tmp_path, [*annotated(square, id=7), {**annotated(square, id=7)[0], "image_id": 2}])
    source = load("coco", tmp_path)
    for key in source.keys:
        with pytest.raises(InputError, match="annotation id 7 stands there twice"):
            source.read(key)


def rewrite(root, change):
    file = root / "annotations/instances_val2017.json"
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def test_coco_needs_no_width_and_height(tmp_path):
    write_coco(tmp_path)
    rewrite(tmp_path, lambda data: [info.pop(name) for info in data["images"] for name in ("width", "height")])
    assert len(load("coco", tmp_path).read("val2017/000000000001").objects) == 2


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        (("x/1.jpg", "y/1.jpg"), ["val2017/x/1", "val2017/y/1"]),
        (("x/1.jpg", "x/1.png"), ["val2017/x/1.jpg", "val2017/x/1.png"]),
        (("x/1.jpg", "2.jpg"), ["val2017/1", "val2017/2"]),
    ],
)
def test_coco_images_of_one_stem_are_all_there(tmp_path, names, keys):
    write_coco(tmp_path)
    for name, file in zip(names, sorted((tmp_path / "val2017").glob("*.jpg")), strict=True):
        (tmp_path / "val2017" / name).parent.mkdir(exist_ok=True)
        PIL.open(file).save(tmp_path / "val2017" / name)

    def rename(data):
        for info, name in zip(data["images"], names, strict=True):
            info["file_name"] = name

    rewrite(tmp_path, rename)
    source = load("coco", tmp_path)
    assert sorted(source.keys) == keys
    assert sum(len(source.read(key).objects) for key in keys) == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data["images"][1].update(id=1), "image id 1 stands there twice"),
        (lambda data: data["images"][1].update(file_name="000000000001.jpg"), "two images have the file_name"),
        (lambda data: data["images"][0].update(file_name="../000000000001.jpg"), "leaves the folder"),
    ],
)
def test_coco_images_that_cannot_be_told_apart(tmp_path, change, words):
    write_coco(tmp_path)
    rewrite(tmp_path, change)
    source = load("coco", tmp_path)
    with pytest.raises(InputError, match=words):
        for key in source.keys:
            source.read(key)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.pop("images"),
        lambda data: data.update(annotations=3),
        lambda data: data["images"].append("text"),
        lambda data: data["categories"].append({"id": 1, "name": "twice"}),
        lambda data: data["categories"].append({"name": "no id"}),
    ],
)
def test_a_file_that_is_no_coco_is_refused(tmp_path, change):
    write_coco(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(DatasetError, match=r"instances_val2017\.json"):
        load("coco", tmp_path)


def test_a_folder_names_what_it_does_not_use(tmp_path):
    write_folder(tmp_path)
    assert load("folder", tmp_path).unused == ()
    (tmp_path / "images/notes.txt").write_text("hello")
    (tmp_path / "images/.thumbs").mkdir()
    write_picture(tmp_path / "images/.thumbs/b.png", (4, 3))
    write_labels(tmp_path / "masks/cup/lost.png", block(_1=(0, 0, 20, 20)))
    (tmp_path / "objects.csv").write_text("image,object,class\ncup/a.png,1,mug\ngone.png,1,mug\n")
    first, second, third = load("folder", tmp_path).unused
    assert first == "images/ holds 1 files that are no pictures (1 .txt), 1 hidden pictures"
    assert "1 files in masks/ belong to no picture, such as 'cup/lost.png'" in second
    assert "1 images that are not there, such as 'gone'" in third
    report = check_objects("folder", tmp_path)
    assert report.ok
    assert not report.whole


def test_pictures_of_one_name_are_refused_by_name(tmp_path):
    write_folder(tmp_path)
    write_picture(tmp_path / "images/b.png", (40, 30))
    with pytest.raises(DatasetError, match=r"b\.jpg' and '.*b\.png' have one name"):
        load("folder", tmp_path)
    assert list(load("folder", tmp_path, allow_missing=True).keys) == ["cup/a"]


@pytest.mark.parametrize(("labels", "objects"), [([0, 255], 1), ([0, 1, 255], 1), ([0, 1, 2], 2)])
def test_255_is_an_object_where_it_is_alone(tmp_path, labels, objects):
    write_picture(tmp_path / "images/a.png", (40, 30))
    mask = np.repeat(np.array(labels, np.uint8), [20] * (len(labels) - 1) + [60 - 20 * (len(labels) - 1)])
    write_labels(tmp_path / "masks/a.png", np.resize(mask, (30, 40)))
    assert len(load("folder", tmp_path, wanted=ObjectFilter(0)).read("a").objects) == objects
