"""The one way to open: a recipe made ready, engines built, listed and verified, the fastest backend chosen."""
