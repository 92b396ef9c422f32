"""Data sets: annotated pairs of images (keypoints), images with objects (masks), and scenes; one file a data set."""
