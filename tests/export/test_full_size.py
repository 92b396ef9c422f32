"""Stable Diffusion 1.5 and 2.1 at full size with seeded random weights: minutes, and about 10 GB of disk."""

import pytest

from difftap.engine import Cache
from difftap.export import export_graph, open_model
from difftap.recipe import ModelReference


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_full_size_graphs_are_torchs_to_a_ten_thousandth(name, tmp_path):
    cache = Cache(tmp_path / "cache")
    model = open_model(ModelReference(name, random_weights=0), cache)
    for component, taps in (("vae", ()), ("unet", ("up1",))):
        graph, parity = export_graph(cache, model, component, taps)
        assert set(parity) == {spec.name for spec in graph.outputs}
        for output, one in parity.items():
            assert one.relative <= 1e-4, output
            assert one.cosine_min >= 1 - 1e-6, output
        assert graph.path.stat().st_size < 5_000_000, "the graph holds weights"
