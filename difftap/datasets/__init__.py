"""Data sets: pairs of images with keypoints, and images with masks of objects (scenes); one file per data set."""
