"""What every other room stands on: attention and its masks, errors, notices, names, files and processes."""
