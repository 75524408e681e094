"""The paper's tables and figures as experiments: plan, run, collect and report."""
