"""Training: schedules, the step, the loop around it, and what they leave on disk."""
