"""Learn prompts for matching. It needs torch; reading settings and training pairs does not."""
