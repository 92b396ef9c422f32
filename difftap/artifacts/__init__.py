"""Files that last: written atomically, trusted by their manifest, made once, resumed after a kill."""
