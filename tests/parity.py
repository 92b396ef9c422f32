"""Two open engines on the same feeds, for tests."""

from __future__ import annotations

from difftap.export.parity import TensorParity


def compare(engine, reference, feeds):
    """The parity of every output."""
    wanted, got = reference.run(feeds), engine.run(feeds)
    return {name: TensorParity.of(got[name], wanted[name]) for name in wanted}
