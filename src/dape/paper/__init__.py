"""The paper's tables and figures as experiments: planned, run, collected and reported."""
