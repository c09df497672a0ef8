"""Quality: lm-evaluation-harness tasks on any model of ours, and graders for what it leaves to others."""
