"""The ground floor: configuration, errors, command lines, files and logging. Imports nothing of this project."""
