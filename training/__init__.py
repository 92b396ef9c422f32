"""Training of the embedded model `pocket`: a room of its own, never imported by difftap."""
