"""Every kind of source lists the same pictures, loads them alike, and says what is wrong with a bad one."""

import io
import json
import pickle
import tarfile

import numpy as np
import pytest

from difftap.errors import ImageError, InputError
from difftap.features.sources import open_source
from difftap.images import load_image
from tests.harness import write_picture

NAMES = ["a/1.png", "a/2.png", "b/3.PNG", "4.png"]


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "photos"
    for number, name in enumerate(NAMES):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write_picture(root / name, seed=number)
    (root / "notes.md").write_text("no picture")
    (root / ".hidden.png").write_bytes(b"x")
    (root / "a" / ".thumbs").mkdir()
    write_picture(root / "a" / ".thumbs" / "9.png", seed=9)
    return root


def content(folder):
    return {name: (folder / name).read_bytes() for name in NAMES}


def tarred(folder, path, names=tuple(NAMES)):
    with tarfile.open(path, "w") as archive:
        for name in names:
            archive.add(folder / name, name)
            info = tarfile.TarInfo(name + ".json")
            info.size = 2
            archive.addfile(info, io.BytesIO(b"{}"))
    return path


def check(source, folder, keys):
    assert [item.key for item in source] == keys
    for item, name in zip(source, NAMES if len(keys) == len(NAMES) else NAMES[: len(keys)], strict=False):
        again = pickle.loads(pickle.dumps(item))
        assert again == item
        assert load_image(folder / name).digest in {one.at.load().digest for one in source}
    assert {item.at.load().digest for item in source} == {load_image(folder / name).digest for name in NAMES}


def test_a_folder(folder):
    source = open_source(folder)
    assert [item.key for item in source] == ["4.png", "a/1.png", "a/2.png", "b/3.PNG"]
    assert source.items[1].at.load().digest == load_image(folder / "a/1.png").digest


def test_a_folder_with_a_loop(folder):
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    assert len(open_source(folder)) == 4


def test_a_glob(folder):
    assert [item.key for item in open_source(f"{folder}/a/*.png")] == ["1.png", "2.png"]
    assert len(open_source(f"{folder}/**/*.[pP]*")) == 4


def test_a_list(folder, tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("# mine\nphotos/4.png\n\n  photos/a/1.png\nphotos/4.png\nphotos/none.png\n")
    source = open_source(path)
    assert [item.key for item in source] == ["photos/4.png", "photos/a/1.png", "photos/none.png"]
    assert source.repeated == 1
    assert source.items[0].at.load().digest == load_image(folder / "4.png").digest
    with pytest.raises(ImageError, match="no image at"):
        source.items[2].at.load()


def test_a_tar(folder, tmp_path):
    check(open_source(tarred(folder, tmp_path / "x.tar")), folder, NAMES)


def test_tars(folder, tmp_path):
    tarred(folder, tmp_path / "0.tar", NAMES[:2])
    tarred(folder, tmp_path / "1.tar", NAMES[2:])
    keys = ["0.tar/a/1.png", "0.tar/a/2.png", "1.tar/b/3.PNG", "1.tar/4.png"]
    check(open_source(f"{tmp_path}/*.tar"), folder, keys)


def test_a_tar_cut_short(folder, tmp_path):
    path = tarred(folder, tmp_path / "x.tar")
    source = open_source(path)
    path.write_bytes(path.read_bytes()[: source.items[-1].at.offset + 5])
    with pytest.raises(ImageError, match="cut short"):
        source.items[-1].at.load()
    assert source.items[0].at.load().digest == load_image(folder / NAMES[0]).digest


CELLS = {
    "struct": lambda data, name: {"bytes": data, "path": None},
    "struct of path": lambda data, name: {"bytes": None, "path": name},
    "bytes": lambda data, name: data,
    "path": lambda data, name: name,
}


@pytest.mark.parametrize("cell", CELLS)
def test_parquet(folder, cell):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    cells = [CELLS[cell](data, name) for name, data in content(folder).items()]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if cell.startswith("struct") else None
    table = pa.table({"id": list(range(4)), "image": pa.array(cells, kind)})
    parquet.write_table(table, folder / "t.parquet", row_group_size=3)
    source = open_source(folder / "t.parquet", "image" if cell == "path" else None)
    check(source, folder, [f"t.parquet:{row}" for row in range(4)])


def test_a_saved_dataset(folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cells = {"image": [{"bytes": data, "path": None} for data in content(folder).values()]}
        made = datasets.Dataset.from_dict(cells).cast_column("image", datasets.Image())
        made.save_to_disk(tmp_path / "saved")
    source = open_source(tmp_path / "saved")
    assert len(source) == 4
    assert {item.at.load().digest for item in source} == {load_image(folder / name).digest for name in NAMES}
    (tmp_path / "saved" / "dataset_dict.json").write_text(json.dumps({"splits": []}))
    with pytest.raises(InputError, match="splits"):
        open_source(tmp_path / "saved")


def test_an_empty_cell_is_that_images_fault(folder):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    data = next(iter(content(folder).values()))
    parquet.write_table(pa.table({"image": pa.array([data, None, b"", b"junk"])}), folder / "t.parquet")
    items = open_source(folder / "t.parquet").items
    items[0].at.load()
    for item, words in zip(items[1:], ["cell is empty", "0 bytes", "not a picture"], strict=True):
        with pytest.raises(ImageError, match=words):
            item.at.load()


def test_bad_sources(folder, tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(pa.table({"n": [1, 2]}), tmp_path / "n.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1junk")
    (tmp_path / "bad.tar").write_bytes(b"junk" * 300)
    (tmp_path / "x.tar.gz").write_bytes(b"")
    (tmp_path / "x.xyz").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("# nothing\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for name, words in {
        "none": "no images at",
        "none/*.png": "no images at",
        "empty": "no image in",
        "empty.txt": "no image in",
        "binary.txt": "cannot be read",
        "x.xyz": "no kind of source",
        "x.tar.gz": "unpack it",
        "bad.tar": "cannot be read as an uncompressed tar",
        "bad.parquet": "cannot be read as Parquet",
        "n.parquet": "no column .* looks like images; columns: n",
    }.items():
        with pytest.raises(InputError, match=words):
            open_source(str(tmp_path / name))
    for column, words in {"x": "there is none", "n": "of type int64"}.items():
        with pytest.raises(InputError, match=words):
            open_source(tmp_path / "n.parquet", column)
    with pytest.raises(InputError, match="--column goes with a table"):
        open_source(folder, "image")


def test_pixels_not_packing_decide_the_digest(folder, tmp_path):
    source = open_source(tarred(folder, tmp_path / "x.tar"))
    assert np.array_equal(source.items[0].at.load().pixels, load_image(folder / NAMES[0]).pixels)
