"""Matching: from two images' feature maps to pairs of points, each with a score and a confidence. Needs only numpy.

>>> import numpy as np
>>> from difftap.coords import Geometry
>>> from difftap.featuremap import FeatureMap
>>> from difftap.recipe import Matcher
>>> data = np.random.default_rng(0).standard_normal((8, 6, 6)).astype(np.float32)       # (C, h, w)
>>> features = FeatureMap(data, Geometry.stretch(image=(90, 60), input=(96, 96)))
>>> match_points(features, features, [[30, 20]], Matcher("dense")).target.tolist()      # (N, 2)
[[30.0, 20.0]]
"""

from difftap.matching.descriptors import combine
from difftap.matching.grid import kernel_softargmax, nearest_cell, softargmax, window_softargmax
from difftap.matching.matches import Matches
from difftap.matching.mutual import mutual_nearest, nearest
from difftap.matching.rule import MatchRule, PreparedImage, heat_map, match_points, mutual_matches

__all__ = [
    "MatchRule",
    "Matches",
    "PreparedImage",
    "combine",
    "heat_map",
    "kernel_softargmax",
    "match_points",
    "mutual_matches",
    "mutual_nearest",
    "nearest",
    "nearest_cell",
    "softargmax",
    "window_softargmax",
]
