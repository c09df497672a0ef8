"""Quality by lm-evaluation-harness, acceptance by category, and methods side by side."""
