"""One unit of work a file: read artefacts, call the library, write. `python -m tasks --help` runs them one by one."""
