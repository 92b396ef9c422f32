"""What version 0.1.0 wrote is read, and gone on with, as it lies.

``0.1.0.zip`` was made by 0.1.0 from four generated pictures (``data``):

    difftap extract data/images -o store.zarr --size 64 --pca 8 --pca-sample 4 --dtype int8
    difftap prototypes build folder data -o table.parquet --size 64
    difftap index build table.parquet --index index

``prompts`` holds a prompt file of random numbers, ``graph`` a manifest of the cache with a few bytes in place of its
graph. A failure here means that people's files no longer open: read them, or refuse them in one line that says how to
renew them, and say so in CHANGELOG.md.
"""

import dataclasses
import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest

from difftap.artifacts.manifest import Manifest
from difftap.errors import ArtifactError, InputError
from difftap.prompts.learned import load_learned
from difftap.recipe import load_recipe

KEYS = ["cat/p0.png", "cat/p2.png", "dog/p1.png", "dog/p3.png"]


@pytest.fixture
def old(tmp_path):
    with zipfile.ZipFile(Path(__file__).parent / "0.1.0.zip") as archive:
        archive.extractall(tmp_path)
    return tmp_path


def small():
    return dataclasses.replace(load_recipe("pocket"), size=(64, 64))


def test_a_store_is_whole_and_read(old):
    pytest.importorskip("zarr")
    from difftap.features.store import FeatureStore
    from difftap.features.store.care import verify

    store = FeatureStore.open(old / "store.zarr")
    assert store.keys() == KEYS
    assert list(verify(store)) == []
    features = store.read("cat/p0.png").branches[0]["up2"]
    assert features.data.shape == (160, 8, 8)
    assert features.data.mean() == pytest.approx(-1.48851681, rel=1e-5)
    assert features.geometry.image == (40, 32)
    store.check(small(), store.provenance.model_key)


def test_extraction_into_a_store_goes_on(old):
    pytest.importorskip("zarr")
    from difftap import Pipeline
    from difftap.features.extract import ExtractSettings, extract_to_store
    from difftap.features.sources import open_source
    from difftap.features.store import Encoding, FeatureStore
    from difftap.features.store.care import verify

    more = old / "data" / "images" / "dog" / "p4.png"
    more.write_bytes((old / "data" / "images" / "cat" / "p0.png").read_bytes())
    settings = ExtractSettings(encoding=Encoding("int8", pca=8))
    with Pipeline.open(small()) as pipeline:
        done = extract_to_store(pipeline, open_source(old / "data" / "images"), old / "store.zarr", settings)
    assert (done.written, done.skipped, done.failed) == (1, 4, 0)
    store = FeatureStore.open(old / "store.zarr")
    assert list(verify(store)) == []
    # the same picture, once by 0.1.0 and once by today's difftap
    was, now = (store.read(key).branches[0]["up2"].data for key in ("cat/p0.png", "dog/p4.png"))
    np.testing.assert_allclose(now, was, atol=0.05 * np.abs(was).max())


def test_a_store_of_another_schema_says_how_to_renew_it(old):
    pytest.importorskip("zarr")
    from difftap.features.store import FeatureStore

    path = old / "store.zarr" / "zarr.json"
    path.write_text(path.read_text().replace("difftap.store/1", "difftap.store/9"))
    with pytest.raises(InputError, match=r"has schema difftap.store/9; this difftap reads .*; extract it again"):
        FeatureStore.open(old / "store.zarr")


def test_a_table_of_prototypes_is_read(old):
    pytest.importorskip("pyarrow")
    from difftap.prototypes import PrototypeTable
    from difftap.retrieval.vectors import table_origin

    table = PrototypeTable.load(old / "table.parquet")
    assert table.classes.tolist() == ["cat", "cat", "dog", "dog"]
    assert table.instances.tolist() == ["cat/p0/1", "cat/p2/1", "dog/p1/1", "dog/p3/1"]
    np.testing.assert_allclose(table.vectors[:, 0], [2.5214880, 3.7447450, -2.7085035, 5.4131518], rtol=1e-6)
    assert table_origin(old / "table.parquet").recipe["size"] == [64, 64]


def test_an_index_is_searched(old):
    pytest.importorskip("faiss")
    from difftap.prototypes import PrototypeTable
    from difftap.retrieval.retrieve import open_index

    index = open_index(str(old / "index"))
    assert index.about.count == 4
    scores, rows = index.search(PrototypeTable.load(old / "table.parquet").vectors, 2)
    assert rows.tolist() == [[0, 3], [1, 3], [2, 0], [3, 1]]
    np.testing.assert_allclose(scores[:, 1], [0.44457698, 0.56492507, 0.42278075, 0.56492507], rtol=1e-5)


def test_learned_prompts_are_read(old):
    learned = load_learned(old / "prompts")
    assert learned.sha256 == "f8576e599b0b61a909f265f7652c3270a0776dc220847fd3a1bcb7ab61f959cf"
    assert (learned.kind, learned.classes) == ("class", ("cat", "dog"))
    assert learned.embeddings[0].shape == (2, 4, 8)
    np.testing.assert_allclose(learned.embeddings[0][0, 0, :2], [2.040919, -2.555665], rtol=1e-6)


def test_a_manifest_of_the_cache_is_trusted_or_names_what_differs(old):
    folder = old / "graph"
    manifest = Manifest.load(folder / "manifest.json")
    manifest.check(folder, {"model": "0123456789abcdef", "taps": ["up1"], "exporter": 1})
    with pytest.raises(ArtifactError, match=re.escape("was made for exporter = 1, not 2")):
        manifest.check(folder, {"exporter": 2})
    data = json.loads((folder / "manifest.json").read_text())
    assert (data["schema"], data["kind"]) == (1, "graph")
    (folder / "unet.onnx").write_bytes(b"cut short")
    with pytest.raises(ArtifactError, match="has 9 bytes, its manifest says 47"):
        manifest.check(folder, {})
