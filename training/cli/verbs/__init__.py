"""The verbs of `python -m mixerzoo`, a file each: `main(arguments) -> exit code`; its docstring is the help."""
