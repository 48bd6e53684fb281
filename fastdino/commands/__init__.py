"""A command a file: `add_flags(parser)`, and `run(args)`, which gives the exit code. `cli.COMMANDS` names them."""
