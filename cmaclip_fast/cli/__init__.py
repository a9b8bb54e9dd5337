"""The `cmaclip` command: reads arguments, calls the package, prints."""
