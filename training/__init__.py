"""Training of the embedded model `pocket`; difftap never imports this package."""
