"""Speed and memory beside others, in one run: ratios, never absolute seconds."""
