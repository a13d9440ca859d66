"""The command line, one file a group of commands; thin: what they do is done by the pipelines."""
