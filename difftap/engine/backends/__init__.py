"""One file a runtime; `difftap.engine.registry` lists them."""
