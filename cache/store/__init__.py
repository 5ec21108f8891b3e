"""The local disk: file format, index, files and what is done after a crash."""
