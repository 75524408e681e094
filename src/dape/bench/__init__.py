"""Speed and memory of attention against named peers; nothing is timed that is not right."""
