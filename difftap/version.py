"""The version of difftap, read by the build and written beside every number."""

__version__ = "0.1.0"
