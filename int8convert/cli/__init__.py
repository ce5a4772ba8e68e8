"""The command line: the only place that imports typer, and in `console` the only one that imports rich."""
