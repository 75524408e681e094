"""Speed and memory of attention against named peers; wrong methods are not timed."""
