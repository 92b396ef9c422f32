"""What difftap measures: speed, memory, and how right its matches are."""
