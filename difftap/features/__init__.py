"""Features of many images: where images come from, the feature store, extraction, pairs."""
