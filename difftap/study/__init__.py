"""The semantic study: distances between objects of the same class and of other classes, within and across images."""
