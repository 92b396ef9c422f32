"""Running networks: backends behind one interface, their graphs and engines, noise, and the featurizer."""

from difftap.artifacts.cache import Cache, default_cache_folder
from difftap.engine.backend import Backend, Engine, Graph, Profile, TensorSpec
from difftap.engine.featurizer import (
    BranchEngine,
    EncodedBatch,
    Features,
    Featurizer,
    InputBatch,
    Latents,
    finite_or_alone,
    members_per_run,
)
from difftap.engine.graphfiles import model_key
from difftap.engine.registry import BACKENDS, check_precision, choose_device, get_backend

__all__ = [
    "BACKENDS",
    "Backend",
    "BranchEngine",
    "Cache",
    "EncodedBatch",
    "Engine",
    "Features",
    "Featurizer",
    "Graph",
    "InputBatch",
    "Latents",
    "Profile",
    "TensorSpec",
    "check_precision",
    "choose_device",
    "default_cache_folder",
    "finite_or_alone",
    "get_backend",
    "members_per_run",
    "model_key",
]
