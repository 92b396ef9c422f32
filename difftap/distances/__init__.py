"""Distances between vectors, all pairs, in blocks of bounded memory, on the CPU or a GPU.

=============  =============================================================  ==========
metric         distance of x and y                                            range
=============  =============================================================  ==========
euclidean      length of x - y                                                0 and more
manhattan      sum of the absolute values of x - y                            0 and more
cosine         1 - cosine of the angle between x and y                        0 to 2
correlation    1 - Pearson's correlation of x and y                           0 to 2
dcor           1 - distance correlation (Szekely et al. 2007) of x and y      0 to 1
=============  =============================================================  ==========

Channels are the samples of both correlations. Where a correlation has no value it counts as 0, so the distance is 1,
also to the vector itself: a vector of zeros for ``cosine``, a constant one for ``correlation`` and ``dcor``.
"""

from difftap.distances.tables import METRICS, blocks, pairwise

__all__ = ["METRICS", "blocks", "pairwise"]
