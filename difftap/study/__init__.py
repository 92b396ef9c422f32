"""The semantic study: how near objects of the same and of other classes lie, in one image and across images."""
