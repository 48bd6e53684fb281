"""What goes wrong for reasons outside the code. The command line turns these into one line and an exit code."""


class UserError(ValueError):
    """A mistake in what was asked for: exit code 2, nothing written."""


class TrainingError(RuntimeError):
    """A run that cannot go on (a non-finite loss, too many unreadable images, too little memory): exit code 1."""
