"""Tables and images as streams of vectors, and queries made as the rows were."""

import numpy as np
import pytest

from difftap.errors import ImageError, InputError, NonFiniteError, PointError
from difftap.images import Image, load_image
from difftap.prototypes import PrototypeTable, prototypes
from difftap.recipe import Branch, Recipe
from difftap.retrieval.index import Rows, VectorOrigin
from difftap.retrieval.kinds import faiss_clash
from difftap.retrieval.queries import embed, image_query, mask_query, point_query, row_query
from difftap.retrieval.vectors import Patches, list_images, open_tables, patch_batches, table_batches
from tests.harness import FakePipeline, fake_recipe, picture, write_picture
from tests.retrieval.cases import RECIPE, origin, write_table

pytest.importorskip("pyarrow")
MADE = {"model": {"key": "m"}, "backend": {"name": "ort", "precision": "fp32"}}


def open_pipe(**more):
    """A pipeline of maps of 4 x 3 cells."""
    return FakePipeline(fake_recipe(size=(64, 48)), ((3, 3, 4),), batch=2, **more)


def test_tables_are_streamed(tmp_path):
    paths = [write_table(tmp_path / f"{k}.parquet", 30, k) for k in range(2)]
    found, batches = open_tables(paths)
    found.check(origin(), "the same")
    assert Recipe.from_dict(found.recipe) == RECIPE
    parts = list(batches)
    tables = [PrototypeTable.load(path) for path in paths]
    np.testing.assert_array_equal(
        np.concatenate([p.vectors for p in parts]), np.concatenate([t.vectors for t in tables])
    )
    rows = Rows.concat([part.rows for part in parts])
    assert rows.instances.tolist() == [one for table in tables for one in table.instances]
    assert [len(part.rows) for part in table_batches(paths[0], 7)] == [7, 7, 7, 7, 2]


@pytest.mark.parametrize("change", [{"model_key": "other"}, {"feature_key": "other"}, {"rule": "nearest"}])
def test_tables_of_other_origin_are_refused(tmp_path, change):
    paths = [write_table(tmp_path / "a.parquet"), write_table(tmp_path / "b.parquet", **change)]
    with pytest.raises(InputError, match=r"'.*b.parquet' is of another origin than the index: .* cannot be compared"):
        open_tables(paths)


def test_tables_that_cannot_be_used(tmp_path):
    path = write_table(tmp_path / "a.parquet")
    table = PrototypeTable.load(path)
    two = PrototypeTable.concat([table, table])
    two.taps[:5] = "up1"
    two.save(path)
    with pytest.raises(InputError, match="of 2 taps and timesteps"):
        open_tables([path])
    incomplete = write_table(tmp_path / "b.parquet", conditions={})
    with pytest.raises(InputError, match="does not say how its prototypes were made"):
        open_tables([incomplete])
    with pytest.raises(InputError, match="no table of prototypes at"):
        open_tables([tmp_path / "no.parquet"])


def test_all_cells_with_their_places(photos):
    pipe = open_pipe()
    parts = list(patch_batches(pipe, list(photos), Patches()))
    assert [len(part.rows) for part in parts] == [12, 12]
    for part, path in zip(parts, photos, strict=True):
        (features,) = pipe.extract([load_image(path)])
        cells = features.to_cells(np.stack([part.rows.x, part.rows.y], axis=1))
        columns, rows = np.round(cells).astype(int).T
        np.testing.assert_allclose(cells, np.round(cells), atol=1e-5)
        np.testing.assert_array_equal(part.vectors, features.data[:, rows, columns].T)
        assert set(part.rows.images) == {str(path.resolve())}
        assert set(part.rows.classes) == {""}


def test_some_cells_are_drawn_by_content(photos, tmp_path):
    which = Patches(5, "folder", seed=3)
    first, second = (list(patch_batches(open_pipe(), list(photos), which)) for _ in range(2))
    assert [len(part.rows) for part in first] == [5, 5]
    assert [part.rows.x.tolist() for part in first] == [part.rows.x.tolist() for part in second]
    assert set(first[0].rows.classes) == {tmp_path.name}
    other = list(patch_batches(open_pipe(), list(photos), Patches(5, seed=4)))
    assert [part.rows.x.tolist() for part in first] != [part.rows.x.tolist() for part in other]
    assert len({(x, y) for x, y in zip(first[0].rows.x, first[0].rows.y, strict=True)}) == 5


