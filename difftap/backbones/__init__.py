"""Backbones: the networks that can be tapped, and how a checkpoint of one is found on disk."""
