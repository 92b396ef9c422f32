"""The paper's Table 1, to stand beside ours and never to be mistaken for it."""

from __future__ import annotations

__all__ = ["SOURCE", "published_dunn"]

SOURCE = (
    "An analysis of pre-trained stable diffusion models through a semantic lens (Neurocomputing 2025), Table 1: "
    "Dunn index, Stable Diffusion 1.5; which form of the index it is, is not said"
)
_METRICS = ("euclidean", "correlation", "manhattan", "cosine")  # the order in which the table prints them
_ROWS = {
    "scsi-scdi": ".30312 .33343 .41411 .33027 .35941 .50012 .39991 .49589",
    "scsi-dcsi": ".65856 .80092 .80684 .78081 .37309 .59327 .42288 .59863",
    "scsi-dcdi": ".60352 .79657 .66042 .79998 .48857 .67989 .56369 .67637",
    "scdi-dcsi": ".04510 .08312 .06120 .08946 .07081 .08545 .05874 .07451",
    "scdi-dcdi": ".23696 .29406 .27972 .29364 .11407 .19403 .13810 .19816",
    "dcsi-dcdi": ".21439 .26777 .22345 .26179 .19077 .27705 .20624 .27002",
}
_PLACES = {("voc", metric): k for k, metric in enumerate(_METRICS)} | {
    ("coco", metric): k + len(_METRICS) for k, metric in enumerate(_METRICS)
}


def published_dunn(dataset: str, metric: str) -> dict[str, float]:
    """By pair of sets, what the paper prints for a data set and metric; empty where it prints nothing."""
    place = _PLACES.get((dataset, metric))
    return {} if place is None else {pair: float(row.split()[place]) for pair, row in _ROWS.items()}