def test_images_that_fail(photos, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    pipe = open_pipe(faults={photos[1].name: NonFiniteError("the output holds NaN")})
    failures, done = [], []
    parts = list(patch_batches(pipe, [broken, *photos], Patches(), done.append, failures))
    assert [part.rows.images[0] for part in parts] == [str(photos[0].resolve())]
    assert [path for path, _ in failures] == [str(broken), str(photos[1])]
    assert sum(done) == 3
    with pytest.raises(ImageError):
        list(patch_batches(pipe, [broken], Patches()))


def test_listing_images(tmp_path, photos):
    (tmp_path / "deep").mkdir()
    write_picture(tmp_path / "deep" / "c.JPG", seed=3)
    (tmp_path / "notes.txt").write_text("no image")
    assert [path.name for path in list_images([tmp_path])] == ["a.png", "b.png", "c.JPG"]
    assert list_images([photos[1], photos[1]]) == [photos[1]]
    with pytest.raises(InputError, match="no image or folder"):
        list_images([tmp_path / "no"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no image in"):
        list_images([tmp_path / "empty"])


@pytest.mark.parametrize("source", ["prototypes", "patches"])
def test_a_mask_is_averaged_as_a_prototype_is(photos, source):
    image = load_image(photos[0])
    mask = np.zeros(image.pixels.shape[:2], bool)
    mask[5:20, 8:30] = True
    pipe = open_pipe()
    (features,) = pipe.features([image])
    one = features.branches[0]["up1"] if source == "prototypes" else pipe.join(features)
    wanted = prototypes([one], mask[None])[0][0]
    query = mask_query(image, mask, photos[0])
    np.testing.assert_array_equal(embed(query, origin(source=source), pipe), wanted)


def test_a_point_is_its_cell_and_an_image_the_mean_of_all(photos):
    image = load_image(photos[0])  # 40 x 30 over 4 x 3 cells: ten pixels a cell
    (features,) = open_pipe().features([image])
    one = features.branches[0]["up1"]
    for x, y in ((0.0, 0.0), (14.4, 9.0), (39.5, 29.5)):
        cell = one.data[:, min(int(round(y) // 10), 2), min(int(round(x) // 10), 3)]
        np.testing.assert_allclose(embed(point_query(image, x, y), origin(), open_pipe()), cell)
    np.testing.assert_allclose(embed(image_query(image), origin(), open_pipe()), one.data.mean(axis=(1, 2)), rtol=1e-6)
    with pytest.raises(PointError, match="lies outside the image"):
        point_query(image, 40.0, 3.0)


def test_masks_that_do_not_fit(photos):
    image = load_image(photos[0])
    with pytest.raises(InputError, match="is 50 x 36 pixels, the image 40 x 30"):
        mask_query(image, np.ones((36, 50), bool), photos[1])
    with pytest.raises(InputError, match="is empty"):
        mask_query(image, np.zeros((30, 40), bool), photos[1])


def test_a_row_of_a_table(tmp_path):
    path = write_table(tmp_path / "a.parquet")
    table = PrototypeTable.load(path)
    query = row_query(path, 29, origin())
    np.testing.assert_array_equal(query.vector, table.vectors[29])
    assert (query.key, query.about["class"]) == (table.images[29], table.classes[29])
    with pytest.raises(InputError, match="allowed: 0 to 29"):
        row_query(path, 30, origin())
    with pytest.raises(InputError, match="another origin"):
        row_query(path, 0, origin(model_key="other"))


def test_the_origin_of_patches_is_all_that_changes_them():
    one = Recipe((Branch(("up1",), 100),), size=(64, 64))
    key = VectorOrigin.of_patches(one, MADE)
    assert key.join == ""
    two = Recipe((Branch(("up1",), 100), Branch(("up2",), 50, weight=2.0)), size=(64, 64))
    assert VectorOrigin.of_patches(two, MADE).taps == "up1@100+up2@50"
    other = Recipe((Branch(("up1",), 100), Branch(("up2",), 50, weight=1.0)), size=(64, 64))
    with pytest.raises(InputError, match="join 'bicubic 1:1', the index's 'bicubic 1:2'"):
        VectorOrigin.of_patches(two, MADE).check(VectorOrigin.of_patches(other, MADE), "it")
    with pytest.raises(InputError, match="feature key"):
        key.check(VectorOrigin.of_patches(Recipe((Branch(("up1",), 101),), size=(64, 64)), MADE), "it")


def test_precisions_that_differ_by_more_than_rounding_are_refused():
    recipe = Recipe((Branch(("up1",), 100),), size=(64, 64))

    def at(precision, **store):
        return VectorOrigin.of_patches(recipe, {**MADE, "backend": {"precision": precision}, **store})

    at("fp32").check(at("fp16"), "it")
    with pytest.raises(InputError, match="precision 'int8', the index's 'fp16'"):
        at("fp16").check(at("int8"), "it")
    stored = at("fp32", store={"encoding": {"dtype": "int8", "pca": None}, "backend": {"precision": "int8"}})
    assert (stored.precision, stored.stored) == ("int8", "dtype int8")
    assert VectorOrigin.from_dict(stored.to_dict()) == stored
    old = {k: v for k, v in at("fp32").to_dict().items() if k not in ("precision", "stored")}
    assert VectorOrigin.from_dict(old) == at("fp32")


def test_an_image_given_as_an_array():
    image = Image(picture(5))
    assert embed(image_query(image), origin(), open_pipe()).shape == (3,)


def test_two_faiss_together():
    assert faiss_clash(["numpy", "faiss-cpu"]) is None
    assert faiss_clash(["faiss-gpu-cu12"]) is None
    assert faiss_clash([]) is None
    found = faiss_clash(["Faiss_CPU", "faiss-gpu-cu12", "milvus-lite"])
    assert "faiss-cpu and faiss-gpu-cu12 are installed together" in found
    assert faiss_clash() is None  # here, one is installed at most
