"""Benchmarks: measure speed, memory and the accuracy of matches."""
