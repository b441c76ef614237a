"""One stage of the pipeline per file: reads artefacts, calls the library, writes results."""
