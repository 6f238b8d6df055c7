"""The subcommands of `softshard`, one module each, and the registry that lists them."""
